"""A tutorial on points in the plane. meanflow.ipynb is the same, with its pictures.

    python examples/meanflow_2d.py    # from the repository's root; shows each picture in a window

"# %%" opens a cell, as editors know it. After a change write the notebook anew:
python examples/make_notebook.py.
"""

# %% [markdown]
# # MeanFlow in two dimensions
#
# Flow matching learns a velocity and needs many small steps to turn noise into data.
# MeanFlow ([arXiv 2505.13447](https://arxiv.org/abs/2505.13447)) learns the *average* velocity
# and needs one. Here both learn two moons, points of the plane, within a minute on a CPU. In the
# plane one can see what they do.
#
# The loss and the sampler are those that `train.py` uses for images. To run this yourself,
# install what `requirements.txt` lists, and start in the repository's root or in `examples/`.

# %%
import sys
import time

import matplotlib.pyplot as plt
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import make_moons
from torch import nn

sys.path.insert(0, "..")
sys.path.insert(0, ".")  # the repository's root is one of the two
from meanflow import MeanFlow, sample

COLORS = ("tab:blue", "tab:orange")  # of the two labels

# %% [markdown]
# ## Data, noise, and the path between them
#
# A data point $x$ has a label $y$: the moon it lies on. Noise $\epsilon$ is standard normal. The
# path from one to the other is a straight line, with time $t = 0$ at the data and $t = 1$ at the
# noise, and its velocity is constant:
#
# $$z_t = (1-t)\,x + t\,\epsilon, \qquad v = \epsilon - x.$$


# %%
def two_moons(count, seed):
    """Points x (count, 2), float32, and labels y (count,), 0 or 1."""
    x, y = make_moons(count, noise=0.06, random_state=seed)
    x = torch.tensor(x, dtype=torch.float32) - torch.tensor([0.5, 0.25])
    return 1.5 * x, torch.tensor(y)


def scatter(axis, z, y, title):
    """Points z (B, 2), colored by their labels y (B,)."""
    axis.scatter(*z.T, s=3, c=[COLORS[label] for label in y], linewidths=0)
    axis.set(title=title, aspect="equal", xlim=(-3, 3), ylim=(-2.6, 2.6))


# %%
torch.manual_seed(0)
x, y = two_moons(10000, seed=0)
eps = torch.randn(1000, 2)
figure, axes = plt.subplots(1, 4, figsize=(14, 3.3), layout="constrained")
for axis, t in zip(axes, (0.0, 0.3, 0.6, 1.0)):
    z = (1 - t) * x[:1000] + t * eps
    scatter(axis, z, y[:1000], f"$z_t$ at t = {t}")
plt.show()

# %% [markdown]
# ## Two velocities
#
# Many lines cross at a point $z$ at time $t$. Flow matching learns the mean of their velocities,
# the *instantaneous* velocity $v(z, t) = \mathbb{E}[\epsilon - x \mid z_t = z]$. To sample, one
# follows it from noise at $t = 1$ to data at $t = 0$. That path bends, so it takes many steps.
#
# MeanFlow learns where the path leads: the velocity *averaged* along it from $r$ to $t$ (Eq. 3),
#
# $$u(z_t, r, t) = \frac{1}{t-r} \int_r^t v(z_s, s)\,ds,$$
#
# so that one step $z_r = z_t - (t-r)\,u(z_t, r, t)$ is exact, however long it is. No integral is
# computed in training. To differentiate $(t-r)\,u$ by $t$ gives an identity (Eq. 6) whose right
# side is the target of a regression:
#
# $$u(z_t, r, t) = v - (t-r)\,\frac{d}{dt}u(z_t, r, t), \qquad
# \frac{d}{dt}u = v\,\partial_z u + \partial_t u.$$
#
# The derivative is one Jacobian-vector product, taken without gradient. Where $r = t$ it drops
# out: $u(z, t, t)$ is the instantaneous velocity, and flow matching is the special case in which
# all rows have $r = t$.
#
# ## The network
#
# Any callable $(z, r, t, y) \to u$ will do that forward-mode derivatives can pass through. Here it
# is a perceptron with residual connections.


# %%
class MLP(nn.Module):
    """u(z, r, t, y): (B, 2), (B,), (B,), (B,) int64 -> (B, 2)."""

    def __init__(self, width=128, depth=3, num_classes=2):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.labels = nn.Embedding(num_classes + 1, width)  # the last row is the null label
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 2)

    def forward(self, z, r, t, y):
        h = self.first(torch.cat([z, t[:, None], (t - r)[:, None]], dim=1)) + self.labels(y)
        for layer in self.middle:
            h = h + layer(nn.functional.silu(h))
        return self.last(nn.functional.silu(h))


# %% [markdown]
# ## Training
#
# `MeanFlow` holds the objective. `draw` makes all random numbers of a step; `loss` is a function
# of network, data and these numbers. `ratio` is the share of rows with $r < t$: half of them for
# MeanFlow, and none for flow matching. Nothing else differs.
#
# Two settings differ from those for images. Times are uniform. And `p=0` makes the loss plain
# least squares. The paper's adaptive weight, `p=1`, gives rows with a large error less weight. An
# image has thousands of numbers and its rows have similar errors; a row of two numbers has not,
# so here the weight would move the minimum away from the mean. (Try it.)


# %%
def train(ratio, steps=1500, batch=512):
    """A network trained by MeanFlow with this share of rows with r < t."""
    torch.manual_seed(1)
    net = MLP()
    method = MeanFlow(num_classes=2, ratio=ratio, time_sampler="uniform", p=0, label_drop=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,))
        out = method.loss(net, x[rows], y[rows], method.draw((batch, 2)))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.requires_grad_(False)


# %%
began = time.perf_counter()
mean_flow = train(ratio=0.5)
flow_matching = train(ratio=0)
print(f"trained both in {time.perf_counter() - began:.0f} s")

# %% [markdown]
# ## The two fields
#
# Where would a single step from time $t$ to the data end? Each line is such a step, from a point
# $z_t$ of the upper moon's paths to its red end. The upper row takes the step along the
# instantaneous velocity $u(z, t, t)$, the lower row along the average velocity $u(z, 0, t)$ of
# the same network.

# %%
figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
upper = x[y == 0]
for column, t in zip(axes.T, (1.0, 0.6, 0.2)):
    z, times = (1 - t) * upper[:60] + t * eps[:60], torch.full((60,), t)
    labels = torch.zeros(60, dtype=torch.int64)
    for axis, name, r in zip(column, ("u(z, t, t)", "u(z, 0, t)"), (times, 0 * times)):
        end = z - t * mean_flow(z, r, times, labels)
        scatter(axis, upper[:1000], 1000 * [0], f"$z - t\\,{name}$ at t = {t}")
        axis.plot(*torch.stack([z.T, end.T], dim=1), color="gray", linewidth=0.6)
        axis.plot(*end.T, ".", color="crimson")
plt.show()

# %% [markdown]
# At $t = 1$ the noise says nothing about the data, so $v(z, 1) = z - \mathbb{E}[x]$: every step
# along it ends at the mean of the moon, a point where there is no data. The average velocity
# leads each noise to its own place on the moon. The smaller $t$, the less the two differ.
#
# ## One long step equals many short ones
#
# The thin lines follow the instantaneous velocity of the flow matching network from noise
# (circles) to data in 100 steps. The arrows are the single steps of MeanFlow from the same noise.
# They should end where the lines end, although the lines bend and no line was ever shown to the
# network.

# %%
def velocity(z, r, t, y):
    """The instantaneous velocity, in the place of an average one."""
    return flow_matching(z, t, t, y)


z1, labels = eps[:16], torch.arange(16) % 2
times, path = torch.linspace(1, 0, 101).tolist(), [z1]
for t, r in zip(times, times[1:]):
    path.append(sample(velocity, path[-1], labels, steps=[t, r]))
ends = sample(mean_flow, z1, labels)
gap = (ends - path[-1]).norm(dim=1).mean()
print(f"mean distance between the ends of step and line: {gap:.3f}")

# %%
figure, axis = plt.subplots(figsize=(7, 6), layout="constrained")
scatter(axis, x[:2000], y[:2000], "100 steps of flow matching, one step of MeanFlow")
for i, line in enumerate(torch.stack(path, dim=1)):
    axis.plot(*line.T, color="black", linewidth=0.8)
    axis.plot(*z1[i], "o", color=COLORS[labels[i]], markeredgecolor="black", markersize=6)
axis.quiver(*z1.T, *(ends - z1).T, angles="xy", scale_units="xy", scale=1, width=0.004,
            color="crimson")
plt.show()

# %% [markdown]
# ## Samples
#
# A sample of MeanFlow takes one evaluation, $z_0 = z_1 - u(z_1, 0, 1)$ (Eq. 12). Flow matching in
# one step gives the mean of each moon, in two steps something between, and needs many for moons.
#
# One number for each set: pair 1,000 samples with 1,000 points of new data so that the mean
# distance of the pairs is as small as possible. Two sets of data have a distance, too, by chance:
# samples that come near it are as good as data.


# %%
def pairing_distance(a, b):
    """The mean distance of pairs, one of a (B, 2) and one of b (B, 2), in the best pairing."""
    distances = torch.cdist(a, b)
    return distances[linear_sum_assignment(distances.numpy())].mean().item()


x_new, y_new = two_moons(1000, seed=1)
z1 = torch.randn(1000, 2)
samples = {"data": x[:1000]}
for name, net, counts in (("MeanFlow", mean_flow, (1, 2)), ("flow matching", velocity, (1, 2, 50))):
    for steps in counts:
        samples[f"{name}, steps: {steps}"] = sample(net, z1, y_new, steps=steps)

# %%
figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
for axis, (name, points) in zip(axes.flat, samples.items()):
    labels = y[:1000] if name == "data" else y_new
    distance = pairing_distance(points, x_new)
    scatter(axis, points, labels, f"{name} (distance {distance:.3f})")
    print(f"{name:26} {distance:.3f}")
plt.show()

# %% [markdown]
# In places the moons of MeanFlow are too thin, and some points stray. Longer training helps: with
# 2,000 steps of training in place of 1,500 the distance of one step was 0.086.
#
# ## From here to images
#
# * `train.py` runs these lines with a DiT as the network and latents (B, 4, 32, 32) as data. Nor
#   does the method know shapes there: `loss` takes any (B, ...).
# * A null label makes classifier-free guidance part of the target: `label_drop`, `cfg` and
#   `kappa` of `MeanFlow`.
# * The formulas stand in `meanflow.py`, each with the number of its equation.
