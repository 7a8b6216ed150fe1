"""Improved MeanFlow (Geng et al., arXiv 2512.02012) as one loss and one sampler.

The network learns two velocities, the average u and the instantaneous v, for every guidance scale
omega and every interval [t_min, t_max] of times in which guidance acts. They are its inputs. A
training step, for data x with labels y:

    r, t, eps, z   as in meanflow.py; a share ``ratio`` of the rows has r < t
    t_min, t_max = uniform in [0, .5] and [.5, 1]; 0 and 1 where r = t
    omega = in [1, omega_max] with density ~ omega^-beta
    w    = omega where t_min <= t <= t_max, else 1
    v_c  = v(z; w, y),  v_u = v(z; 1, null)               at r = t, guided in [0, 1]
    v_g  = eps - x + (1 - 1/w) (v_c - v_u)                                 guided velocity
    y    = null, and v_g = eps - x, where the label is dropped
    u, v = net(z, r, t, y, omega, t_min, t_max)
    du/dt = Jacobian-vector product of u with tangent (v_c, 0, 1) for (z, r, t)
    error of u = |u - stopgrad(v_g - (t-r) du/dt)|^2
    error of v = |v - stopgrad(v_g)|^2
    loss = mean of the sum of both, each divided by stopgrad(error + c)^p

At the fixed point v_c is the guided velocity of scale omega, so one evaluation samples with
guidance: z0 = z1 - u(z1, 0, 1; y, omega, t_min, t_max).

``net`` is any callable (z, r, t, y, omega, t_min, t_max, heads="uv") -> (u, v); heads="u" or "v"
asks for one and gets None for the other. Which rows have r = t or lose their label, and the
interval [0, 1] where r = t, are as in the official implementation (Lyy-iiis/imeanflow).
"""

import math
from dataclasses import dataclass

import torch

import meanflow
from meanflow import (
    Draws,
    Loss,
    MeanFlow,
    SettingError,
    attention_in_bfloat16,
    per_row,
    total_derivative,
)


@dataclass(frozen=True)
class ImprovedDraws(Draws):
    """All random numbers of a step. B rows, of which the first ``equal`` have r = t."""

    omega: torch.Tensor  # (B,) guidance scale, 1 or more
    t_min: torch.Tensor  # (B,) in [0, 0.5], where guidance begins to act
    t_max: torch.Tensor  # (B,) in [0.5, 1], where it ends

    def part(self, i, n):
        """Rows i, i + n, i + 2n, ... : the share of rank (or micro-batch) i of n."""
        rows = slice(i, None, n)
        return ImprovedDraws(**vars(super().part(i, n)), omega=self.omega[rows],
                             t_min=self.t_min[rows], t_max=self.t_max[rows])


class ImprovedMeanFlow(MeanFlow):
    """The training objective: ``draw``, then ``loss``.

    num_classes, ratio, p_mean, p_std, label_drop, p, c: as for MeanFlow.
    omega_max: largest guidance scale, 1 or more; 1 means no guidance.
    beta: the density of omega falls as omega^-beta; 0 or more.

    Raises SettingError for a setting out of its range.
    """

    def __init__(self, *, num_classes, ratio=0.5, p_mean=-0.4, p_std=1.0, omega_max=8.0, beta=1.0,
                 label_drop=0.1, p=1.0, c=0.01):
        super().__init__(num_classes=num_classes, ratio=ratio, p_mean=p_mean, p_std=p_std,
                         label_drop=label_drop, p=p, c=c)
        for name, value, low in (("omega_max", omega_max, 1), ("beta", beta, 0)):
            if not low <= value < math.inf:
                raise SettingError(name, f"must be {low} or more and finite, got {value}; choose "
                                         f"another value")
        self.omega_max, self.beta = omega_max, beta

    # ---- the draws: all randomness is here ---------------------------------------------------

    def draw(self, shape, *, device=None, generator=None):
        """ImprovedDraws for a batch of this shape (B, ...), float32, on device."""
        draws = super().draw(shape, device=device, generator=generator)
        uniform = torch.rand(3, shape[0], device=device, generator=generator)
        t_min, t_max = uniform[0] / 2, (1 + uniform[1]) / 2
        t_min[:draws.equal], t_max[:draws.equal] = 0, 1
        return ImprovedDraws(**vars(draws), omega=self.scale(uniform[2]), t_min=t_min, t_max=t_max)

    def scale(self, uniform):
        """omega (B,) in [1, omega_max] by uniform (B,): the inverse of its distribution."""
        if self.beta == 1:
            return self.omega_max ** uniform
        power = 1 - self.beta  # expm1 and log1p: near beta = 1 the plain formula would cancel
        area = math.expm1(power * math.log(self.omega_max))
        return torch.exp(torch.log1p(uniform * area) / power)

    # ---- the loss: a function of weights, data and draws -------------------------------------

    def loss(self, net, x, y, draws, *, forward=None):
        """The Loss of data x (B, ...) with labels y (B,) int64 under these draws.

        error and velocity_error are those of u and of v. net and forward: as for MeanFlow.loss.
        """
        t = per_row(draws.t, x)
        z = (1 - t) * x + t * draws.eps
        y_input = torch.where(draws.dropped, self.num_classes, y)
        forward = net if forward is None else forward
        u, v = forward(z, draws.r, draws.t, y_input, draws.omega, draws.t_min, draws.t_max)
        u, v = u.to(z.dtype), v.to(z.dtype)
        target, v_g = self.targets(net, z, draws.eps - x, y, draws, v.detach())
        error = (u - target).square().flatten(1).sum(1)
        velocity_error = (v - v_g).square().flatten(1).sum(1)
        weighted = self.weight(error) * error + self.weight(velocity_error) * velocity_error
        return Loss(weighted.mean(), error.detach(), velocity_error.detach())

    @torch.no_grad()
    def targets(self, net, z, velocity, y, draws, v):
        """The targets of u and v, each (B, ...), without gradient.

        velocity: eps - x. y (B,): the labels before the drop; v: the network's with those after it.
        """
        # The rows with r < t are the tail, one static slice. On the others v is v_c already, except
        # where the label is dropped, and those rows do not use v_c
        tail = slice(draws.equal, None)
        inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
        w = torch.where(inside, draws.omega, 1)
        v_c = v[tail]
        if draws.equal < len(y):
            v_c = self.velocity(net, z[tail], draws.t[tail], y[tail], w[tail])
        v_g = velocity
        if self.omega_max > 1:
            null = torch.full_like(y, self.num_classes)
            v_u = self.velocity(net, z, draws.t, null, torch.ones_like(w))
            guidance = torch.cat([v[:draws.equal], v_c]) - v_u
            v_g = velocity + per_row(1 - 1 / w, z) * guidance
            v_g = torch.where(per_row(draws.dropped, z), velocity, v_g)
        if draws.equal == len(y):
            return v_g, v_g
        y = torch.where(draws.dropped, self.num_classes, y)
        rows = [a[tail] for a in (z, draws.r, draws.t, y, draws.omega, draws.t_min, draws.t_max)]
        z, r, t, *_ = rows
        with attention_in_bfloat16():
            du_dt = self.time_derivative(net, *rows, v_c)
        return torch.cat([v_g[:draws.equal], v_g[tail] - per_row(t - r, z) * du_dt]), v_g

    def velocity(self, net, z, t, y, omega):
        """v (B, ...) like z at r = t, with guidance of scale omega (B,) at all times."""
        v = net(z, t, t, y, omega, torch.zeros_like(t), torch.ones_like(t), heads="v")[1]
        return v.to(z.dtype)

    def time_derivative(self, net, z, r, t, y, omega, t_min, t_max, tangent):
        """du/dt along the path, (B, ...) like z, where dz/dt is tangent."""
        return total_derivative(
            lambda z, r, t: net(z, r, t, y, omega, t_min, t_max, heads="u")[0], z, r, t, tangent)


def sample(net, z1, y, *, steps=1, omega=8.0, interval=(0.4, 0.65)):
    """Data (B, ...) from noise z1 (B, ...) and labels y (B,), guided by omega in the interval.

    Each step is z_r = z_t - (t-r) u(z_t, r, t, y, omega, t_min, t_max); guidance costs nothing, and
    omega = 1 with the interval (0, 1) is none. The defaults are the published ones of iMF-B/2 in
    one step. steps: as for meanflow.sample. Raises ValueError for omega below 1, an interval that
    is none, and steps as meanflow.sample does.
    """
    t_min, t_max = interval
    if not 1 <= omega < math.inf:
        raise ValueError(f"omega must be 1 or more and finite, got {omega}")
    if not 0 <= t_min <= t_max <= 1:
        raise ValueError(f"interval must be two increasing times in [0, 1], got {t_min} {t_max}")
    guidance = [z1.new_full((len(z1),), value) for value in (omega, t_min, t_max)]
    return meanflow.sample(lambda z, r, t, y: net(z, r, t, y, *guidance, heads="u")[0], z1, y,
                           steps=steps)
