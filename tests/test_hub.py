"""hf://OWNER/REPO[@REVISION]/FILE: downloaded once, found again without a network."""

import hashlib
import os
import resource
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, refused, run_ranks

from weights.hub import file_or_address, local_file, open_checkpoint

ADDRESS = "hf://ann/digits/runs/a.pt"


def test_a_file_is_downloaded_once_for_each_revision(hub):
    path = hub.folder / "ann" / "digits" / "runs" / "a.pt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    for address in (ADDRESS, ADDRESS.replace("digits", "digits@v1")) * 2:
        assert local_file(address).read_bytes() == b"weights"
    assert hub.asked == [("ann/digits", "runs/a.pt", revision) for revision in (None, "v1")]
    assert file_or_address(ADDRESS) == ADDRESS  # a Path would lose a slash
    with refused("must be", "got hf://ann/digits@v2/runs/a.pt (404 Client Error.); "):
        local_file("hf://ann/digits@v2/runs/a.pt")


@pytest.mark.parametrize("address", [
    "hf://", "hf://ann/digits/", "hf://ann//a.pt", "hf:///digits/a", "hf://ann/digits@/a.pt",
    "hf://ann/digits/a.pt@v1", "hf://a nn/digits/a.pt", "hf://ann/digits@../../x/a.pt",
    "hf://ann/digits@../a.pt", "hf://../digits/a.pt", "hf://ann/digits/x/../a.pt",
    "hf://ann/digits/..", "https://elsewhere.org/ann/digits/blob/main/a.pt"])
def test_a_malformed_address_is_refused(address, hub):
    with refused("must be", "hf://OWNER/REPO[@REVISION]/FILE", address):
        local_file(address)


@pytest.mark.parametrize("page, address", [
    ("https://huggingface.co/ann/digits/blob/main/runs/a.pt", "hf://ann/digits/runs/a.pt"),
    ("https://hf.co/ann/digits/resolve/v1/a%20b.pt?download=true", "hf://ann/digits@v1/a b.pt"),
    ("http://huggingface.co/ann/digits/blob/refs%2Fpr%2F1/a.pt", "hf://ann/digits@refs/pr/1/a.pt"),
    ("www.huggingface.co/ann/digits/tree/main/a.pt", "hf://ann/digits/a.pt"),
    ("hf://ann/digits/blob/main/a.pt", "hf://ann/digits/a.pt")])
def test_the_address_in_a_browser_is_recognised(page, address, hub):
    with refused("must be ", page, f"give {address}"):
        local_file(file_or_address(page))


CONTENT = bytes(range(256)) * 64


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for one large file."""

    def do_HEAD(self):
        self.send_response(200)
        for name, value in {"ETag": f'"{hashlib.sha256(CONTENT).hexdigest()}"',
                            "X-Repo-Commit": "c" * 40, "Content-Length": len(CONTENT)}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture
def find(tmp_path):
    """A function that runs local_file in a new process, by the real client, with a Hub of one file:
    what it printed on stdout and stderr."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = ("from engine.errors import run_main; from weights.hub import local_file; "
            "run_main(lambda args: print(local_file('hf://ann/digits/a.pt')), lambda: None)")

    def run(home=tmp_path / "home", **more):
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, **more,
            env=os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                              "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    yield run
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_damaged_file_of_the_cache_is_named_and_downloaded_again(find):
    done = find()
    assert done.stderr.startswith("downloading hf://ann/digits/a.pt\n"), done.stderr
    path = Path(done.stdout.strip())
    blob = path.resolve()
    assert path.read_bytes() == CONTENT and find().stderr == ""
    blob.write_bytes(CONTENT[:-1] + b"?")
    done = find()
    assert f"{blob} is damaged\ndownloading" in done.stderr, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == CONTENT


@pytest.mark.slow
def test_what_hinders_a_download_is_said(find, tmp_path):
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (8192, 8192))
    for done, reason in ((find(preexec_fn=limit), "File too large"),
                         (find(home=ROOT / "LICENSE.txt"), "Not a directory")):
        assert done.returncode == 2 and done.stderr.splitlines()[-1].count(reason) == 1, done.stderr


def test_the_real_client_finds_cached_files_offline_and_refuses_others(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--ann--digits"
    for revision in "main", "refs/pr/1":
        path = repository / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("c" * 40)
    path = repository / "snapshots" / ("c" * 40) / "runs" / "a.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    for revision in "", "@main", "@refs/pr/1", "@" + "c" * 40:
        assert local_file(f"hf://ann/digits{revision}/runs/a.pt") == path
    for address in ("hf://ann/digits/runs/b.pt", "hf://ann/digits@v2/runs/a.pt",
                    "hf://-ann-/..digits/a.pt"):
        with refused("must be", address):
            local_file(address)


def test_a_machine_without_rank_0s_file_downloads_for_itself(hub, trained):
    os.link(trained, hub.folder / "ann" / "digits" / "a.pt")
    world = SimpleNamespace(on_main=lambda find: Path("on another machine"))
    assert open_checkpoint("hf://ann/digits/a.pt", world)["step"] == 12 and len(hub.asked) == 1


@pytest.mark.slow
def test_of_several_processes_one_asks_the_hub(trained, tmp_path):
    (tmp_path / "script.py").write_text(f"""
import huggingface_hub
huggingface_hub.hf_hub_download = lambda **address: print("asked for a file") or {str(trained)!r}

import sample
sample.main(sample.parse_args())
""")
    printed = run_ranks(tmp_path / "script.py", "--ckpt", "hf://ann/digits/a.pt", "--sample-dir",
                        tmp_path / "out", "--num-fid-samples", 4, "--per-proc-batch-size", 2,
                        processes=2, output=tmp_path / "said")
    assert ["asked for a file" in text for text in printed] == [True, False]
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
