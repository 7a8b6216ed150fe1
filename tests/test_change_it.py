"""README's section "Change it": its network trains and samples, from a class and a row alone."""

import re

import pytest
from conftest import ROOT, call, tiny
from PIL import Image

import models


@pytest.fixture
def network(monkeypatch):
    """The code block of the section, run as if it stood at the end of models.py, where a reader may
    have put it already."""
    section = (ROOT / "README.md").read_text().split("## Change it")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    name, = re.findall(r'DiT_models\["(.*?)"\] =', code)
    monkeypatch.setitem(models.DiT_models, name, None)  # takes it back in the end
    exec(code, vars(models))
    return name


def test_a_class_and_a_row_are_another_network(network, digits, tmp_path):
    """sample.py once reached into the last layer of a DiT, train.py into its blocks."""
    options = tiny(digits, tmp_path / "run")
    options[options.index("--model") + 1] = network
    call("train", *options, "--max-steps", 4, "--cfg", 2, "--kappa", 0.5, "--sample-every", 4)
    call("train", *options, "--max-steps", 6, "--cfg", 2, "--kappa", 0.5, "--sample-every", 4)
    call("sample", "--ckpt", tmp_path / "run" / "checkpoints" / "0000006.pt", "--sample-dir",
         tmp_path / "samples", "--num-fid-samples", 3, "--num-sampling-steps", 2)
    assert Image.open(tmp_path / "samples" / "000002.png").size == (8, 8)
