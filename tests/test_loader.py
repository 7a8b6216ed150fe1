"""The order of the training data, and prefetching by processes and threads."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, save_folder
from soak import HANG_S

from dataset.images import ImageFolder
from dataset.loader import BatchSampler, load_batches, read_images
from engine.errors import UserError

ALONE = SimpleNamespace(rank=0, size=1)
CPU = torch.device("cpu")


def order(start=0, stop=10, **changes):
    return list(BatchSampler(**{"count": 103, "global_batch": 20, "seed": 1, "flip": True,
                                "world": ALONE, **changes}).steps(start, stop))


def test_an_epoch_covers_the_set_once_and_the_next_is_another():
    steps = [rows.tolist() for rows, _ in order()]
    first, second = sum(steps[:5], []), sum(steps[5:], [])
    assert len(set(first)) == len(set(second)) == 100 and first != second
    assert max(first + second) == 102


def test_ranks_share_the_global_batch_of_any_step():
    for rank in range(4):
        part = order(start=3, world=SimpleNamespace(rank=rank, size=4))
        for ours, whole in zip(part, order()[3:], strict=True):
            assert torch.equal(ours[0], whole[0][rank::4])
            assert torch.equal(ours[1], whole[1][rank::4])


def test_half_of_the_images_are_mirrored_if_asked():
    flips = [mirrored for _, mirrored in order(stop=100)]
    assert 900 < torch.cat(flips).sum() < 1100  # 2000 coins: false alarm 1e-5
    assert len({tuple(coins.tolist()) for coins in flips}) > 90  # one of 2**20 for each step
    assert not any(mirrored.any() for _, mirrored in order(flip=False))


def test_fewer_images_than_a_batch_are_refused():
    with refused("--global-batch-size", "19", "20"):
        order(count=19)


class Squares:
    """A data set as a user would write it: no files, no threads. taken: how many steps it had."""

    classes, taken = ["even", "odd"], 0

    def __len__(self):
        return 103

    def batches(self, steps, workers):
        for rows, mirrored in steps:
            self.taken += 1
            yield torch.where(mirrored, -rows, rows) ** 2, rows % 2


@pytest.mark.parametrize("workers, taken", [(0, 1), (2, 3)])
def test_a_data_set_is_a_class_with_batches_which_are_prefetched(workers, taken):
    dataset = Squares()
    served = load_batches(dataset, order(), workers=workers, device=CPU)
    first = next(served)
    time.sleep(0.5)
    assert dataset.taken == taken
    for (x, y), (rows, _) in zip([first, *served], order(), strict=True):
        assert torch.equal(x, rows**2) and torch.equal(y, rows % 2)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_readers_serve_batches_of_any_length_in_order_and_name_the_unreadable(tmp_path, workers):
    path = save_folder(tmp_path / "images") / "a" / "3.png"
    path.write_bytes(path.read_bytes()[:-200])
    images = ImageFolder(tmp_path / "images", 32)
    batches = [[(row, False) for row in rows] for rows in ([0], range(10), [9, 8, 7], [3, 1])]
    served = list(read_images(images.read, batches, workers=workers))
    assert [batch for batch, _ in served] == batches
    for batch, results in served:
        for item, result in zip(batch, results, strict=True):
            if item == (3, False):
                assert isinstance(result, UserError) and "a/3.png" in str(result)
            else:
                assert np.array_equal(result, images.read(item).numpy())
    with refused("a/3.png"):
        list(load_batches(images, order(count=10, global_batch=10, stop=1), workers=workers,
                          device=CPU))


# Reads batches of 6 MB, and kills itself while its two readers go on
KILLED = """
import multiprocessing, os, sys, time
from dataset.images import ImageFolder
from dataset.loader import read_images
images = ImageFolder(sys.argv[1], 256)
served = read_images(images.read, [[(i % 8, False) for i in range(32)]] * 9, workers=2)
print(sum(len(next(served)[1]) for _ in range(4)))
time.sleep(1)  # the readers fill the pipe
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), 9)
"""


# A process that is killed while its reader, forked a moment ago, has not looked around yet
KILLED_AT_ONCE = """
import os, sys, threading, time
from dataset import loader
loader.ignore_signals = lambda: (print(os.getpid(), flush=True), time.sleep(2))
threading.Timer(1, os.kill, (os.getpid(), 9)).start()
list(loader.read_images(str, [["item"]] * 9, workers=1))
"""


def test_a_reader_whose_process_is_killed_at_once_ends(tmp_path):
    """It asked for its parent when that was gone, and waited for the end of another."""
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", KILLED_AT_ONCE], stdout=out, timeout=HANG_S,
                       env={**os.environ, "PYTHONPATH": str(ROOT)})
    reader = Path("/proc", (tmp_path / "out").read_text().strip())
    end = time.monotonic() + HANG_S / 10
    while reader.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert reader.name.isdecimal() and not reader.exists()


@pytest.mark.slow
def test_readers_need_no_shared_memory_and_end_with_a_process_that_is_killed(tmp_path):
    """Docker gives 64 MB, in which a run hung; here it is 1 MB, if this user may make a mount
    namespace. Readers of a killed process hung on the pipe that it emptied no more."""
    save_folder(tmp_path / "images", per_class=4)
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm; exec "$@"', ""]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"]).returncode:
        small = []
    with open(tmp_path / "out", "w") as out:  # no pipe, which the readers would hold open
        subprocess.run([*small, sys.executable, "-c", KILLED, tmp_path / "images"], stdout=out,
                       timeout=HANG_S, env={**os.environ, "PYTHONPATH": str(ROOT)})
    count, *readers = (tmp_path / "out").read_text().split()
    end = time.monotonic() + HANG_S
    while (alive := [pid for pid in readers if Path("/proc", pid).exists()]) and (
            time.monotonic() < end):
        time.sleep(0.1)
    assert int(count) == 128 and len(readers) == 2 and not alive
