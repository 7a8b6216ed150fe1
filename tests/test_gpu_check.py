"""benchmarks/gpu_check.py runs through without a GPU, and its checks hold on one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from soak import HANG_S

PROGRAM = ROOT / "benchmarks" / "gpu_check.py"


def check(program, folder, *parts):
    """(exit code, stdout and stderr) of the program, which writes into folder / "out"."""
    done = subprocess.run([sys.executable, program, "--out", folder / "out", "--parts", *parts],
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=HANG_S, env=os.environ | {"PYTHONPATH": str(folder)})
    return done.returncode, done.stdout


# Parts, and how many of their checks can be made without a GPU; those of what is missing none
GROUPS = [("environment golden faults same_images loading fits", 32), ("golden_compiled", 4),
          ("digits", 1), ("training", 2), ("step_b2 step_xl2 step_imf images fashion", 9),
          ("compiled_b2 compiled_xl2 compiled_imf host", 7)]


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "checks"), GROUPS)
def test_every_part_runs_through_without_a_gpu(parts, checks, tmp_path):
    """Also where packages and Fashion-MNIST are missing."""
    for name in ("diffusers", "pytorch_fid"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    code, said = check(PROGRAM, tmp_path, *parts.split(), "--tiny", "--fashion", tmp_path)
    findings = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    assert code == 0 and sum(finding.get("ok", False) for finding in findings) == checks, said
    report = (tmp_path / "out" / "results.md").read_text()
    assert report.count("\ndone, ") == len(parts.split()) and "FAILED" not in report


def test_every_part_is_tried(monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    gpu_check = importlib.import_module("gpu_check")
    assert {name for parts, _ in GROUPS for name in parts.split()} == set(gpu_check.PARTS)


def test_milliseconds_stand_with_their_kind_of_kernel(monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    gpu_check = importlib.import_module("gpu_check")
    a = torch.ones(500, 500)
    found = gpu_check.kernel_milliseconds(lambda: a @ a)
    assert found["kernels"] and found["matrix products"] > 0.8 * sum(
        found[group] for group in gpu_check.KERNELS)


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_costs_that_part_alone(tmp_path):
    """Its children end with it, and the exit code says so."""
    (tmp_path / "check.py").write_text(f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(PROGRAM.parent)!r})
from gpu_check import main, parse_args, part

@part(limit=60)
def crash(args, out):
    '''a crash'''
    os.kill(os.getpid(), signal.SIGSEGV)

@part(limit=0.5)
def hang(args, out):
    '''a hang'''
    (args.out / "pid").write_text(str(subprocess.Popen(["sleep", "3600"]).pid))
    time.sleep(3600)

@part(limit=60)
def wrong(args, out):
    '''a check that fails'''
    out.add("one is two", 1, ok=1 == 2)

sys.exit(main(parse_args()))
""")
    program, parts = tmp_path / "check.py", ("crash", "hang", "wrong", "faults")
    code, said = check(program, tmp_path, *parts, "--tiny")
    assert code == 1 and "failed, see crash.log" in said and "stopped after 5 s" in said, said
    assert "FAILED wrong: one is two" in said and "steps that AdamW" in said
    process = Path("/proc", (tmp_path / "out" / "pid").read_text(), "stat")
    assert not process.exists() or ") Z " in process.read_text()  # ended, perhaps not reaped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_checks_hold_on_this_gpu(tmp_path):
    code, said = check(PROGRAM, tmp_path, "golden", "golden_compiled", "faults", "same_images")
    assert code == 0, said
