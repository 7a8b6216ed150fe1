"""hf://OWNER/REPO[@REVISION]/FILE: downloaded once, found again without a network."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import refused, run_ranks

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
    with refused("must be", "hf://ann/digits@v2/runs/a.pt", "404 Client Error.", "Entry Not Found"):
        local_file("hf://ann/digits@v2/runs/a.pt")


@pytest.mark.parametrize("address", [
    "hf://", "hf://ann/digits/", "hf://ann//a.pt", "hf:///digits/a", "hf://ann/digits@/a.pt",
    "hf://ann/digits/a.pt@v1", "hf://a nn/digits/a.pt"])
def test_a_malformed_address_is_refused(address, hub):
    with refused("must be", "hf://OWNER/REPO[@REVISION]/FILE", address):
        local_file(address)


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
