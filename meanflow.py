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

Method is what every method has; a new one is a subclass and a row of the table in methods.py.
"""

import contextlib
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Draws:
    """All random numbers of a step. B rows, of which the first ``equal`` have r = t. A method that
    needs more adds tensors of B rows in a subclass."""

    r: torch.Tensor  # (B,) in [0, 1], never above t
    t: torch.Tensor  # (B,) in [0, 1], 1 is noise
    eps: torch.Tensor  # (B, ...) standard normal
    dropped: torch.Tensor  # (B,) bool, rows whose condition is replaced by the null condition
    equal: int  # count of leading rows with r = t

    def part(self, i, n):
        """Rows i, i + n, i + 2n, ... : the share of rank (or micro-batch) i of n.

        The rows with r = t come first in the whole, so they come first in every part.
        """
        return replace(self, **rows_of({**vars(self), "equal": len(range(i, self.equal, n))},
                                       slice(i, None, n)))


class Loss(NamedTuple):
    """What ``Method.loss`` returns; only ``loss`` carries a gradient."""

    loss: torch.Tensor  # scalar, adaptively weighted; at p = 1 about 1 whatever the network does
    error: torch.Tensor  # (B,) |u - target|^2, unweighted: the number to watch
    velocity_error: torch.Tensor  # (B,) |u - v|^2: on rows with r = t, that of flow matching
    extra: Mapping = MappingProxyType({})  # name -> (B,): what else to log, the same names always


# ---- what every method has -----------------------------------------------------------------------


class SettingError(ValueError):
    """A setting of a method is out of its range: its name, and the rule that it breaks."""

    def __init__(self, name, rule):
        super().__init__(f"{name} {rule}")
        self.name, self.rule = name, rule


class Setting(NamedTuple):
    """A setting of a method, and an option of train.py."""

    default: object  # a number, a word, or a tuple of increasing numbers; an int asks for ints
    rule: object  # the range of numbers such as "[0, 1)", or a tuple of the words
    help: str  # for people, with unit and effect
    recipe: object = None  # what train.py takes by default, where that is not the default above

    @property
    def train_default(self):
        """What train.py takes by default."""
        return self.default if self.recipe is None else self.recipe

    def check(self, name, value):
        """Raise SettingError for a value against the rule."""
        if isinstance(self.default, str):
            rule, right = " or ".join(self.rule), value in self.rule
        else:
            several = isinstance(self.default, tuple)
            values = list(value) if several and isinstance(value, tuple | list) else [value]
            low, high = map(float, self.rule[1:-1].split(","))
            kind = int if isinstance(self.default, int) else Real
            right = (len(values) == (len(self.default) if several else 1)
                     and all(isinstance(a, kind) and low <= a <= high for a in values)
                     and not (self.rule[0] == "(" and low in values)
                     and not (self.rule[-1] == ")" and high in values) and values == sorted(values))
            rule = f"{f'{len(self.default)} increasing numbers ' if several else ''}in {self.rule}"
            value = " ".join(map(str, values))
        if not right:
            raise SettingError(name, f"must be {rule}, got {value!s:.60}; choose another value")


def setting(default, rule, help, *, recipe=None):
    """A field of a Method; the arguments are those of Setting, whose rule the default must keep."""
    made = Setting(default, rule, help, recipe)
    made.check("default", default)
    return field(default=default, metadata={"setting": made})


@dataclass(kw_only=True, eq=False)
class Method:
    """A training objective: ``draw``, then ``loss``; and the sampler of what it trains.

    A subclass declares its settings as fields, ``name: float = setting(...)``, and is a dataclass
    with keyword arguments without further ado; another default of an inherited setting is
    ``name: float = 0.5``. Raises SettingError, a ValueError, for a setting out of its range.
    """

    num_classes: int  # the classes are 0 .. num_classes - 1, and num_classes is the null label
    ratio: float = setting(
        0.25, "[0, 1]", "share of rows with r < t; 0 is plain flow matching")
    label_drop: float = setting(0.1, "[0, 1]", "probability of the null label")
    p: float = setting(1.0, "[0, inf)", "power of the adaptive weight; 0 = plain L2")
    c: float = setting(0.01, "(0, inf)", "constant of the adaptive weight")

    # What train.py and sample.py must know of a method
    inputs = ("z", "r", "t", "y")  # what its networks take by position,
    keywords = ()  # and by name
    passes = ()  # its methods (net, *tensors) -> tensor that make passes without gradient
    run_names = MappingProxyType({})  # setting -> its name in the default run directory
    scheduled = False  # whether draws depend on step and total: a run must then keep its length
    takes_bfloat16 = True  # whether --precision bf16 is exact enough
    takes_noise = False  # whether sample takes new noise for each step after the first
    normalises_channels = False  # whether latents are normalised per channel, not by one scale

    def __init_subclass__(cls):
        dataclass(kw_only=True, eq=False)(cls)

    def __post_init__(self):
        if self.num_classes < 1:
            raise SettingError("num_classes", f"must be at least 1, got {self.num_classes}; data "
                                              f"without labels have one class")
        for name, known in self.settings().items():
            known.check(name, getattr(self, name))
        load_forward_mode()  # or the first torch.func.jvp prints a warning

    @classmethod
    def settings(cls):
        """{name: Setting} of this class."""
        known = {name: a.metadata["setting"] for base in reversed(cls.__mro__)
                 for name, a in getattr(base, "__dataclass_fields__", {}).items() if a.metadata}
        return {a.name: known[a.name] if a.metadata else
                known[a.name]._replace(default=a.default, recipe=None)
                for a in fields(cls) if a.name in known}

    @classmethod
    def fits(cls, network):
        """Whether a network, a module or its class, takes what this method gives to it."""
        itself = (network,) if isinstance(network, type) else ()
        signature = inspect.signature(getattr(network, "forward", network))
        try:
            signature.bind(*itself, *cls.inputs, **dict.fromkeys(cls.keywords))
        except TypeError:
            return False
        return True

    def draw(self, shape, *, device=None, generator=None, step=0, total=1):
        """Draws for a batch of this shape (B, ...), float32, on device, with the times of
        draw_times, which a subclass has.

        step: of total in the whole training, 0 at first. A schedule enters as tensors of the Draws:
        as a number it would make torch.compile compile anew.
        """
        r, t, equal = self.draw_times(shape[0], device=device, generator=generator)
        dropped = self.draw_dropped(shape[0], device=device, generator=generator)
        eps = torch.randn(shape, device=device, generator=generator)
        return Draws(r, t, eps, dropped, equal)

    def sorted_times(self, pair):
        """r, t (B,) of two draws (2, B), and the count of leading rows, in which r = t.

        As in the official code, t is the larger of the draws on every row, also where r = t: they
        are sorted first.
        """
        r, t, equal = pair.amin(0), pair.amax(0), self.equal_rows(pair.shape[1])
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

    def drop(self, y, dropped):
        """y with the null condition in the rows of dropped (B,) bool. The null label of labels (B,)
        int64 is num_classes. A method for other conditions, a nest (dict, tuple) of tensors with B
        rows, needs its own drop. Raises ValueError for a y that is no labels."""
        if (not isinstance(y, torch.Tensor) or y.shape != dropped.shape
                or y.dtype != torch.int64):
            what = (f"{y.dtype} {tuple(y.shape)}" if isinstance(y, torch.Tensor)
                    else f"a {type(y).__name__}")
            raise ValueError(f"y must be labels ({len(dropped)},) of torch.int64, got {what}; for "
                             f"other conditions give {type(self).__name__} its own drop(y, "
                             f"dropped)")
        return torch.where(dropped, self.num_classes, y)

    def weight(self, error):
        """The adaptive weight 1 / (error + c)^p (B,) of error (B,), without gradient (Eq. 22)."""
        return (error.detach() + self.c) ** -self.p

    def compile(self, **options):
        """Compile the passes without gradient; the options are those of torch.compile.

        A compiled function must contain the ``torch.func.jvp``: around a compiled network it
        breaks the graph (pytorch#187284). The caller compiles the forward with gradient and gives
        it to ``loss``. A network that breaks the graph of a pass raises an error of torch._dynamo:
        without fullgraph the pass would be made without the compiler, and no one told.
        """
        # Few shapes: the batch, and tails of two lengths
        options = {"dynamic": False, "fullgraph": True, **options}
        for name in self.passes:
            compiled = torch.compile(getattr(self, name), **options)
            # Slices as inputs fail in a compiled torch.func.jvp: give it copies
            setattr(self, name, lambda net, *rows, compiled=compiled: compiled(
                net, *tree_map_only(torch.Tensor, torch.clone, rows)))

    def sample(self, net, z1, y, *, steps=1):
        """Data (B, ...) from noise z1 (B, ...) and conditions y of B rows; steps as in ``sample``.
        Subclasses may take more: guidance returns its defaults."""
        return sample(self.sampled(net), z1, y, steps=steps)

    def sampled(self, net):
        """The network as a sampler calls it: with ratio = 0 it knows only u(z, t, t)."""
        return velocity_of(net) if self.ratio == 0 else net

    @staticmethod
    def guidance(config):
        """What sample takes beside steps, as {name: value}, by a checkpoint's config."""
        return {}


def rows_of(nest, rows):
    """The rows, a slice, of a tensor or of each tensor in a nest."""
    return tree_map_only(torch.Tensor, lambda a: a[rows], nest)


class LogitNormalTimes(Method):
    """A Method whose r and t are two logit-normal times, sorted."""

    p_mean: float = setting(-0.4, "(-inf, inf)", "mean of the logit-normal times")
    p_std: float = setting(1.0, "(0, inf)", "standard deviation of the logit-normal times")

    def draw_times(self, batch, *, device=None, generator=None):
        """r, t (B,) and the count of leading rows with r = t."""
        normal = torch.randn(2, batch, device=device, generator=generator)
        return self.sorted_times(torch.sigmoid(normal * self.p_std + self.p_mean))


# ---- MeanFlow ------------------------------------------------------------------------------------


class MeanFlow(LogitNormalTimes):
    """The objective of arXiv 2505.13447. Settings beside those of LogitNormalTimes:

    time_sampler: "logit_normal" or "uniform".
    cfg: effective guidance scale omega' = omega / (1 - kappa); 1 with kappa = 0 means no guidance.
    kappa: weight of the network's own conditional velocity.
    cfg_interval: closed interval of t in which guidance acts.
    tangent: of z in the Jacobian-vector product. "velocity": v_g, as in MeanFlow. "network":
        u(z, t, t, y), the boundary variant of improved MeanFlow (arXiv 2512.02012, Eq. 12).
    """

    time_sampler: str = setting("logit_normal", ("logit_normal", "uniform"),
                                "distribution of the times")
    cfg: float = setting(1.0, "[0, inf)", "guidance scale omega' = omega / (1 - kappa), 1 = none",
                         recipe=3.0)
    kappa: float = setting(0.0, "[0, 1)", "weight of the network's own labelled velocity")
    cfg_interval: tuple = setting((0.0, 1.0), "[0, 1]",
                                  "times t in which guidance acts, both ends included")
    tangent: str = setting("velocity", ("velocity", "network"),
                           "of du/dt: guided velocity, or u(z, t, t, y)")

    passes = ("velocity", "time_derivative")
    run_names = MappingProxyType({"cfg": "cfg"})

    @property
    def omega(self):
        """The factor of v in Eq. 20 (Eq. 21)."""
        return self.cfg * (1 - self.kappa)

    def draw_times(self, batch, *, device=None, generator=None):
        """r, t (B,) and the count of leading rows with r = t."""
        if self.time_sampler == "uniform":
            return self.sorted_times(torch.rand(2, batch, device=device, generator=generator))
        return super().draw_times(batch, device=device, generator=generator)

    def loss(self, net, x, y, draws, *, forward=None):
        """The Loss of data x (B, ...) with conditions y, as drop takes them, under these draws.

        net is the bare network. It makes the passes without gradient: torch.func.jvp does not work
        through DistributedDataParallel. ``forward`` (default: net) makes the pass with gradient and
        may be the wrapped or compiled network.
        """
        z, v = on_path(x, draws)
        forward = net if forward is None else forward
        u = forward(z, draws.r, draws.t, self.drop(y, draws.dropped)).to(z.dtype)
        target = self.target(net, z, v, y, draws, u.detach())
        error = (u - target).square().flatten(1).sum(1)
        velocity_error = (u.detach() - v).square().flatten(1).sum(1)
        return Loss((self.weight(error) * error).mean(), error.detach(), velocity_error)

    @torch.no_grad()
    def target(self, net, z, v, y, draws, u):
        """The regression target v_g - (t-r) du/dt (Eq. 10, 19), (B, ...), without gradient.

        z, v, u: (B, ...). y: the conditions before the drop; u: the network's output with those
        after it.
        """
        # The rows with r < t are the tail, one static slice. They alone need the derivative
        tail, own = slice(draws.equal, None), None
        if draws.equal < len(z) and (self.kappa > 0 or self.tangent == "network"):
            own = self.velocity(net, z[tail], draws.t[tail], rows_of(y, tail))
        v_g = self.guided_velocity(net, z, v, y, draws, u, own)
        v_g = torch.where(per_row(draws.dropped, v), v, v_g)  # null label: plain velocity
        if draws.equal == len(z):
            return v_g
        z, r, t, y, v_tail = rows_of(
            (z, draws.r, draws.t, self.drop(y, draws.dropped), v_g), tail)
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
            null = self.drop(y, torch.ones_like(draws.dropped))
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


def on_path(x, draws):
    """z = (1-t) x + t eps and v = eps - x, each (B, ...) like the data x."""
    t = per_row(draws.t, x)
    return (1 - t) * x + t * draws.eps, draws.eps - x


def per_row(a, x):
    """a (B,) as (B, 1, ..., 1): one number for each row of x (B, ...)."""
    return a.reshape(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def sample(net, z1, y, *, steps=1):
    """Data (B, ...) from noise z1 (B, ...) and labels or other conditions y.

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
