"""How scripts end where nobody reads what they say."""

import io
import os
import re
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, call, load_state, refused, tiny

from engine.distributed import start_processes
from engine.errors import run_main

SCRIPT = r"""
import sys, warnings
from tqdm import tqdm
from engine.errors import run_main
def main(args):
    open("file", "w").write("a file")
    for _ in tqdm(range(3), mininterval=0):
        warnings.warn("a warning")
        tqdm.write("a line", file=sys.stderr)
    print("result", "n\udcff", "x" * 9999, flush=True)
    open("done", "w").write("done")
run_main(main, lambda: None)
"""


def run(command, folder, **more):
    """Run a command of sh, in a folder, where $RUN is Python with SCRIPT."""
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, text=True,
                          capture_output=True, errors="replace",
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable,
                                            "RUN": f"{sys.executable} script.py"}, **more)


@pytest.mark.parametrize("output", [
    "2>&1 | head -c 1", "2>&1 >file2 | true", "| true", ">&-", "2>&-", ">&- 2>&- <&-",
    "2>/dev/full"])
def test_output_that_nobody_reads_ends_nothing(output, tmp_path):
    """A run ended at its progress bar, and what was closed went into the first file opened."""
    done = run(f"$RUN {output}", tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout, done
    assert (tmp_path / "done").exists() and (tmp_path / "file").read_text() == "a file"


def test_a_result_that_a_full_disk_does_not_take_is_an_error(tmp_path):
    done = run("$RUN >/dev/full", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "script.py: error: cannot write the result to stdout: No space" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("output", ["2>&1 | head -n 1", ">&- 2>&-"])
def test_training_goes_on_without_a_reader(output, digits, tmp_path):
    words = " ".join(map(str, tiny(digits, tmp_path / "run")))
    done = run(f"$PYTHON {ROOT}/train.py {words} --max-steps 12 {output}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_state(tmp_path / "run", 12)["step"] == 12
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert all(re.match("20..-..-.. ..:..:.. .", line) for line in lines) and len(lines) > 5


def test_results_are_printed_whatever_their_names(monkeypatch, tmp_path):
    """sample.py and encode_imagenet.py ended with a traceback after all the work was done."""
    name = os.fsdecode(b"n\xff")
    with open(tmp_path / "out", "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        run_main(lambda args: print(name), lambda: None)
        assert sys.stdout is out
    assert (tmp_path / "out").read_bytes() == os.fsencode(name) + b"\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as of a notebook
    run_main(lambda args: print("text"), lambda: None)
    assert sys.stdout.getvalue() == "text\n"


@pytest.mark.parametrize("variables", [
    {"SLURM_NTASKS": "2"}, {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"},
    {"OMPI_COMM_WORLD_SIZE": "8"}, {"PMI_SIZE": "2"}])
def test_several_processes_without_torchrun_are_refused(variables, monkeypatch):
    """Each trained alone, or fought for the folder."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refused("torchrun", "unset"), start_processes():
        pass
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # of a job with several tasks this is one
    if "SLURM_NTASKS" in variables:
        with start_processes() as world:
            assert world.size == 1


def test_a_run_in_a_thread_takes_no_signals(digits, tmp_path):
    """As of a notebook or a sweep: only the main thread may set handlers."""
    thread = threading.Thread(target=call, args=(
        "train", *tiny(digits, tmp_path / "run"), "--max-steps", 2))
    thread.start()
    thread.join()
    assert load_state(tmp_path / "run", 2)["step"] == 2
