"""SoFlow, solution flow models (arXiv 2512.15657), as one loss and one sampler.

The network learns F, of which f(z, t, r) = z - (t-r) F(z, r, t) is the solution at time r of the
flow through z at time t. F is MeanFlow's average velocity u: the network is the plain DiT, and one
step samples alike. Where MeanFlow differentiates, SoFlow takes the difference of two points on the
path, which needs no Jacobian-vector product. A training step, for data x with labels y:

    r = t = logit-normal times, in all but a share ``ratio`` of the rows, which lead the batch
    r, t = two logit-normal times of different means in the others, r cut to t - 1e-4
    l    = t - (t-r) gap, at most t - 1e-4; the gap falls from gap_start to gap_end in the training
    eps, z, v      as in meanflow.py
    v_w  = v + fade(t) (cfg - 1) (v - net(z, t, t, null))              guidance, up to cfg_end
    v_g  = (1-kappa) v_w + kappa net(z, t, t, y)
    y    = null, and v_g = v, where the label is dropped
    F    = net(z, r, t, y)
    F_l  = net(z - (t-l) v_g, r, l, y)                                 a step down the path
    target = v_g - (l-r) (F - F_l) / (t-l)                             v_g where r = t
    error = mean over all but the batch of (F - stopgrad(target))^2
    loss = mean of error / stopgrad((error + c)^p), half of it where r < t

For l -> t the target is MeanFlow's. The official implementation (zlab-princeton/SoFlow) writes the
loss otherwise, with the same gradient: its value where r < t is the product of F and the residual.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch

from meanflow import Draws, Loss, Method, on_path, per_row, rows_of, schedule, setting

LEAST_GAP = 1e-4  # between t and r, and t and l


@dataclass(frozen=True)
class SoFlowDraws(Draws):
    """All random numbers of a step. B rows, of which the first ``equal`` have r = l = t."""

    l: torch.Tensor  # noqa: E741  (B,) from r to t, the time of the second point


class SoFlow(Method):
    """The objective of arXiv 2512.15657; the defaults are those published for B/4. Settings beside
    those of Method, of which label_drop acts only with guidance:

    flow_mean, flow_std: mean and standard deviation of the logit-normal times where r = t.
    t_mean, t_std, r_mean, r_std: those of t and r on the other rows.
    cfg, kappa: as in MeanFlow; cfg of 1 or less means no guidance, whatever kappa is.
    cfg_end: the time above which guidance fades, within about .01.
    gap_start, gap_end: the share (t-l) / (t-r) at the first step of the training and after it.
    """

    flow_mean: float = setting(-0.2, "(-inf, inf)", "mean of the logit-normal times where r = t")
    flow_std: float = setting(1.0, "(0, inf)", "their standard deviation")
    t_mean: float = setting(0.2, "(-inf, inf)", "mean of the logit-normal t where r < t")
    t_std: float = setting(0.8, "(0, inf)", "its standard deviation")
    r_mean: float = setting(-1.0, "(-inf, inf)", "mean of the logit-normal r where r < t")
    r_std: float = setting(0.8, "(0, inf)", "its standard deviation")
    cfg: float = setting(3.0, "[0, inf)", "guidance scale omega' = omega / (1 - kappa), 1 = none")
    kappa: float = setting(0.75, "[0, 1)", "weight of the network's own labelled velocity")
    cfg_end: float = setting(0.8, "[0, 1]", "time t above which guidance fades")
    gap_start: float = setting(0.1, "(0, 1]", "(t-l) / (t-r) at the first step")
    gap_end: float = setting(0.002, "(0, 1]", "(t-l) / (t-r) after the last step")

    passes = ("average_velocity",)
    run_names = MappingProxyType({"cfg": "cfg"})
    scheduled = True
    takes_bfloat16 = False  # benchmarks/precision.py: the difference would be mostly rounding
    takes_noise = True

    # ---- the draws: all randomness is here ---------------------------------------------------

    def draw(self, shape, *, device=None, generator=None, step=0, total=1):
        """SoFlowDraws for a batch of this shape (B, ...), float32, on device. step: of total, 0 at
        first; l depends on it, and nothing else does."""
        batch = shape[0]
        equal = self.equal_rows(batch)
        normal = torch.randn(3, batch, device=device, generator=generator)
        r, t, l = self.times(normal, equal, step / total)  # noqa: E741
        # Without guidance no label is dropped
        share = self.label_drop if self.cfg > 1 else 0.0
        dropped = torch.rand(batch, device=device, generator=generator) < share
        eps = torch.randn(shape, device=device, generator=generator)
        return SoFlowDraws(r, t, eps, dropped, equal, l)

    def times(self, normal, equal, done):
        """r, t, l (B,) of normal numbers (3, B), with r = l = t in so many leading rows; done: the
        finished share of the training, in [0, 1)."""
        flow = torch.sigmoid(normal[0] * self.flow_std + self.flow_mean)
        t = torch.sigmoid(normal[1] * self.t_std + self.t_mean).clamp(min=LEAST_GAP)
        r = torch.sigmoid(normal[2] * self.r_std + self.r_mean)
        r = torch.minimum(r, t - LEAST_GAP)  # not sorted: a seventh of these rows is cut
        gap = self.gap_start * (self.gap_end / self.gap_start) ** done
        l = torch.minimum(t + (r - t) * gap, t - LEAST_GAP)  # noqa: E741
        r[:equal] = t[:equal] = l[:equal] = flow[:equal]
        return r, t, l

    # ---- the loss: a function of weights, data and draws -------------------------------------

    def loss(self, net, x, y, draws, *, forward=None):
        """The Loss of data x (B, ...) with conditions y, as drop takes them, under these draws.

        error and velocity_error are means over all but the batch, to which c is added. net and
        forward: as for MeanFlow.loss. Raises ValueError under bfloat16 autocast.
        """
        if torch.is_autocast_enabled(x.device.type):
            raise ValueError("SoFlow must run without autocast: its target is a difference of two "
                             "outputs, of which bfloat16 leaves mostly rounding")
        z, v = on_path(x, draws)
        forward = net if forward is None else forward
        out = forward(z, draws.r, draws.t, self.drop(y, draws.dropped)).to(z.dtype)
        target = self.target(net, z, v, y, draws, out.detach())
        error = (out - target).square().flatten(1).mean(1)
        velocity_error = (out.detach() - v).square().flatten(1).mean(1)
        weighted = self.weight(error) * error
        # Of the official form, F times the residual, the gradient is half that of the square
        parts = weighted[:draws.equal].sum() + 0.5 * weighted[draws.equal:].sum()
        return Loss(parts / len(z), error.detach(), velocity_error)

    @torch.no_grad()
    def target(self, net, z, v, y, draws, out):
        """The regression target (B, ...), without gradient.

        z, v, out: (B, ...). y: the conditions before the drop; out: F, with those after it.
        """
        v_g = self.guided_velocity(net, z, v, y, draws, out)
        tail = slice(draws.equal, None)
        if draws.equal == len(z):
            return v_g
        z, r, t, l, y, v_tail, out = rows_of(  # noqa: E741
            (z, draws.r, draws.t, draws.l, self.drop(y, draws.dropped), v_g, out), tail)
        at_l = self.average_velocity(net, z + per_row(l - t, z) * v_tail, r, l, y)
        # F - F_l before the division: f - f_l would lose more digits
        slope = (out - at_l) / per_row(t - l, z)
        return torch.cat([v_g[:draws.equal], v_tail - per_row(l - r, z) * slope])

    def guided_velocity(self, net, z, v, y, draws, out):
        """v_g (B, ...): v where the label is dropped, and without guidance. Passes that have the
        coefficient 0 are skipped. out: F, on the rows with r = t the own labelled velocity."""
        if self.cfg <= 1:
            return v
        t, tail = draws.t, slice(draws.equal, None)
        null = self.average_velocity(net, z, t, t, self.drop(y, torch.ones_like(draws.dropped)))
        v_g = v + per_row(self.fade(t) * (self.cfg - 1), z) * (v - null)
        if self.kappa > 0:
            own = out[:draws.equal]
            if draws.equal < len(z):
                rows = rows_of((z, t, t, y), tail)
                own = torch.cat([own, self.average_velocity(net, *rows)])
            v_g = (1 - self.kappa) * v_g + self.kappa * own
        return torch.where(per_row(draws.dropped, v), v, v_g)

    def fade(self, t):
        """The share of guidance (B,) at times t (B,): 1 up to cfg_end, then steeply to 0 at 1."""
        if self.cfg_end >= 1:
            return torch.ones_like(t)
        q = ((1 - t) / (1 - self.cfg_end)).clamp(0, 1 - 1e-6)
        return torch.where(t <= self.cfg_end, 1.0, -torch.expm1(-0.025 * q / (1 - q)))

    def average_velocity(self, net, z, r, t, y):
        """F(z, r, t), (B, ...) like z."""
        return net(z, r, t, y).to(z.dtype)

    def sample(self, net, z1, y, **options):
        """Data (B, ...) from noise z1 (B, ...); the options are those of ``sample``."""
        return sample(self.sampled(net), z1, y, **options)


@torch.no_grad()
def sample(net, z1, y, *, steps=1, noise=()):
    """Data (B, ...) from noise z1 (B, ...) and labels or other conditions y.

    One step is MeanFlow's. Each later one begins with new noise: z = (1-t) x + t n, with x the data
    that the step before gives. noise: these n, a tensor like z1 for each step after the first.
    steps: a count of equal steps, or decreasing times from 1 (noise) to 0. Raises ValueError for
    such times and for another number of noises.
    """
    times = schedule(steps)[:-1]
    if len(noise) != len(times) - 1:
        raise ValueError(f"noise must be {len(times) - 1} tensors, one for each step after the "
                         f"first, got {len(noise)}")
    z = z1
    for t, later, n in zip(times, [*times[1:], 0.0], [*noise, torch.zeros_like(z1)], strict=True):
        x = z - t * net(z, z.new_zeros(len(z)), z.new_full((len(z),), t), y).to(z.dtype)
        z = (1 - later) * x + later * n
    return z
