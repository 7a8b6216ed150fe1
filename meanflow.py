"""The method: MeanFlow (Geng et al., arXiv 2505.13447) as one loss and one sampler.

The network learns the average velocity between two times r <= t,

    u(z, r, t) = 1 / (t-r) * integral of v(z_s, s) ds from r to t                         (Eq. 3)

from the identity u = v - (t-r) du/dt (Eq. 6). t = 1 is noise, t = 0 is data. A training step, for
data x with labels y:

    r, t = two logit-normal times, sorted; then r = t in all but a share ``ratio`` of the rows
    eps  = standard normal noise
    z    = (1-t) x + t eps                                    a point on the path
    v    = eps - x                                            its velocity
    v_g  = omega v + (1-omega-kappa) u(z, t, t, null) + kappa u(z, t, t, y)              (Eq. 20)
    y    = null, and v_g = v, where the label is dropped
    u    = net(z, r, t, y)
    du/dt = Jacobian-vector product of net with tangent (v_g, 0, 1) for (z, r, t)         (Eq. 8)
    error = |u - stopgrad(v_g - (t-r) du/dt)|^2                                      (Eq. 10, 19)
    loss = mean of error / stopgrad(error + c)^p                                         (Eq. 22)

A sample takes one evaluation: z0 = z1 - u(z1, 0, 1, y) (Eq. 12).

``net`` is any callable (z, r, t, y) -> u, and x has any shape (B, ...). Which rows have r = t and
which lose their label is as in the official ImageNet code (Gsunshine/meanflow).
"""

import contextlib
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Draws:
    """All random numbers of a step. B rows, of which the first ``equal`` have r = t."""

    r: torch.Tensor  # (B,) in [0, 1], never above t
    t: torch.Tensor  # (B,) in [0, 1], 1 is noise
    eps: torch.Tensor  # (B, ...) standard normal
    dropped: torch.Tensor  # (B,) bool, rows whose label is replaced by the null label
    equal: int  # count of leading rows with r = t

    def part(self, i, n):
        """Rows i, i + n, i + 2n, ... : the share of rank (or micro-batch) i of n.

        The rows with r = t come first in the whole, so they come first in every part.
        """
        rows = slice(i, None, n)
        equal = len(range(i, self.equal, n))
        return Draws(self.r[rows], self.t[rows], self.eps[rows], self.dropped[rows], equal)


class Loss(NamedTuple):
    """What ``MeanFlow.loss`` returns; only ``loss`` carries a gradient."""

    loss: torch.Tensor  # scalar, adaptively weighted; at p = 1 about 1 whatever the network does
    error: torch.Tensor  # (B,) |u - target|^2, unweighted: the number to watch
    velocity_error: torch.Tensor  # (B,) |u - v|^2: on rows with r = t, that of flow matching


class SettingError(ValueError):
    """A setting of a method is out of its range: its name, and the rule that it breaks."""

    def __init__(self, name, rule):
        super().__init__(f"{name} {rule}")
        self.name, self.rule = name, rule


class MeanFlow:
    """The training objective: ``draw``, then ``loss``.

    num_classes: the classes are 0 .. num_classes - 1, and num_classes is the null label.
    ratio: share of rows with r < t, in [0, 1]; 0 is plain flow matching.
    p_mean, p_std: mean and standard deviation of the logit-normal times, p_std > 0.
    time_sampler: "logit_normal" or "uniform".
    cfg: effective guidance scale omega' = omega / (1 - kappa), 0 or more; 1 with kappa = 0 means no
        guidance.
    kappa: weight of the network's own conditional velocity, in [0, 1).
    cfg_interval: closed interval of t, within [0, 1], in which guidance acts.
    label_drop: probability of the null label, in [0, 1].
    tangent: of z in the Jacobian-vector product. "velocity": v_g, as in MeanFlow. "network":
        u(z, t, t, y), the boundary variant of improved MeanFlow (arXiv 2512.02012, Eq. 12).
    p, c: power, 0 or more, and positive constant of the adaptive weight 1 / (error + c)^p (Eq. 22).

    Raises SettingError, a ValueError, for a setting out of its range.
    """

    def __init__(self, *, num_classes, ratio=0.25, p_mean=-0.4, p_std=1.0,
                 time_sampler="logit_normal", cfg=1.0, kappa=0.0, cfg_interval=(0.0, 1.0),
                 label_drop=0.1, p=1.0, c=0.01, tangent="velocity"):
        def check(ok, name, rule, value):
            if not ok:
                raise SettingError(name, f"must be {rule}, got {value}; choose another value")

        start, end = cfg_interval
        check(num_classes >= 1, "num_classes", "at least 1", num_classes)
        check(0 <= ratio <= 1, "ratio", "in [0, 1]", ratio)
        check(math.isfinite(p_mean), "p_mean", "finite", p_mean)
        check(0 < p_std < math.inf, "p_std", "positive and finite", p_std)
        check(time_sampler in ("logit_normal", "uniform"), "time_sampler",
              "logit_normal or uniform", time_sampler)
        check(0 <= cfg < math.inf, "cfg", "0 or more and finite", cfg)
        check(0 <= kappa < 1, "kappa", "in [0, 1)", kappa)
        check(0 <= start <= end <= 1, "cfg_interval", "two increasing times in [0, 1]",
              f"{start} {end}")
        check(0 <= label_drop <= 1, "label_drop", "in [0, 1]", label_drop)
        check(0 <= p < math.inf, "p", "0 or more and finite", p)
        check(0 < c < math.inf, "c", "positive and finite", c)
        check(tangent in ("velocity", "network"), "tangent", "velocity or network", tangent)
        self.num_classes, self.ratio = num_classes, ratio
        self.p_mean, self.p_std, self.time_sampler = p_mean, p_std, time_sampler
        self.cfg, self.kappa, self.cfg_interval = cfg, kappa, (start, end)
        self.omega = cfg * (1 - kappa)  # Eq. 21
        self.label_drop, self.p, self.c, self.tangent = label_drop, p, c, tangent
        load_forward_mode()  # or the first torch.func.jvp prints a warning

    # ---- the draws: all randomness is here ---------------------------------------------------

    def draw(self, shape, *, device=None, generator=None):
        """Draws for a batch of this shape (B, ...), float32, on device."""
        r, t, equal = self.draw_times(shape[0], device=device, generator=generator)
        dropped = self.draw_dropped(shape[0], device=device, generator=generator)
        eps = torch.randn(shape, device=device, generator=generator)
        return Draws(r, t, eps, dropped, equal)

    def draw_times(self, batch, *, device=None, generator=None):
        """r, t (B,) and the count of leading rows with r = t.

        As in the official code, t is the larger of two independent draws on every row, also where
        r = t: the draws are sorted first.
        """
        if self.time_sampler == "uniform":
            pair = torch.rand(2, batch, device=device, generator=generator)
        else:
            normal = torch.randn(2, batch, device=device, generator=generator)
            pair = torch.sigmoid(normal * self.p_std + self.p_mean)
        r, t = pair.amin(0), pair.amax(0)
        equal = self.equal_rows(batch)
        r[:equal] = t[:equal]
        return r, t, equal

    def equal_rows(self, batch):
        """How many rows of a batch have r = t."""
        return math.floor(batch * (1 - self.ratio) + 1e-9)  # 10 * (1 - .9) is .9999... in floats

    def draw_dropped(self, batch, *, device=None, generator=None):
        """(B,) bool: which rows lose their label. Their number is binomial, and as in the official
        code they are the leading rows.

        So, with label_drop well below 1 - ratio, the null label is trained at r = t, the only place
        where guidance uses it.
        """
        count = (torch.rand(batch, device=device, generator=generator) < self.label_drop).sum()
        return torch.arange(batch, device=device) < count

    # ---- the loss: a function of weights, data and draws -------------------------------------

    def loss(self, net, x, y, draws, *, forward=None):
        """The Loss of data x (B, ...) with labels y (B,) int64 under these draws.

        net is the bare network. It makes the passes without gradient: torch.func.jvp does not work
        through DistributedDataParallel. ``forward`` (default: net) makes the pass with gradient and
        may be the wrapped or compiled network.
        """
        t = per_row(draws.t, x)
        z = (1 - t) * x + t * draws.eps
        v = draws.eps - x
        y_input = torch.where(draws.dropped, self.num_classes, y)
        forward = net if forward is None else forward
        u = forward(z, draws.r, draws.t, y_input).to(z.dtype)
        target = self.target(net, z, v, y, draws, u.detach())
        error = (u - target).square().flatten(1).sum(1)
        velocity_error = (u.detach() - v).square().flatten(1).sum(1)
        return Loss((self.weight(error) * error).mean(), error.detach(), velocity_error)

    @torch.no_grad()
    def target(self, net, z, v, y, draws, u):
        """The regression target v_g - (t-r) du/dt (Eq. 10, 19), (B, ...), without gradient.

        z, v, u: (B, ...). y (B,): the labels before the drop; u: the network's output with the
        labels after it.
        """
        # The rows with r < t are the tail, one static slice. They alone need the derivative
        tail, own = slice(draws.equal, None), None
        if draws.equal < len(y) and (self.kappa > 0 or self.tangent == "network"):
            own = self.velocity(net, z[tail], draws.t[tail], y[tail])
        v_g = self.guided_velocity(net, z, v, y, draws, u, own)
        v_g = torch.where(per_row(draws.dropped, v), v, v_g)  # null label: plain velocity
        if draws.equal == len(y):
            return v_g
        y = torch.where(draws.dropped, self.num_classes, y)
        z, r, t, y, v_tail = (a[tail] for a in (z, draws.r, draws.t, y, v_g))
        tangent = own if self.tangent == "network" else v_tail
        with attention_in_bfloat16():
            du_dt = self.time_derivative(net, z, r, t, y, tangent)
        return torch.cat([v_g[:draws.equal], v_tail - per_row(t - r, z) * du_dt])

    def guided_velocity(self, net, z, v, y, draws, u, own):
        """v_g = omega v + (1 - omega - kappa) u(z, t, t, null) + kappa u(z, t, t, y) (Eq. 20).

        (B, ...) like z, v and u. Where t is outside cfg_interval it is v. Passes with coefficient 0
        are skipped: both for cfg = 1 and kappa = 0, the null pass for cfg = 1, the labelled pass
        for kappa = 0. own: u(z, t, t, y) of the rows with r < t. On the others it is u itself,
        except where the label is dropped, and those rows do not use v_g.
        """
        if self.cfg == 1 and self.kappa == 0:
            return v
        t, v_g = draws.t, self.omega * v
        if self.cfg != 1:
            null = torch.full_like(y, self.num_classes)
            v_g = v_g + (1 - self.omega - self.kappa) * self.velocity(net, z, t, null)
        if self.kappa > 0:
            equal = u[:draws.equal]
            v_g = v_g + self.kappa * (equal if own is None else torch.cat([equal, own]))
        start, end = self.cfg_interval
        inside = (draws.t >= start) & (draws.t <= end)
        return torch.where(per_row(inside, v), v_g, v)

    def velocity(self, net, z, t, y):
        """u(z, t, t, y): the network's own instantaneous velocity, (B, ...) like z."""
        return net(z, t, t, y).to(z.dtype)

    def time_derivative(self, net, z, r, t, y, tangent):
        """du/dt along the path, (B, ...) like z: the Jacobian-vector product of u with tangent
        (tangent, 0, 1) for (z, r, t) (Eq. 8)."""
        return total_derivative(lambda z, r, t: net(z, r, t, y), z, r, t, tangent)

    def weight(self, error):
        """The adaptive weight 1 / (error + c)^p (B,) of error (B,), without gradient (Eq. 22)."""
        return (error.detach() + self.c) ** -self.p

    def compile(self, **options):
        """Compile the passes without gradient; the options are those of torch.compile.

        The compiled function must contain the ``torch.func.jvp``: around a compiled network it
        breaks the graph (pytorch#187284). The caller compiles the forward with gradient and gives
        it to ``loss``. A network that breaks the graph of a pass raises an error of torch._dynamo:
        without fullgraph the pass would be made without the compiler, and no one told.
        """
        # Few shapes: the batch, and tails of two lengths
        options = {"dynamic": False, "fullgraph": True, **options}
        self.velocity = torch.compile(self.velocity, **options)
        derivative = torch.compile(self.time_derivative, **options)
        # Slices as inputs fail in a compiled torch.func.jvp: give it copies
        self.time_derivative = lambda net, *rows: derivative(net, *[a.clone() for a in rows])


def total_derivative(u, z, r, t, tangent):
    """d/dt of u(z, r, t), (B, ...) like z, along a path with dz/dt = tangent and constant r."""
    tangents = (tangent, torch.zeros_like(r), torch.ones_like(t))
    # Fused attention has no forward-mode derivative, the plain formula has one
    with sdpa_kernel(SDPBackend.MATH), ForwardModeRules():
        _, du_dt = torch.func.jvp(u, (z, r, t), tangents)
    return du_dt.to(tangent.dtype)


@contextlib.contextmanager
def attention_in_bfloat16():
    """Within ``with``, plain attention leaves bfloat16 inputs as they are.

    Otherwise it converts them to float32, and autocast, which torch.func.jvp applies anew to each
    operation within, converts them back: 15 of a block's 140 kernels. The numbers are the same
    (benchmarks/precision.py). Compiled code reads this setting when it is traced and cannot change
    it, so it is set outside.
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def per_row(a, x):
    """a (B,) as (B, 1, ..., 1): one number for each row of x (B, ...)."""
    return a.reshape(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def sample(net, z1, y, *, steps=1):
    """Data (B, ...) from noise z1 (B, ...) and labels y (B,).

    Each step is z_r = z_t - (t-r) u(z_t, r, t, y) (Eq. 12). steps: a count of equal steps, or the
    times themselves, decreasing from 1 (noise) to 0 (data).
    Raises ValueError for a count below 1 or times that do not decrease within [0, 1].
    """
    times = schedule(steps)
    z = z1
    for t, r in zip(times[:-1], times[1:], strict=True):
        u = net(z, z.new_full((len(z),), r), z.new_full((len(z),), t), y)
        z = z - (t - r) * u.to(z.dtype)
    return z


def velocity_of(net):
    """(z, r, t, ...) -> u(z, t, t, ...), the instantaneous velocity, to sample by. With ratio = 0,
    plain flow matching, a network learns no other."""
    return lambda z, r, t, *given, **options: net(z, t, t, *given, **options)


def schedule(steps):
    """The list of times, decreasing, for a count of steps or such times. Raises ValueError."""
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return [1 - i / steps for i in range(steps)] + [0.0]
    times = [float(t) for t in steps]
    within = all(0 <= t <= 1 for t in times)
    if len(times) < 2 or not within or any(t <= r for t, r in zip(times, times[1:])):
        raise ValueError(f"steps must be decreasing times in [0, 1] such as 1 0.5 0, got {times}")
    return times


# ---- what PyTorch's forward mode needs ----------------------------------------------------------


def load_forward_mode():
    """Load PyTorch's forward-mode rules without the warning that they use torch.jit.script."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class ForwardModeRules(TorchFunctionMode):
    """Within ``with``, forward mode differentiates these functions by rules of our own.

    Linear layers and convolutions: their weights are constants. PyTorch's rule adds the product of
    the input with the tangent of the weight, which is zero here. It writes the zeros and multiplies
    them: three matrix products instead of two (torch 2.15, eager and compiled). For a convolution
    torch 2.11 cannot compile that rule.

    RMSNorm: by its formula. On a GPU torch.compile cannot trace the rule of the fused kernel
    (torch 2.14).
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear or function is F.conv2d:
            return self.product(function, *args, **(kwargs or {}))
        if function is F.rms_norm or function is torch.rms_norm:
            return self.rms_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def product(function, input, weight, bias=None, *args, **kwargs):
        """function(input, weight, ...), with the tangent function(tangent of input, weight)."""
        x, tangent = forward_ad.unpack_dual(input)
        y = function(x, weight, bias, *args, **kwargs)
        if tangent is None:
            return y
        return forward_ad.make_dual(y, function(tangent, weight, None, *args, **kwargs))

    @staticmethod
    def rms_norm(input, normalized_shape, weight=None, eps=None):
        """input / sqrt(mean of its squares + eps) * weight, of any shape; in float32 or float64."""
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        dims = tuple(range(-len(normalized_shape), 0))
        y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
        return (y if weight is None else y * weight).to(input.dtype)
