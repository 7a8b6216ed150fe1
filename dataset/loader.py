"""The order of the training data, and prefetching.

A data set is a class with

    classes                     the names of the labels, in order
    len(dataset)                the number of images
    batches(sampler, workers)   for each (rows, mirrored) of the sampler, in order: what training
                                takes of these rows, images uint8 (B, 3, H, W) or moments
                                (B, 2, C, h, w), and their labels (B,) int64, on the CPU

The data set decides how its workers read ahead: processes (read_images) suit reading that holds the
GIL, threads (map_ahead) suit reading that waits for the disk; with workers = 0 it reads in the
caller. dataset/images.py and dataset/latents.py are examples of a few lines each.

The order is a function of (seed, step). Every rank computes the rows of the global batch and takes
the rows rank::size of it, so the data do not depend on the world size, and a resumed run reads
nothing of what came before.
"""

import collections
import concurrent.futures
import itertools
import math
import os
import threading
import time
from concurrent.futures.process import BrokenProcessPool

import torch

from engine.distributed import counted_generator
from engine.errors import UserError
from engine.faults import ignore_signals

IMAGES_PER_TASK = 4  # at most; a process reads and sends them at once


class BatchSampler:
    """Yields this rank's (rows, mirrored), each (B,), for the steps start .. stop - 1.

    An epoch is count // global_batch steps of a fresh permutation; the remainder is left out.
    Raises UserError if the images do not fill one batch.
    """

    def __init__(self, count, global_batch, *, seed, flip, world, start=0, stop=0):
        if count < global_batch:
            raise UserError(f"--global-batch-size must be at most the number of images, {count}, "
                            f"got {global_batch}; lower it or add images")
        self.count, self.global_batch, self.seed = count, global_batch, seed
        self.start, self.stop, self.flip, self.world = start, stop, flip, world
        self.steps_per_epoch = count // global_batch

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if step == self.start or position == 0:
                order = counted_generator(self.seed, epoch, "order")
                permutation = torch.randperm(self.count, generator=order)
            rows = permutation[position * self.global_batch:][:self.global_batch]
            mirrored = torch.zeros(self.global_batch, dtype=torch.bool)
            if self.flip:
                coin = counted_generator(self.seed, step, "flip")
                mirrored = torch.rand(self.global_batch, generator=coin) < 0.5
            share = slice(self.world.rank, None, self.world.size)
            yield rows[share], mirrored[share]


def load_batches(dataset, sampler, *, workers, device):
    """Yields the batches of a data set on device: data, labels (B,) int64.

    data: uint8 images (B, 3, H, W) or moments (B, 2, C, h, w), as the data set has them. With
    workers the next two batches are prefetched, in pinned memory if device is a GPU. Raises
    UserError for what cannot be read.
    """
    batches = dataset.batches(sampler, workers)
    if device.type == "cuda":
        batches = ([tensor.pin_memory() for tensor in batch] for batch in batches)
    for batch in prefetch(batches) if workers else batches:
        yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)


def read_images(read, batches, *, workers):
    """Yields (batch, images) for each batch, a list of items; images[i] is read(batch[i]) as a
    uint8 array (3, H, W), or the UserError that it raised.

    Processes read two batches ahead; threads would compete with the caller for the GIL.
    Images come through a pipe and not through shared memory, of which Docker gives 64 MB. Raises
    UserError if a process is killed.
    """
    if not workers:
        yield from ((batch, _read_all(batch, read)) for batch in batches)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, initializer=_start_reader,
                                                  initargs=(read,))

    def submit(batch):
        size = max(1, min(IMAGES_PER_TASK, math.ceil(len(batch) / workers)))
        return batch, [pool.submit(_read_all, batch[i:i + size])
                       for i in range(0, len(batch), size)]

    try:
        for batch, tasks in _ahead(map(submit, batches), depth=2):
            yield batch, [image for task in tasks for image in task.result()]
    except BrokenProcessPool as error:
        raise UserError("a process that reads images was killed, perhaps for lack of memory: "
                        "lower --num-workers and repeat the command") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_reader(read):
    """Prepare a reading process. It ends with the process that it reads for, however that ends."""
    def follow(parent):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)  # the main thread may hang on a full pipe that nobody empties any more

    global _reader
    _reader = read
    ignore_signals()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()


def _read_all(items, read=None):
    """[read(item)] as arrays, by default with the function that _start_reader was given.

    A UserError is returned: it concerns one image and not the batch.
    """
    images = []
    for item in items:
        try:
            images.append((read or _reader)(item).numpy())
        except UserError as error:
            images.append(error)
    return images


def stack_images(images):
    """What read_images yields, arrays (3, H, W) and UserErrors -> uint8 tensor (B, 3, H, W).

    Raises the first UserError among them.
    """
    for image in images:
        if isinstance(image, UserError):
            raise image
    return torch.stack([torch.from_numpy(image) for image in images])


def prefetch(iterable):
    """Yields the items of an iterable; a thread takes them, two ahead."""
    iterator, end = iter(iterable), object()
    items = map_ahead(lambda _: next(iterator, end), itertools.repeat(None), threads=1, depth=2)
    yield from itertools.takewhile(lambda item: item is not end, items)


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
