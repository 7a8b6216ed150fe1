"""The log of a run: log.txt, metrics.jsonl and TensorBoard events, written by rank 0."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from engine.files import atomic_file, sync, write_error

# What a config says, beside the options, of the data and of the last start
OF_DATA = ("latent_shape", "scale", "latent_mean", "latent_std", "classes", "num_classes",
           "num_images")
OF_START = ("command", "commit", "torch")


class Log(contextlib.AbstractContextManager):
    """log.txt, metrics.jsonl and TensorBoard events of a run; does nothing unless active. Drops
    records later than ``step``, from which the run resumes. Raises UserError if the disk is full.
    """

    def __init__(self, folder, *, active, step=0):
        self.active, self.folder = active, Path(folder)
        if active:
            with self._writing():
                self.text = open(self.folder / "log.txt", "a", buffering=1,
                                 errors="backslashreplace")
                self._drop_records_after(step)
                self.metrics = open(self.folder / "metrics.jsonl", "a", buffering=1)
                self.events = Events(self.folder, step)

    def _drop_records_after(self, step):
        """Also drop damaged lines: a crash damages only lines later than the last checkpoint."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            records, damaged = read_records(path)
            if damaged:
                self.say(f"damaged lines of {path.name}, dropped: {damaged}")
            with atomic_file(path) as temporary:
                temporary.write_text("".join(f"{json.dumps(record)}\n" for record in records
                                             if record["step"] <= step))

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise write_error(error.filename or self.folder, error) from error

    def say(self, line):
        """Write one line to stderr and log.txt."""
        if self.active:
            tqdm.write(line, file=sys.stderr)
            with self._writing():
                self._write(line)

    def _write(self, line):
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def record(self, step, **values):
        """Write one object to metrics.jsonl, and each of its numbers as a TensorBoard scalar."""
        if self.active:
            with self._writing():
                self.metrics.write(json.dumps({"step": step, **values}) + "\n")
                self.events.write(step=step, summary={"value": [
                    {"tag": name, "simple_value": value} for name, value in values.items()
                    if not isinstance(value, str)]})

    def has(self, step, name, value):
        """Whether this value of this name is recorded for this step."""
        return self.active and any(record["step"] == step and record.get(name) == value
                                   for record in read_records(self.folder / "metrics.jsonl")[0])

    def to_disk(self):
        """Wait until text and metrics would survive a power cut."""
        if self.active:
            with self._writing():
                for path in (self.text.name, self.metrics.name, self.folder):
                    sync(path)

    def __exit__(self, kind, error, _):
        """Close all files; an error that ends the run becomes the last line of log.txt."""
        if self.active:
            with contextlib.suppress(OSError) if error else self._writing():
                if error:
                    self._write(f"ended by {kind.__name__}: {' '.join(str(error).split())}")
                for file in (self.text, self.metrics, self.events.file):
                    file.close()


def read_records(path):
    """(records, count of damaged lines) of a metrics.jsonl. Raises OSError."""
    lines, records = Path(path).read_bytes().splitlines(), []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # not JSON
            record = json.loads(line)
            step = record.get("step") if isinstance(record, dict) else None
            if type(step) is int and 0 <= step < 2**63:
                records.append(record)
    return records, len(lines) - len(records)


class Events:
    """A TensorBoard file. On a full disk SummaryWriter's thread would print a traceback."""

    def __init__(self, folder, step):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.file, self.make = open(folder / name, "ab", buffering=0), Event
        self.writer = RecordWriter(self.file)
        self.write(file_version="brain.Event:2")
        if step:  # readers drop what an older file says of later steps
            self.write(step=step + 1, session_log={"status": "START"})

    def write(self, **fields):
        """Write an event at once."""
        self.writer.write(self.make(wall_time=time.time(), **fields).SerializeToString())


def describe_environment(world):
    """The first lines of a log: command, commit, versions and hardware."""
    hardware = (torch.cuda.get_device_name(world.device) if world.device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} threads")
    return [
        f"command: {' '.join(sys.argv)}",
        f"commit {code_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        f"{world.size} process(es) on {hardware}, precision {world.precision}"]


@functools.cache  # the log and the config want it
def code_version():
    """The commit of this repository, and whether files differ from it; "unknown" without git."""
    folder, commit = Path(__file__).parent.parent, ""
    with contextlib.suppress(OSError):  # git is not needed to train
        commit = subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout.strip()
    return commit or "unknown"
