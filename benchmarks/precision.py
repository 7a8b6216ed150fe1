"""Measure how far each --precision, and the arithmetic of the official runs, is from float64.

    python benchmarks/precision.py                    # half a minute on two cores
    python benchmarks/precision.py --ckpt results/quickstart/checkpoints/0001950.pt

It makes one training step with guidance (omega' 2, kappa .5) in each arithmetic and prints relative
differences (2-norm) to the same step in float64: of the derivative du/dt, of the errors per row and
of the gradient of all weights. A second table has the errors of du/dt by finite differences. A
third has those of the targets of MeanFlow and of SoFlow, whose gap shrinks in the training,
relative to target - output (rms, rows with t - r > .02, no guidance).

The official code multiplies float32 arrays on TPUs, which by default round the factors to bfloat16
and add in float32. The program simulates this, so its figures do not depend on the machine: it
rounds every factor of a matrix product or convolution, forward, backward and in the derivative, and
multiplies in float32.
"""

import contextlib
import copy
import dataclasses
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_step import difference_errors  # noqa: E402

from engine.checkpoint import load_network  # noqa: E402
from engine.errors import naming, run_main  # noqa: E402
from engine.options import Parser, int_range  # noqa: E402
from meanflow import MeanFlow, on_path  # noqa: E402
from models import DiT_models  # noqa: E402
from soflow import SoFlow  # noqa: E402

GAPS = (0.1, 0.014, 0.002)  # (t-l) / (t-r) of SoFlow at the start, the middle and the end
aten = torch.ops.aten
# operation -> index of its first factor among its arguments
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1,
            aten.convolution.default: 0, aten.convolution_backward.default: 0}


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("--ckpt", type=Path,
                        help="checkpoint with the network (default: DiT-S/4 for 32 x 32 x 4, all "
                             "weights random)")
    parser.add_argument("--batch-size", type=int_range(4), default=8, help="rows in the batch")
    return parser.parse_args(argv)


def main(args):
    torch.manual_seed(0)
    net, shape, classes = network(args.ckpt)
    method = Watched(num_classes=classes, cfg=2.0, kappa=0.5)
    x = torch.randn(args.batch_size, *shape)
    y = torch.randint(classes, (args.batch_size,))
    draws = method.draw(x.shape)
    exact = step(copy.deepcopy(net).double(), method, x.double(), y, in_float64(draws))
    print("| arithmetic | du/dt | error | gradient |\n|---|---|---|---|")
    converted = "the same, attention's inputs converted to float32 and back"
    for name, arithmetic in {**arithmetics(), converted: converted_attention()}.items():
        found = step(net, method, x, y, draws, arithmetic)
        print(f"| {name} | " + " | ".join(
            f"{float((a - b).norm() / b.norm()):.1e}" for a, b in zip(found, exact)) + " |")
    print("", *difference_errors(net, method.rows, x.device), sep="\n")
    print("", *target_errors(net, x, y, classes), sep="\n")


def arithmetics():
    """{name: context in which to compute}; each can be entered once."""
    return {"float32": contextlib.nullcontext(),
            "TensorFloat-32 factors (`tf32` on a GPU)": Rounded(to_tf32),
            "bfloat16 factors (official, on TPUs)": Rounded(lambda a: a.bfloat16().float()),
            "bfloat16 autocast (`bf16`)": torch.autocast("cpu", torch.bfloat16)}


def target_errors(net, x, y, classes):
    """The lines of a Markdown table: errors of the targets of SoFlow and MeanFlow."""
    yield "| arithmetic | MeanFlow | " + " | ".join(f"SoFlow, gap {gap:g}" for gap in GAPS) + " |"
    yield "|---" * (2 + len(GAPS)) + "|"
    methods = [MeanFlow(num_classes=classes, ratio=1),
               *(SoFlow(num_classes=classes, ratio=1, cfg=1.0, gap_start=gap) for gap in GAPS)]
    # Of MeanFlow the same points
    generator = torch.Generator().manual_seed(0)
    draws = [method.draw(x.shape, generator=generator.manual_seed(0)) for method in methods[1:]]
    draws.insert(0, draws[0])
    exact = [residual(copy.deepcopy(net).double(), method, x.double(), y, in_float64(draw))
             for method, draw in zip(methods, draws)]
    for name in arithmetics():
        cells = []
        for method, draw, (target, output) in zip(methods, draws, exact):
            with arithmetics()[name], sdpa_kernel(SDPBackend.MATH):
                found, _ = residual(net, method, x, y, draw)
            cells.append(f"{float((found - target).norm() / (target - output).norm()):.0e}")
        yield f"| {name} | {' | '.join(cells)} |"


@torch.no_grad()
def residual(net, method, x, y, draws):
    """(target, output) of the rows with t - r > .02, (B', C, H, W), as float64."""
    z, v = on_path(x, draws)
    out = net(z, draws.r, draws.t, y).to(z.dtype)
    far = draws.t - draws.r > 0.02
    target = method.target(net, z, v, y, dataclasses.replace(
        draws, equal=0, dropped=torch.zeros_like(draws.dropped)), out)
    return target[far].double(), out[far].double()


def in_float64(draws):
    """The same Draws in float64."""
    return dataclasses.replace(draws, **{name: value.double() for name, value in vars(draws).items()
                                         if torch.is_tensor(value) and value.is_floating_point()})


def network(path):
    """(network in train mode, shape (C, H, W) of its data, number of classes)."""
    if path:
        with naming("--ckpt"):
            net, config = load_network(path)
        return net.train().requires_grad_(), config["latent_shape"], config["num_classes"]
    net = DiT_models["DiT-S/4"]()
    for name, weight in net.named_parameters():
        if "adaLN" in name or "final_layer" in name:  # at first zeros, which would hide the rest
            torch.nn.init.normal_(weight, std=0.02)
    return net, (4, 32, 32), 1000


def step(net, method, x, y, draws, arithmetic=None):
    """(du/dt (B', C, H, W) of the rows with r < t, errors (B,), gradient (N,)), as float64."""
    net.zero_grad()
    # Plain attention: the factors inside a fused kernel cannot be rounded
    with sdpa_kernel(SDPBackend.MATH):
        with arithmetic or contextlib.nullcontext():
            out = method.loss(net, x, y, draws)
            if isinstance(arithmetic, Rounded):
                out.loss.backward()
        if not isinstance(arithmetic, Rounded):  # backward runs outside autocast
            out.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
    return method.du_dt.double(), out.error.double(), gradient.double()


@contextlib.contextmanager
def converted_attention():
    """bfloat16 autocast without ``attention_in_bfloat16``, as PyTorch has it by default."""
    with (torch.autocast("cpu", torch.bfloat16),
          mock.patch("meanflow.attention_in_bfloat16", contextlib.nullcontext)):
        yield


class Watched(MeanFlow):
    """MeanFlow that keeps the derivative of the last step as ``du_dt``, and its inputs after the
    network as ``rows``."""

    def time_derivative(self, net, *rows):
        self.rows, self.du_dt = rows, super().time_derivative(net, *rows)
        return self.du_dt


class Rounded(TorchDispatchMode):
    """Within ``with``, round the float32 factors of every matrix product and convolution."""

    def __init__(self, rounding):
        super().__init__()
        self.rounding = rounding

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            first = PRODUCTS[function]
            args = [self.rounding(a) if i >= first and isinstance(a, torch.Tensor) else a
                    for i, a in enumerate(args)]
        return function(*args, **(kwargs or {}))


def to_tf32(a):
    """float32, of any shape, rounded to the ten mantissa bits of TensorFloat-32, ties to even."""
    bits = a.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


if __name__ == "__main__":
    run_main(main, parse_args)
