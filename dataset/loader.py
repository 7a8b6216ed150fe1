"""The order of the training data, and prefetching.

A data set is a class with

    classes, notes            the names of the labels, in order; lines for the log
    len(dataset)              the number of images
    batches(steps, workers)   yields for each (rows, mirrored) of BatchSampler.steps what training
                              takes: images uint8 (B, 3, H, W) or moments (B, 2, C, ...), and
                              labels (B,) int64 or a nest (dict, tuple) of tensors with B rows, on
                              the CPU
    conditions(rows)          only where these are no labels: such a nest for the samples of these
                              numbers, for pictures and evaluations

It reads ahead with so many workers, or in the caller if they are 0: processes (read_images) suit
reading that holds the GIL, threads (map_ahead) suit reading that waits for the disk.

The order is a function of (seed, step). Every rank takes the rows rank::size of the global batch,
so the data do not depend on the world size, and a resumed run reads nothing of what came before.
"""

import collections
import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import threading
from concurrent.futures.process import BrokenProcessPool

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from engine.distributed import counted_generator
from engine.errors import UserError
from engine.faults import ignore_signals

IMAGES_PER_TASK = 4  # a process reads and sends them at once


class BatchSampler:
    """The order of the images: an epoch is steps_per_epoch = count // global_batch steps of a fresh
    permutation, without its remainder. Raises UserError if the images do not fill one batch."""

    def __init__(self, count, global_batch, *, seed, flip, world):
        if count < global_batch:
            raise UserError(f"--global-batch-size must be at most the number of images, {count}, "
                            f"got {global_batch}; lower it or add images")
        self.count, self.global_batch, self.seed = count, global_batch, seed
        self.flip, self.world = flip, world
        self.steps_per_epoch = count // global_batch

    def steps(self, start, stop):
        """Yields this rank's (rows, mirrored), each (B,), for the steps start .. stop - 1."""
        share = slice(self.world.rank, None, self.world.size)
        for step in range(start, stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if step == start or position == 0:
                order = counted_generator(self.seed, epoch, "order")
                permutation = torch.randperm(self.count, generator=order)
            rows = permutation[position * self.global_batch:][:self.global_batch]
            mirrored = torch.zeros(self.global_batch, dtype=torch.bool)
            if self.flip:
                coin = counted_generator(self.seed, step, "flip")
                mirrored = torch.rand(self.global_batch, generator=coin) < 0.5
            yield rows[share], mirrored[share]


def load_batches(dataset, steps, *, workers, device):
    """Yields the batches of a data set, data and labels (B,) or a nest, on device, for the steps of
    a BatchSampler. With workers two batches are prefetched, in pinned memory if device is a GPU.
    Raises UserError for what cannot be read and for conditions of another number of rows."""
    batches = map(check_rows, dataset.batches(steps, workers))
    if device.type == "cuda":
        batches = (tree_map(torch.Tensor.pin_memory, batch) for batch in batches)
    if workers:
        take = functools.partial(next, batches)  # given None: after the last batch
        ahead = map_ahead(take, itertools.repeat(None), threads=1, depth=2)
        batches = itertools.takewhile(lambda batch: batch is not None, ahead)
    for batch in batches:
        yield tree_map(lambda tensor: tensor.to(device, non_blocking=True), batch)


def check_rows(batch):
    """The batch, (data, y). Raises UserError unless it is a nest of tensors with equal rows."""
    leaves, _ = tree_flatten_with_path(batch)
    rows = len(batch[0])
    for path, leaf in leaves:
        if not isinstance(leaf, torch.Tensor) or leaf.shape[:1] != (rows,):
            what = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise UserError(f"--data-path must give {rows} rows of each condition, as of the data, "
                            f"in tensors, got {what} in y{keystr(path[1:])}; change its batches")
    return batch


def read_images(read, batches, *, workers):
    """Yields (batch, images) for each batch, a list of items; images[i] is read(batch[i]) as a
    uint8 array (3, H, W), or the UserError that it raised.

    Processes read two batches ahead and send images through a pipe: of shared memory Docker gives
    64 MB. Raises UserError if a process is killed.
    """
    if not workers:
        yield from ((batch, [_read(item, read) for item in batch]) for batch in batches)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, initializer=_start_reader,
                                                  initargs=(read,))
    jobs = ((batch, pool.map(_read, batch, chunksize=IMAGES_PER_TASK)) for batch in batches)
    try:
        for batch, images in _ahead(jobs, depth=2):
            yield batch, list(images)
    except BrokenProcessPool as error:
        raise UserError("a process that reads images was killed, perhaps for lack of memory: "
                        "lower --num-workers and repeat the command") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_reader(read):
    """Prepare a reading process. It ends with the process that it reads for, however that ends."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(0)  # the main thread may hang on a full pipe that nobody empties any more

    global _reader
    _reader = read
    ignore_signals()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    threading.Thread(target=follow, daemon=True).start()


def _read(item, read=None):
    """read(item) as an array, or its UserError; by default with the read of _start_reader."""
    try:
        return (read or _reader)(item).numpy()
    except UserError as error:
        return error


def stack_images(images):
    """Images of read_images -> uint8 tensor (B, 3, H, W). Raises the first UserError of them."""
    for image in images:
        if isinstance(image, UserError):
            raise image
    return torch.stack([torch.from_numpy(image) for image in images])


def map_ahead(function, items, *, threads, depth):
    """Yields function(item) for each item, in order; threads work on up to depth items ahead."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for job in _ahead((pool.submit(function, item) for item in items), depth):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # left early: do not compute what nobody takes


def _ahead(jobs, depth):
    """Yields the items of an iterator in order, with depth later items taken from it already."""
    begun = collections.deque()
    for job in jobs:
        begun.append(job)
        if len(begun) > depth:
            yield begun.popleft()
    yield from begun
