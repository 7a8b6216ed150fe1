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
from types import MappingProxyType

import torch

import meanflow
from meanflow import (
    Draws,
    LogitNormalTimes,
    Loss,
    attention_in_bfloat16,
    on_path,
    per_row,
    rows_of,
    setting,
    total_derivative,
)


@dataclass(frozen=True)
class ImprovedDraws(Draws):
    """All random numbers of a step. B rows, of which the first ``equal`` have r = t."""

    omega: torch.Tensor  # (B,) guidance scale, 1 or more
    t_min: torch.Tensor  # (B,) in [0, 0.5], where guidance begins to act
    t_max: torch.Tensor  # (B,) in [0.5, 1], where it ends


# omega and interval of the published FIDs in one step, searched by their authors for the best one
# (Lyy-iiis/imeanflow, configs/eval_config.yml)
PUBLISHED_GUIDANCE = {"iMF-B/2": (8.0, 0.4, 0.65), "iMF-M/2": (10.5, 0.4, 0.6),
                      "iMF-L/2": (10.5, 0.4, 0.6), "iMF-XL/2": (8.0, 0.42, 0.62)}


class ImprovedMeanFlow(LogitNormalTimes):
    """The objective of arXiv 2512.02012. Settings beside those of LogitNormalTimes:

    omega_max: largest guidance scale; 1 means no guidance.
    beta: the density of omega falls as omega^-beta.
    """

    ratio: float = 0.5
    omega_max: float = setting(8.0, "[1, inf)",
                               "largest guidance scale that is learnt, 1 = no guidance")
    beta: float = setting(1.0, "[0, inf)", "guidance scales are drawn with density ~ omega^-beta")

    inputs = (*LogitNormalTimes.inputs, "omega", "t_min", "t_max")
    keywords = ("heads",)
    passes = ("velocity", "time_derivative")
    run_names = MappingProxyType({"omega_max": "omega"})
    normalises_channels = True

    def draw(self, shape, **options):
        """ImprovedDraws for a batch of this shape (B, ...); the options are Method.draw's."""
        draws = super().draw(shape, **options)
        uniform = torch.rand(3, shape[0], device=options.get("device"),
                             generator=options.get("generator"))
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

    def loss(self, net, x, y, draws, *, forward=None):
        """The Loss of data x (B, ...) with conditions y, as drop takes them, under these draws.

        error and velocity_error are those of u and of v. net and forward: as for MeanFlow.loss.
        """
        z, velocity = on_path(x, draws)
        forward = net if forward is None else forward
        u, v = forward(z, draws.r, draws.t, self.drop(y, draws.dropped), draws.omega, draws.t_min,
                       draws.t_max)
        u, v = u.to(z.dtype), v.to(z.dtype)
        target, v_g = self.targets(net, z, velocity, y, draws, v.detach())
        error = (u - target).square().flatten(1).sum(1)
        velocity_error = (v - v_g).square().flatten(1).sum(1)
        weighted = self.weight(error) * error + self.weight(velocity_error) * velocity_error
        return Loss(weighted.mean(), error.detach(), velocity_error.detach())

    @torch.no_grad()
    def targets(self, net, z, velocity, y, draws, v):
        """The targets of u and v, each (B, ...), without gradient.

        velocity: eps - x. y: the conditions before the drop; v: the network's with those after it.
        """
        # The rows with r < t are the tail, one static slice. On the others v is v_c already, except
        # where the label is dropped, and those rows do not use v_c
        tail = slice(draws.equal, None)
        inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
        w = torch.where(inside, draws.omega, 1)
        v_c = v[tail]
        if draws.equal < len(z):
            v_c = self.velocity(net, z[tail], draws.t[tail], rows_of(y, tail), w[tail])
        v_g = velocity
        if self.omega_max > 1:
            null = self.drop(y, torch.ones_like(draws.dropped))
            v_u = self.velocity(net, z, draws.t, null, torch.ones_like(w))
            guidance = torch.cat([v[:draws.equal], v_c]) - v_u
            v_g = velocity + per_row(1 - 1 / w, z) * guidance
            v_g = torch.where(per_row(draws.dropped, z), velocity, v_g)
        if draws.equal == len(z):
            return v_g, v_g
        rows = rows_of((z, draws.r, draws.t, self.drop(y, draws.dropped), draws.omega, draws.t_min,
                        draws.t_max), tail)
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

    def sample(self, net, z1, y, **options):
        """Data (B, ...) from noise z1 (B, ...); the options are those of ``sample``."""
        return sample(self.sampled(net), z1, y, **options)

    @staticmethod
    def guidance(config):
        """omega and interval: the published ones of the network's size, else omega 1, none, where
        nothing is published for its size or for its training."""
        omega, *interval = 1.0, 0.0, 1.0
        if ((config.get("omega_max") or 8) >= 8 and config["vae"] != "none"
                and not (config.get("sizes") or {}).keys() - {"v_head"}):
            omega, *interval = PUBLISHED_GUIDANCE.get(config["model"], (omega, *interval))
        return {"omega": omega, "interval": interval}


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
