"""The Inception network of FID, with pytorch-fid's weights."""

import http.client
import sys
from pathlib import Path

import torch

from engine.errors import UserError

POOL = 2048  # values of Inception's last pooling, "pool_3" in the TensorFlow graph
SPATIAL = 7 * 17 * 17  # for sFID: the first 7 channels of a 17 x 17 map
CLASSES = 1008  # of the Inception of 2015: 1000 classes and unused ones


def load_inception(path, world):
    """pytorch-fid's Inception with the weights of a file, by default of the one in torch's hub
    cache, to which rank 0 downloads it. (By pytorch-fid's own fid_inception_v3 every process would,
    and would unpickle any file.) Raises UserError."""
    from pytorch_fid.inception import FID_WEIGHTS_URL  # takes a second to import

    cached = Path(torch.hub.get_dir(), "checkpoints", FID_WEIGHTS_URL.rsplit("/", 1)[1])

    def download():
        print(f"downloading {FID_WEIGHTS_URL}", file=sys.stderr)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(cached))
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"cannot download the Inception weights ({error}): put {cached.name} "
                            f"from {FID_WEIGHTS_URL} into {cached.parent}, or give "
                            f"evaluate_fid.py --weights") from error

    if path is None:
        world.on_main(lambda: cached.is_file() or download())
    path = path or cached
    try:
        net = build_inception()
        fill(net, torch.load(path, map_location="cpu", weights_only=True), assign=True)
    except Exception as error:  # torch.load raises errors of many kinds
        raise UserError(f"--weights must be a whole file of pytorch-fid's Inception weights, got "
                        f"{path}; get it again, or leave the option out to download it") from error
    return net.float().eval().requires_grad_(False)


def fill(net, tensors, **options):
    """Load a state dict, which must have the network's names, shapes, and fractions where it has
    them; PyTorch would round. Raises errors of many kinds."""
    own = net.state_dict()
    net.load_state_dict(tensors, **options)
    for key, value in own.items():
        if value.is_floating_point() and not tensors[key].is_floating_point():
            raise ValueError(f"{key} of {tensors[key].dtype}")


def build_inception():
    """pytorch-fid's Inception on the meta device: values would cost time and random numbers."""
    from pytorch_fid import inception
    from torchvision.models import inception_v3

    with torch.device("meta"):
        net = inception_v3(weights=None, aux_logits=False, init_weights=False, num_classes=CLASSES)
        for name, width, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            setattr(net, f"Mixed_{name}", inception.FIDInceptionA(width, pooled))
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            setattr(net, f"Mixed_{name}", inception.FIDInceptionC(768, width))
        net.Mixed_7b = inception.FIDInceptionE_1(1280)
        net.Mixed_7c = inception.FIDInceptionE_2(2048)
    return net
