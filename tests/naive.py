"""A MeanFlow step as one would write it down first: the readable oracle of the fast one."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def naive_step(net, x, y, draws, *, num_classes, omega, kappa, interval, p, c):
    """(loss with gradient, errors (B,)): every pass on the whole batch, in the paper's order."""
    column = (-1, *[1] * (x.ndim - 1))  # times (B,) beside data (B, ...)
    r, t, dropped = (a.reshape(column) for a in (draws.r, draws.t, draws.dropped))
    z, v = (1 - t) * x + t * draws.eps, draws.eps - x
    with torch.no_grad():
        v_null = net(z, draws.t, draws.t, torch.full_like(y, num_classes))
        v_label = net(z, draws.t, draws.t, y)
    v_g = omega * v + (1 - omega - kappa) * v_null + kappa * v_label  # Eq. 20
    v_g = torch.where((t >= interval[0]) & (t <= interval[1]) & ~dropped, v_g, v)
    y = torch.where(draws.dropped, num_classes, y)
    with sdpa_kernel(SDPBackend.MATH):
        u, du_dt = torch.func.jvp(
            lambda z, r, t: net(z, r, t, y), (z, draws.r, draws.t),
            (v_g, torch.zeros_like(draws.r), torch.ones_like(draws.t)))
    target = (v_g - (t - r) * du_dt).detach()  # Eq. 10
    error = (u - target).square().flatten(1).sum(1)
    return (error / (error.detach() + c) ** p).mean(), error.detach()  # Eq. 22
