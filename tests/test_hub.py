"""hf://OWNER/REPO[@REVISION]/FILE: downloaded once, found again without a network."""

import errno
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
from conftest import ROOT, flip_bit, refused, run_ranks
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from engine.checkpoint import load_checkpoint
from weights.foreign_files import read_weights
from weights.hub import file_or_address, local_file, open_checkpoint, read_file

ADDRESS = "hf://ann/digits/runs/a.pt"


def test_a_file_is_downloaded_once_for_each_revision(hub):
    path = hub.folder / "ann" / "digits" / "runs" / "a.pt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    for address in (ADDRESS, ADDRESS.replace("digits", "digits@v1")) * 2:
        assert local_file(address).read_bytes() == b"weights"
    assert hub.asked == [("ann/digits", "runs/a.pt", revision) for revision in (None, "v1")]
    assert file_or_address(ADDRESS) == ADDRESS  # a Path would lose a slash
    with refused("must be", "got hf://ann/digits@v2/runs/a.pt (404 Client Error. Entry Not Found)"):
        local_file("hf://ann/digits@v2/runs/a.pt")


@pytest.mark.parametrize("address", [
    "hf://", "hf://ann/digits/", "hf://ann//a.pt", "hf:///digits/a", "hf://ann/digits@/a.pt",
    "hf://ann/digits/a.pt@v1", "hf://a nn/digits/a.pt", "hf://ann/digits@../../x/a.pt",
    "hf://../../a.pt", "hf://ann/../a.pt", "hf://ann/digits/../a.pt", "hf://ann/digits/runs/..",
    "hf://ann/digits@./a.pt", "https://example.com/a.pt", "s3://ann/a.pt"])
def test_a_malformed_address_is_refused(address, hub):
    with refused("must be", "hf://OWNER/REPO[@REVISION]/FILE", address):
        local_file(address)


@pytest.mark.parametrize(("page", "address"), [
    ("https://huggingface.co/ann/digits/blob/main/runs/a.pt", ADDRESS),
    ("https://huggingface.co/ann/digits/resolve/main/runs/a.pt?download=true", ADDRESS),
    ("http://www.hf.co/ann/digits/tree/v1/runs/a.pt#top", "hf://ann/digits@v1/runs/a.pt"),
    ("huggingface.co/ann/digits/raw/refs%2Fpr%2F1/a%2B.pt", "hf://ann/digits@refs/pr/1/a+.pt"),
    ("https://huggingface.co/ann/digits", "hf://ann/digits/FILE"),
    ("https://huggingface.co/ann/digits/tree/main/", "hf://ann/digits/FILE"),
    ("hf://ann/digits/blob/main/runs/a.pt", ADDRESS)])
def test_the_address_that_a_browser_shows_is_answered_by_ours(page, address, hub):
    with refused("must", f"got {page}", f"; give {address}") as error:
        local_file(file_or_address(page))
    assert str(error.value).endswith(address)


@pytest.mark.parametrize("cause", [
    OSError(errno.EFBIG, "File too large"), NotADirectoryError(20, "Not a directory", "hf/token"),
    OSError(errno.ENOSPC, "No space left"), ConnectionError("Name or service not known")])
def test_what_hinders_a_download_is_said_after_a_word_that_it_is_tried(
        hub, monkeypatch, capsys, cause):
    """The client tries for half a minute without a network, and then tells to check it."""
    def fail(**place):
        if place.get("local_files_only"):
            raise LocalEntryNotFoundError("not cached")
        if isinstance(cause, ConnectionError):
            raise LocalEntryNotFoundError("check your connection") from cause
        raise cause

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with refused("must be cached or downloadable", ADDRESS, cause, "HF_HOME"):
        local_file(ADDRESS)
    assert capsys.readouterr().err == f"downloading {ADDRESS}\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """cache.fill puts a content into Hugging Face's cache; again: what the next download brings.
    The cache names a file by its SHA-256, as the real one does. cache.asked counts downloads."""
    cache = SimpleNamespace(asked=0, link=tmp_path / "snapshot.pt")

    def fill(content, again=None):
        cache.blob = tmp_path / hashlib.sha256(content).hexdigest()
        cache.blob.write_bytes(content)
        cache.link.symlink_to(cache.blob)

        def download(*, force_download=False, **place):
            if force_download:
                cache.asked += 1
                cache.blob.unlink()
                cache.blob.write_bytes(content if again is None else again)
            return str(cache.link)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    cache.fill = fill
    return cache


ALONE = SimpleNamespace(on_main=lambda find: find())


def test_a_damaged_file_of_the_cache_is_named_and_downloaded_again(cache, trained, capsys):
    cache.fill(trained.read_bytes())
    flip_bit(cache.blob, 10**6)
    assert open_checkpoint(ADDRESS, ALONE)["step"] == 12 and cache.asked == 1
    assert f"{cache.blob} seems torn or damaged\ndownloading {ADDRESS}" in capsys.readouterr().err
    assert open_checkpoint(ADDRESS, ALONE)["step"] == 12 and cache.asked == 1


def test_what_is_damaged_on_the_hub_is_downloaded_twice_and_no_more(cache, trained):
    cache.fill(trained.read_bytes(), again=trained.read_bytes()[:5000])
    flip_bit(cache.blob, 10**6)
    with refused("must", ADDRESS, cache.blob):
        open_checkpoint(ADDRESS, ALONE)
    assert cache.asked == 1


def test_a_whole_file_that_does_not_serve_is_not_downloaded_again(cache, tmp_path):
    cache.fill(b"no checkpoint")
    with refused("must", cache.link):
        open_checkpoint(ADDRESS, ALONE)
    assert not cache.asked


def test_a_damaged_file_without_checksums_is_known_by_its_name_in_the_cache(
        cache, trained, tmp_path):
    save_file(load_checkpoint(trained)["ema"], tmp_path / "theirs")
    cache.fill((tmp_path / "theirs").read_bytes())
    whole = read_file(ADDRESS, read_weights).tensors["pos_embed"].clone()
    flip_bit(cache.blob, -1)
    with refused("be whole", cache.blob):
        read_weights(cache.link)
    assert read_file(ADDRESS, read_weights).tensors["pos_embed"].equal(whole) and cache.asked == 1


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


FIND = """
from engine.errors import BadValue, run_main
from weights.hub import read_file
def read(path):
    if path.read_bytes()[-1:] == b"?":
        raise BadValue("must be whole")
    print(path)
run_main(lambda args: read_file('hf://ann/digits/a.pt', read), lambda: None)
"""


@pytest.fixture
def find(tmp_path):
    """A function that reads the file of a Hub of one file by the real client, in a new process."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(home=tmp_path / "home", **more):
        return subprocess.run(
            [sys.executable, "-c", FIND], cwd=ROOT, text=True, capture_output=True, **more,
            env=os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                              "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    yield run
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_real_client_names_a_damaged_file_and_downloads_it_again(find):
    done = find()
    assert done.stderr.startswith("downloading hf://ann/digits/a.pt\n"), done.stderr
    path = Path(done.stdout.strip())
    blob = path.resolve()
    assert path.read_bytes() == CONTENT and find().stderr == ""
    blob.write_bytes(CONTENT[:-1] + b"?")
    done = find()
    assert f"{blob} seems torn or damaged\ndownloading" in done.stderr, done.stderr
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
