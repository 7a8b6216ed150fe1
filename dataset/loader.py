"""The order of the training data, and reading ahead.

The order is a function of (seed, step). Every process computes the rows of the global batch and
takes the rows rank::size, so a run sees the same data with any number of processes, and a resumed
run reads nothing of what came before.
"""

import collections
import concurrent.futures
import functools
import itertools
import math
import os
import threading
import time
import warnings

import torch
from torch.utils.data import DataLoader

from dataset.latents import LatentShards
from engine.distributed import counted_generator
from engine.faults import ignore_signals
from engine.options import UserError

PIECE = 4  # images that a reading process hands over at once


class Batches:
    """Yields (rows, mirrored) of this process for the steps start .. stop - 1.

    An epoch is count // global_batch steps over a fresh permutation; the rest of it is left out.
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
        known, permutation = None, None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != known:
                order = counted_generator(self.seed, epoch, "order")
                known, permutation = epoch, torch.randperm(self.count, generator=order)
            rows = permutation[position * self.global_batch:][:self.global_batch]
            mirrored = torch.zeros(self.global_batch, dtype=torch.bool)
            if self.flip:
                coin = counted_generator(self.seed, step, "flip")
                mirrored = torch.rand(self.global_batch, generator=coin) < 0.5
            share = slice(self.world.rank, None, self.world.size)
            yield rows[share], mirrored[share]


def load_batches(dataset, batches, *, workers, device):
    """Iterate over the batches (rows, mirrored) of a dataset, on device: tensors as it serves them.

    Workers read ahead, so neither a slow image nor a cold disk holds up the caller: processes for
    images, threads for latents, which to hand from process to process costs ten times as much as
    to read. Raises UserError for what a worker could not read.
    """
    def host(batch):
        return [tensor.pin_memory() if device.type == "cuda" else tensor for tensor in batch]

    if not isinstance(dataset, LatentShards):
        items = (list(zip(rows.tolist(), mirrored.tolist())) for rows, mirrored in batches)
        served = (host((stack_images(images), dataset.labels[[row for row, _ in batch]]))
                  for batch, images in read_images(dataset.read, items, workers=workers))
        served = prefetch(served) if workers else served
    elif workers:
        served = map_ahead(lambda batch: host(dataset[batch]), batches, threads=workers,
                       depth=2 * workers)
    else:
        served = (host(dataset[batch]) for batch in batches)
    for batch in served:
        yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)


def read_images(read, batches, *, workers):
    """Yields (batch, images) for each batch, a list of items; images[i] is read(batch[i]), uint8
    (3, H, W), or the UserError that it raised.

    Processes read two batches ahead: threads would take turns with the caller's Python. They hand
    over arrays, through pipes. PyTorch would put tensors into shared memory, of which a container
    has 64 MB by default.
    """
    if not workers:
        return ((batch, _read_piece(read, batch)) for batch in batches)
    batches, begun = iter(batches), collections.deque()
    first = next(batches, [])

    def pieces():
        for batch in itertools.chain([first] if first else [], batches):
            begun.append(batch)
            yield from (batch[i:i + PIECE] for i in range(0, len(batch), PIECE))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of more readers than cores, which wait for disks
        pieces_read = iter(DataLoader(
            _Itself(), sampler=pieces(), batch_size=None, num_workers=workers,
            collate_fn=functools.partial(_read_piece, read), worker_init_fn=_begin,
            prefetch_factor=max(2, math.ceil(2 * len(first) / PIECE / workers))))
    return _regrouped(begun, itertools.chain.from_iterable(pieces_read))


def _begin(worker):
    """A reader ends with the process that it reads for, however that ends."""
    def follow(parent):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)  # it may hang on a full pipe that nobody empties any more

    ignore_signals(worker)
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()


class _Itself:
    """A data set for DataLoader: what stands at a place is the place."""

    def __getitem__(self, place):
        return place


def _read_piece(read, items):
    """[read(item)], arrays or UserErrors: raised, these would be wrapped in a traceback."""
    found = []
    for item in items:
        try:
            found.append(read(item).numpy())
        except UserError as error:
            found.append(error)
    return found


def _regrouped(begun, images):
    for image in images:
        batch = begun.popleft()
        yield batch, [image, *itertools.islice(images, len(batch) - 1)]


def stack_images(images):
    """What read_images yields of a batch as uint8 (B, 3, H, W). Raises the first UserError."""
    for image in images:
        if isinstance(image, UserError):
            raise UserError(image)
    return torch.stack([torch.from_numpy(image) for image in images])


def prefetch(iterable):
    """Yields the items of an iterable, which a thread takes from it, up to two ahead."""
    iterator, end = iter(iterable), object()
    turns = itertools.repeat(None)
    for item in map_ahead(lambda _: next(iterator, end), turns, threads=1, depth=2):
        if item is end:
            return
        yield item


def map_ahead(function, items, *, threads, depth):
    """Yields function(item) of each item, in order; threads work up to depth items ahead."""
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        results = collections.deque(
            pool.submit(function, item) for item in itertools.islice(items, depth))
        try:
            while results:
                result = results.popleft().result()
                results.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
                yield result
        finally:
            for result in results:  # left early: do not finish what nobody will see
                result.cancel()
