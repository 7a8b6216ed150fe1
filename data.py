"""Training data: image folders (class = folder), ADM's centre crop, and an order that can start
at any step without reading what came before. LatentShards, the other data set, is in latents.py.

The order is a function of (seed, step): every process works out the global batch's rows and takes
the rows rank::world, so the data a run sees does not depend on the number of processes.
"""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import math
import os
import threading
import time
import warnings

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.utils import make_grid

import faults
import runtime
from latents import LatentShards
from runtime import UserError

# ---- images ---------------------------------------------------------------------------------


def center_crop(image, size):
    """The centre square of a PIL image, resized to (size, size).

    ADM's recipe (openai/guided-diffusion), which the published FID references were made with:
    halve with BOX filtering while the shorter side is at least twice the size, then BICUBIC.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size):
    """An image file as uint8 (3, size, size): PIL's conversion to RGB, then the centre crop.

    EXIF rotation is left alone, as torchvision's ImageFolder leaves it. Raises UserError naming
    the file if it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF or palette data, of no consequence here
            with Image.open(runtime.regular(path)) as image:
                pixels = np.array(center_crop(image.convert("RGB"), size))  # (H, W, 3)
    except Exception as error:  # PIL's decoders raise errors of any kind on a broken file
        raise UserError(f"--data-path must hold readable images, got {path} ({error}); "
                        f"repair the file") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def list_images(path, root):
    """Classes, files (N,) relative to root, labels (N,) int64 of --data-path, or a UserError."""
    if os.path.exists(root + "dataset.json"):
        return UserError(f"--data-path must be a folder of images, got {path}, which holds latent "
                         f"shards; add --encoded-data or give the images")
    try:
        found = datasets.ImageFolder(root)
    except (OSError, ValueError) as error:
        return UserError(f"--data-path must be a folder with one folder of images per class, got "
                         f"{path} ({str(error).splitlines()[0][:300]}); check the path")
    # one array and not a million strings: worker processes share its memory for good
    files = np.array([os.fsencode(file[len(root):]) for file, _ in found.samples])
    return found.classes, files, torch.tensor(found.targets)


class ImageFolder:
    """Images in one folder per class, served as uint8 (B, 3, size, size) and labels (B,).

    Classes are the sorted folder names, as torchvision's ImageFolder numbers them. Raises
    UserError if there is no such folder, no class or a class without an image.

    world: of several processes rank 0 lists the folder and sends the others what it found; to list
    a million files takes a network's file system minutes.
    """

    def __init__(self, path, image_size, world=None):
        self.root = os.path.join(os.path.expanduser(path), "")
        found = list_images(path, self.root) if world is None or world.main else None
        found = found if world is None else world.agree(found)
        if isinstance(found, UserError):
            raise UserError(found)
        self.classes, self.files, self.labels = found
        self.image_size = image_size
        # Decoded images of a set as small as the quickstart's are kept
        self.kept = {} if len(self) * 3 * image_size**2 <= 16 * 2**20 else None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, batch):
        """(rows, mirrored), both (B,) -> images uint8 (B, 3, size, size) and labels (B,).

        Raises UserError.
        """
        rows, mirrored = batch
        return (torch.stack([self.read(item) for item in zip(rows.tolist(), mirrored.tolist())]),
                self.labels[rows])

    def read(self, row_and_mirrored):
        """uint8 (3, size, size). Raises UserError."""
        row, mirrored = row_and_mirrored
        return self.image(row).flip(2) if mirrored else self.image(row)

    def image(self, row):
        """uint8 (3, size, size), not mirrored. Raises UserError."""
        if self.kept is None:
            return read_image(self.path(row), self.image_size)
        if row not in self.kept:
            self.kept[row] = read_image(self.path(row), self.image_size)
        return self.kept[row]

    def name(self, row):
        """The path of an image relative to the folder."""
        return os.fsdecode(self.files[row])

    def path(self, row):
        return os.path.join(self.root, self.name(row))

    def fingerprint(self):
        """SHA-256 of the list of files: what a row stands for. Their content is not read."""
        return hashlib.sha256(b"\n".join(self.files.tolist())).hexdigest()


# ---- order ----------------------------------------------------------------------------------


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
                order = runtime.generator(self.seed, epoch, "order")
                known, permutation = epoch, torch.randperm(self.count, generator=order)
            rows = permutation[position * self.global_batch:][:self.global_batch]
            mirrored = torch.zeros(self.global_batch, dtype=torch.bool)
            if self.flip:
                coin = runtime.generator(self.seed, step, "flip")
                mirrored = torch.rand(self.global_batch, generator=coin) < 0.5
            share = slice(self.world.rank, None, self.world.size)
            yield rows[share], mirrored[share]


def load(dataset, batches, *, workers, device):
    """Iterate over the batches (rows, mirrored) of a dataset, on device: tensors as it serves them.

    Workers read ahead, so neither a slow image nor a cold disk holds up the caller: processes for
    images, threads for latents, which to hand from process to process costs ten times as much as
    to read. Raises UserError for what a worker could not read.
    """
    def host(batch):
        return [tensor.pin_memory() if device.type == "cuda" else tensor for tensor in batch]

    if not isinstance(dataset, LatentShards):
        items = (list(zip(rows.tolist(), mirrored.tolist())) for rows, mirrored in batches)
        served = (host((stacked(images), dataset.labels[[row for row, _ in batch]]))
                  for batch, images in read_images(dataset.read, items, workers=workers))
        served = beside(served) if workers else served
    elif workers:
        served = ahead(lambda batch: host(dataset[batch]), batches, threads=workers,
                       depth=2 * workers)
    else:
        served = (host(dataset[batch]) for batch in batches)
    for batch in served:
        yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)


PIECE = 4  # images that a reading process hands over at once


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

    faults.ignore_signals(worker)
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


def stacked(images):
    """What read_images yields of a batch as uint8 (B, 3, H, W). Raises the first UserError."""
    for image in images:
        if isinstance(image, UserError):
            raise UserError(image)
    return torch.stack([torch.from_numpy(image) for image in images])


def beside(iterable):
    """Yields the items of an iterable, which a thread takes from it, up to two ahead."""
    iterator, end = iter(iterable), object()
    for item in ahead(lambda _: next(iterator, end), itertools.repeat(None), threads=1, depth=2):
        if item is end:
            return
        yield item


def ahead(function, items, *, threads, depth):
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


def save_grid(path, images, columns):
    """Write uint8 images (B, 3, H, W) as one picture, enlarged where they are tiny."""
    enlarge = max(1, 64 // images.shape[3])
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    with runtime.whole_file(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).cpu().numpy()).save(temporary, "PNG")
