"""The benchmarks and examples start, and FLOPs are counted right."""

import importlib
import sys

import pytest
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel

PROGRAMS = sorted(path for folder in ("benchmarks", "examples")
                  for path in (ROOT / folder).glob("*.py"))


@pytest.fixture(autouse=True)
def folders(monkeypatch):
    """The programs import one another from their folder, as when they are run."""
    monkeypatch.setattr(sys, "path", [*sys.path, *{str(path.parent) for path in PROGRAMS}])


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help_answers(path, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(path.stem).parse_args(["--help"])
    assert not stop.value.code and "usage:" in capsys.readouterr().out


def test_flops_of_a_guided_step_are_four_and_a_half_forwards():
    """Forward and backward 3, null pass 1, derivative on a quarter .5; the derivative of views of
    fake tensors once failed."""
    gpu_hours = importlib.import_module("gpu_hours")
    with sdpa_kernel(SDPBackend.MATH):
        forward, step = gpu_hours.flops("DiT-T/4", cfg=3.0)
    assert step / forward == pytest.approx(4.5, abs=0.05)
