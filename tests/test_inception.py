"""The file of Inception's weights."""

import torch
from conftest import refused

from engine.distributed import World
from metrics.inception import build_inception, load_inception

ALONE = World(0, 1, torch.device("cpu"), "fp32")
MEAN = "Conv2d_1a_3x3.bn.running_mean"


def test_a_weight_file_that_does_not_serve_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    whole = build_inception().to_empty(device="cpu").state_dict()
    torch.save(whole | {MEAN: whole[MEAN].char()}, tmp_path / "integers.pth")
    for name in ("other.pth", "torn.pth", "missing.pth", "integers.pth"):
        with refused("--weights", name):
            load_inception(tmp_path / name, ALONE)


def test_a_word_comes_before_weights_are_downloaded_and_the_cause_if_they_are_not(
        tmp_path, monkeypatch, capsys):
    def fail(url, path):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with refused("no network", "pt_inception-2015-12-05-6726825d.pth", "https://",
                 tmp_path, "evaluate_fid.py --weights"):
        load_inception(None, ALONE)
    assert capsys.readouterr().err.startswith("downloading https://")
