"""How scripts end where nobody reads what they say."""

import io
import os
import re
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, call, load_state, refused, tiny
from soak import Child

from engine.distributed import start_processes
from engine.errors import _Output, run_main

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
    (folder / "printing.py").write_text(SCRIPT)
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, text=True,
                          capture_output=True, errors="replace",
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable,
                                            "RUN": f"{sys.executable} printing.py"}, **more)


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
    assert "printing.py: error: cannot write the result to stdout: No space" in done.stderr


def test_output_that_does_not_wait_is_waited_for():
    """As of a terminal that another program has changed: once it was full, to print was an error.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Timer(0.1, lambda: open(reader, "rb").read(2**20)).start()
    assert io.BufferedWriter(_Output(writer, "w")).write(bytes(2**20)) == 2**20


def test_a_stream_that_is_used_after_its_script_writes_nowhere(tmp_path):
    """A progress bar that was closed late wrote to the number of another file, and /dev/null took
    that file's place: fonts went missing."""
    kept = []
    with open(tmp_path / "output", "w") as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", output)
        run_main(lambda args: kept.append(sys.stderr), lambda: None)
        number = output.fileno()
    with open(ROOT / "README.md", "rb", buffering=0) as other:
        assert other.fileno() == number
        kept[0].write("late\n")
        assert other.read(1) == b"#"


# A script, whose name is the second word, with its streams as a shell leaves them
OTHER_STREAMS = """
import importlib, os, sys
from engine.errors import run_main
how, script = sys.argv[1:3]
sys.argv[:3] = [script + ".py"]
if how == "closed":
    os.close(1), os.close(2)
    sys.stdout = sys.stderr = None
elif how == "unread":
    reader, writer = os.pipe()
    os.close(reader), os.dup2(writer, 1), os.dup2(writer, 2)
else:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
module = importlib.import_module(script)
run_main(module.main, module.parse_args)
"""


@pytest.fixture
def scripts(digits, trained, tmp_path):
    """The options of each script for little work, and a file that it makes."""
    out, pixels = tmp_path / "out", ["--image-size", 8, "--num-workers", 0]
    return {
        "train": ([*tiny(digits, out), "--max-steps", 3], out / "checkpoints" / "0000003.pt"),
        "sample": (["--ckpt", trained, "--num-fid-samples", 4, "--sample-dir", out],
                   tmp_path / "out.npz"),
        "encode_imagenet": (["--data-path", digits, "--out-path", out, "--vae", "none", *pixels],
                            out / "dataset.json"),
        "evaluate_fid": (["--samples", digits, "--make-ref", tmp_path / "ref.npz", "--protocol",
                          "pixels", *pixels], tmp_path / "ref.npz"),
        "convert_checkpoint": (["--in", trained, "--out", tmp_path / "out.pt"],
                               tmp_path / "out.pt"),
        "plot": ([trained.parent.parent, "--out", tmp_path / "out.png"], tmp_path / "out.png")}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "unread", "full"])
@pytest.mark.parametrize("script", ["train", "sample", "encode_imagenet", "evaluate_fid",
                                    "convert_checkpoint", "plot"])
def test_every_script_does_its_work_without_a_reader(script, how, scripts, tmp_path):
    options, made = scripts[script]
    (tmp_path / "streams.py").write_text(OTHER_STREAMS)
    code, said = Child(tmp_path / "streams.py", how, script, *options,
                       output=tmp_path / "said").wait()
    assert code == 0 and made.stat().st_size, said
    assert "Error" not in said and bool(said) == (how == "full")  # which leaves stdout as it is
    if script == "train":
        assert load_state(tmp_path / "out", 3)["step"] == 3
        lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
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


def test_names_are_utf8_in_every_locale(tmp_path):
    """--classes and --init did not find what was written elsewhere, and other runs were it."""
    (tmp_path / "script.py").write_text(
        "import sys; from engine.errors import run_main\n"
        "def main(args): print(*sys.argv[1:], sys.stdout.encoding)\n"
        "run_main(main, lambda: None)")
    done = run("LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 $PYTHON script.py 'é 日'", tmp_path)
    assert done.stdout == "é 日 utf-8\n", done.stderr


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
STEP = SLURM | {"SLURM_STEP_ID": "0"}


@pytest.mark.parametrize("variables", [
    {"SLURM_NTASKS": "2"}, {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"}, SLURM, STEP,
    {"OMPI_COMM_WORLD_SIZE": "8"}, {"PMI_SIZE": "2"}])
def test_several_processes_without_torchrun_are_refused(variables, monkeypatch):
    """Each trained alone, or fought for the folder."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with refused("torchrun", "WORLD_SIZE=1"), start_processes():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with start_processes() as world:
        assert world.size == 1


@pytest.mark.parametrize("variables", [
    {"SLURM_NTASKS": "1"}, STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1
    SLURM | {"ENVIRONMENT": "BATCH"},  # the shell of sbatch
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}])  # the shell of salloc
def test_one_process_of_a_job_with_several_tasks_works(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with start_processes() as world:
        assert world.size == 1


def test_a_run_in_a_thread_takes_no_signals(digits, tmp_path):
    """As of a notebook or a sweep: only the main thread may set handlers."""
    thread = threading.Thread(target=call, args=(
        "train", *tiny(digits, tmp_path / "run"), "--max-steps", 2))
    thread.start()
    thread.join()
    assert load_state(tmp_path / "run", 2)["step"] == 2
