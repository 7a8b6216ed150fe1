"""hf://OWNER/REPO/FILE: downloaded once, found again without a network, refused in one line."""

import os
from pathlib import Path

import pytest
from conftest import call, refused, run_ranks, snapshot
from huggingface_hub import constants

from engine.errors import UserError
from weights.hub import file_or_address, local_file

ADDRESS = "hf://ann/digits/runs/a.pt"


@pytest.fixture
def served(hub):
    """The hub with one file, that of ADDRESS."""
    path = hub.folder / "ann" / "digits" / "runs" / "a.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return hub


def test_a_file_is_downloaded_once(served):
    path = local_file(ADDRESS)
    assert path.name == "a.pt" and path.read_bytes() == b"weights"
    count = len(served.asked)
    assert count > 0 and local_file(ADDRESS) == path and len(served.asked) == count


def test_a_cached_file_needs_no_network(served, monkeypatch):
    path = local_file(ADDRESS)
    served.shutdown()
    served.server_close()
    assert local_file(ADDRESS) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_file(ADDRESS) == path


def test_a_revision_is_asked_for(served):
    assert local_file(f"{ADDRESS}@v1").read_bytes() == b"weights"
    assert any("/resolve/v1/runs/a.pt" in line for line in served.asked)


def test_a_path_is_itself(hub, tmp_path):
    assert local_file(tmp_path / "a.pt") == tmp_path / "a.pt"
    assert file_or_address("a/b.pt") == Path("a/b.pt") and not hub.asked
    assert file_or_address(ADDRESS) == ADDRESS  # a Path would lose a slash


@pytest.mark.parametrize("address", [
    "hf://", "hf://ann", "hf://ann/digits", "hf://ann/digits/", "hf://ann//a.pt", "hf:///digits/a",
    "hf://ann/digits/a.pt@", "hf://a nn/digits/a.pt", "hf://-ann-/..digits/a.pt",
    "hf://ann/digits/a.pt@v1@v2", "hf://ann/digits/../../x"])
def test_a_malformed_address_is_refused(address, served):
    with refused("--init", "hf://OWNER/REPO/FILE", address):
        local_file(address)
    assert not served.asked


@pytest.mark.parametrize(("address", "words"), [
    ("hf://ann/nothing/a.pt", "check OWNER and REPO"), ("hf://ann/digits/b.pt", "check FILE"),
    (f"{ADDRESS}@v2", "what follows the @"), ("hf://ann/secret/a.pt", "ask for access")])
def test_what_the_hub_refuses_is_refused_in_one_line(address, words, served):
    (served.folder / "ann" / "secret").mkdir()
    (served.folder / "ann" / "secret" / "gated").touch()
    with refused("--ckpt", f"got {address}; ", words):  # without the class of the error
        local_file(address)


@pytest.mark.parametrize("offline", [True, False])
def test_a_file_that_is_not_cached_needs_the_network(offline, served, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        served.shutdown()
        served.server_close()
    with pytest.raises(UserError) as error:
        local_file(ADDRESS)
    found, remedy = {
        True: ("HF_HUB_OFFLINE forbids a download", "unset HF_HUB_OFFLINE"),
        False: ("could not be downloaded", "connect this machine")}[offline]
    assert str(error.value) == (
        f"--ckpt must be a file that is cached or that can be downloaded, got {ADDRESS} (it is not "
        f"in Hugging Face's cache, and {found}); {remedy}, or copy the file here and give its path")


def test_a_full_disk_is_refused_in_one_line(served, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with refused("--ckpt", ADDRESS, "(No space left on device); free space"):
        local_file(ADDRESS)


def test_samples_of_an_address_are_those_of_its_file(served, trained, tmp_path):
    os.link(trained, served.folder / "ann" / "digits" / "digits.pt")
    for name, source in (("file", trained), ("address", "hf://ann/digits/digits.pt")):
        call("sample", "--ckpt", source, "--sample-dir", tmp_path / name, "--num-fid-samples", 4)
    assert snapshot(tmp_path / "file") == snapshot(tmp_path / "address")


HUB_OF_TESTS = """
from huggingface_hub import constants

for name, value in {}.items():  # read from the environment when huggingface_hub was imported
    setattr(constants, name, value)

import sample
from engine.errors import run_main

run_main(sample.main, sample.parse_args)
"""


@pytest.mark.slow
def test_of_several_processes_one_downloads(served, trained, tmp_path):
    os.link(trained, served.folder / "ann" / "digits" / "digits.pt")
    (tmp_path / "script.py").write_text(HUB_OF_TESTS.format(served.constants))
    run_ranks(tmp_path / "script.py", "--ckpt", "hf://ann/digits/digits.pt", "--sample-dir",
              tmp_path / "out", "--num-fid-samples", 4, "--per-proc-batch-size", 2, processes=2,
              output=tmp_path / "said")
    asked = [line.split()[0] for line in served.asked if "/resolve/" in line]
    assert asked == ["HEAD", "GET"], served.asked
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
