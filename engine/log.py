"""The log of a run: log.txt, metrics.jsonl and TensorBoard, written by rank 0."""

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from engine.files import atomic_file, sync_file, sync_folder, unwritable


class Log:
    """log.txt, metrics.jsonl and TensorBoard events of a run; active on rank 0 only.

    Records later than ``step``, left by a run that ended after its last checkpoint, are dropped:
    they are about to be written again. Damaged lines, such as one cut short by a crash, move to
    metrics.damaged.txt. Raises UserError where the disk is full.
    """

    def __init__(self, folder, *, active, step=0):
        self.active = active
        if not active:
            return
        self.folder = folder = Path(folder)
        with self._writing():
            self.text = open(folder / "log.txt", "a", buffering=1, errors="backslashreplace")
            self._drop_records(step)
            self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)
            self.board = Board(folder, step)

    def _drop_records(self, step):
        """Those later than step and the damaged ones, which are kept elsewhere."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept, damaged = [], []
        for line in path.read_bytes().splitlines():
            found = _step_of(line)
            if found is None or found <= step:
                (damaged if found is None else kept).append(line + b"\n")
        if damaged:
            elsewhere = path.with_name("metrics.damaged.txt")
            with open(elsewhere, "ab") as file:
                file.writelines(damaged)
            sync_file(elsewhere)
            self.say(f"damaged lines of {path.name}, moved to {elsewhere.name}: {len(damaged)}")
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"".join(kept))

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise unwritable(error.filename or self.folder, error) from error

    def say(self, line):
        """One line, to stderr and log.txt."""
        if self.active:
            with contextlib.suppress(OSError):  # a terminal that was closed
                tqdm.write(line, file=sys.stderr)
            with self._writing():
                self._write(line)

    def _write(self, line):
        self.text.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def record(self, step, **values):
        """One metrics.jsonl object and one TensorBoard scalar per number."""
        if self.active:
            with self._writing():
                self.metrics.write(json.dumps({"step": step, **values}) + "\n")
                self.board.record(step, **{name: value for name, value in values.items()
                                           if not isinstance(value, str)})

    def to_disk(self):
        """What was recorded so far outlasts a power cut: called before a checkpoint is written."""
        if self.active:
            with self._writing():
                for file in (self.text, self.metrics, self.board.file):
                    os.fsync(file.fileno())
                sync_folder(self.folder)

    def has(self, step, name):
        """Whether a value of this name was recorded for this step."""
        if not self.active:
            return False
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return any(name in json.loads(line) for line in lines if _step_of(line) == step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        """Closes all; an error that ends the run is the last line of log.txt."""
        if not self.active:
            return
        with contextlib.suppress(OSError) if error else self._writing():
            if error:
                reason = next(iter(str(error).splitlines()), "")
                self._write(f"ended by {kind.__name__}: {reason}")
            for file in (self.text, self.metrics, self.board.file):
                file.close()


class Board:
    """TensorBoard's event file of a run that starts after ``step``, each record written at once.

    TensorBoard's own writer has a thread, which meets a full disk with a traceback.
    """

    def __init__(self, folder, step):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(Path(folder, name), "ab")
        self.writer = RecordWriter(self.file)
        self.write(file_version="brain.Event:2")
        if step:  # later records are of a run that ended after its last checkpoint
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self.write(step=step + 1, session_log=start)

    def record(self, step, **values):
        """One scalar per number."""
        scalars = [self.summary.Value(tag=name, simple_value=value)
                   for name, value in values.items()]
        self.write(step=step, summary=self.summary(value=scalars))

    def write(self, **fields):
        event = self.event(wall_time=time.time(), **fields)
        self.writer.write(event.SerializeToString())
        self.file.flush()


def _step_of(line):
    """The step of a metrics line; None for a damaged one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def describe_environment(world):
    """The first lines of a log: what runs, where, on what."""
    folder = Path(__file__).parent.parent
    commit = "unknown"
    with contextlib.suppress(OSError):  # git is not needed to train
        commit = subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout.strip() or commit
    hardware = (torch.cuda.get_device_name(world.device) if world.device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} threads")
    return [
        f"command: {' '.join(sys.argv)}",
        f"commit {commit}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        f"{world.size} process(es) on {hardware}, precision {world.precision}",
    ]
