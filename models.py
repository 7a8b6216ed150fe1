"""The network: a DiT (Peebles & Xie, arXiv 2212.09748) for the average velocity u(z, r, t).

It is conditioned on two times and a label. Architecture, initialisation and sizes are those of the
official MeanFlow implementation (Gsunshine/meanflow), which differs from the original DiT in three
places: a second embedder for the interval t - r, times in [0, 1] that are not multiplied by 1000,
and no variance channels in the output.
"""

import math
from functools import partial

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint


class TimestepEmbedder(nn.Module):
    """Embeds times in [0, 1], or intervals between two times: (B,) -> (B, D)."""

    def __init__(self, hidden_size, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def features(self, t):
        """(B,) times -> (B, frequencies): cosines, then sines, of t * 10000^(-i / half)."""
        half = self.frequencies // 2
        i = torch.arange(half, dtype=t.dtype, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) * i / half)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t):
        # The JVP differentiates with respect to t: bfloat16 would leave it three digits
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(self.features(t))


class LabelEmbedder(nn.Module):
    """Embeds labels (B,) int64 in 0 .. num_classes, the null label: -> (B, D)."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


def modulate(x, shift, scale):
    """x (B, T, D) times 1 + scale, plus shift; shift and scale are (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """A transformer block (B, T, D), (B, D) -> (B, T, D) with adaptive layer norm: the condition c
    gives shift, scale and gate."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        gelu = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Maps tokens to patches: (B, T, D), (B, D) -> (B, T, patch_size^2 * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The average velocity u(z, r, t) given a label y.

    ``net(z, r, t, y)``: z (B, C, H, W) float; r, t (B,) float with 0 <= r <= t <= 1, where t = 1
    is noise; y (B,) int64 in 0 .. num_classes, num_classes being the null label. Returns
    (B, C, H, W). u(z, t, t, y) is the instantaneous velocity. Set ``checkpoint_activations`` to
    recompute the blocks in the backward pass instead of keeping their activations.

    Raises ValueError where the sizes do not fit together.
    """

    def __init__(self, *, input_size=32, patch_size=4, in_channels=4, hidden_size=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, num_classes=1000):
        super().__init__()
        if input_size < 1 or input_size % patch_size:
            raise ValueError(f"input size {input_size} is not a multiple of patch size "
                             f"{patch_size}; choose another image size or a model with another "
                             f"patch size")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden size {hidden_size} is not a multiple of 4 and of the "
                             f"{num_heads} heads; choose a hidden size that is")
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.num_classes = in_channels, num_classes
        self.checkpoint_activations = False

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.r_embedder = TimestepEmbedder(hidden_size)  # embeds t - r (paper, Table 1c)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        grid = input_size // patch_size
        self.register_buffer("pos_embed", sincos_table(hidden_size, grid))
        self.blocks = nn.ModuleList(
            [DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for the transformer, N(0, 0.02) for embedders, zeros where u must start at 0."""
        # Every linear layer of the blocks; fused qkv counts as one matrix of 3D rows
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        # The patch embedding is a linear layer on flattened patches, not a convolution
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)

        # Embedders of label, time and interval
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.r_embedder):
            for linear in (embedder.mlp[0], embedder.mlp[2]):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

        # Zero gates make every block the identity, a zero output layer makes u = 0
        zeroed = [block.adaLN_modulation[1] for block in self.blocks]
        for linear in (*zeroed, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def unpatchify(self, x):
        """(B, T, p * p * C), channels fastest -> (B, C, H, W)."""
        grid, p = self.input_size // self.patch_size, self.patch_size
        x = x.reshape(-1, grid, grid, p, p, self.in_channels)  # (B, row, column, p, q, C)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, row, p, column, q)
        return x.reshape(-1, self.in_channels, self.input_size, self.input_size)

    def forward(self, z, r, t, y):
        x = self.x_embedder(z) + self.pos_embed  # (B, T, D), T = (H / patch_size)^2
        c = self.t_embedder(t) + self.r_embedder(t - r) + self.y_embedder(y)  # (B, D)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False) if recompute else block(x, c)
        x = self.final_layer(x, c)  # (B, T, p * p * C)
        return self.unpatchify(x)  # (B, C, H, W)


def sincos_table(hidden_size, grid):
    """The fixed position table (1, grid^2, hidden_size), as in MAE (arXiv 2111.06377).

    The first half of the channels encodes the column, the second the row, each as sines, then
    cosines, with wavelengths in geometric progression.
    """
    i = torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] / 10000**i  # (grid, D / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D / 2)
    column = axis.expand(grid, grid, -1)
    row = axis[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, hidden_size).float()


# depth, hidden size, heads; parameters at patch 2 with 4 channels and 1,000 classes
SIZES = {
    "T": (4, 96, 3),  # 0.8 M, for tests and the quickstart
    "S": (12, 384, 6),  # 33.1 M
    "B": (12, 768, 12),  # 131.1 M
    "M": (16, 1024, 16),  # 308.0 M
    "L": (24, 1024, 16),  # 459.1 M
    "XL": (28, 1152, 16),  # 676.4 M
}

# The table: "DiT-B/4" -> constructor, to which input_size, in_channels and num_classes are given
DiT_models = {
    f"DiT-{size}/{patch}": partial(
        DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch
    )
    for size, (depth, width, heads) in SIZES.items()
    for patch in (2, 4, 8)
}


def build(config):
    """The network that a config describes, freshly initialised.

    config: a dict with model, a name of the table, latent_shape (C, H, W), num_classes. Raises
    ValueError for an unknown name and for sizes that do not fit together.
    """
    if config["model"] not in DiT_models:
        raise ValueError(f"--model must be one of {', '.join(DiT_models)}, got {config['model']}")
    channels, height, _ = config["latent_shape"]
    return DiT_models[config["model"]](
        input_size=height, in_channels=channels, num_classes=config["num_classes"])
