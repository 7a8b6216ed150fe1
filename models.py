"""The networks, and the table of their sizes.

DiT (Peebles & Xie, arXiv 2212.09748) for the average velocity u(z, r, t), as in the official
MeanFlow (Gsunshine/meanflow): with a second embedder for the interval t - r, times in [0, 1] that
are not multiplied by 1000, and no variance channels in the output.

ImprovedDiT for improved MeanFlow (arXiv 2512.02012), as in the official Lyy-iiis/imeanflow:
conditions are tokens before the patches; two heads give u and the instantaneous velocity v.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class TimestepEmbedder(nn.Module):
    """Embeds times in [0, 1], or intervals between two times: (B,) -> (B, D)."""

    def __init__(self, hidden_size, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def features(self, t):
        """(B,) times -> (B, frequencies): cosines, then sines, of t * 10000^(-i / half)."""
        half = self.frequencies // 2
        i = torch.arange(half, dtype=t.dtype, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) * i / half)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t):
        # The JVP differentiates with respect to t: bfloat16 would leave it three digits
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Embeds labels (B,) int64 in 0 .. num_classes, the null label: -> (B, D)."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """Maps patches to tokens: (B, C, H, W) -> (B, T, D), T = (H / patch_size)^2."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Attention of all tokens (B, T, D) to all, by several heads."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers on each token (B, T, D), of so many numbers in between."""

    def __init__(self, hidden_size, width):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """x (B, T, D) times 1 + scale, plus shift; shift and scale are (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """A block (B, T, D), (B, D) -> (B, T, D): the condition c gives shifts, scales and gates."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
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
        check_sizes(input_size, patch_size, hidden_size, num_heads)
        self.patch_size, self.num_classes = patch_size, num_classes
        self.checkpoint_activations = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.r_embedder = TimestepEmbedder(hidden_size)  # embeds t - r (paper, Table 1c)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        grid = input_size // patch_size
        self.register_buffer("pos_embed", sincos_table(hidden_size, grid))
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for the transformer, N(0, 0.02) for embedders, zeros where u must start at 0."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):  # fused qkv counts as one matrix of 3D rows
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer on flattened patches, not a convolution
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
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

    def forward(self, z, r, t, y):
        x = self.x_embedder(z) + self.pos_embed  # (B, T, D), T = (H / patch_size)^2
        c = self.t_embedder(t) + self.r_embedder(t - r) + self.y_embedder(y)  # (B, D)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=False) if recompute else block(x, c)
        x = self.final_layer(x, c)  # (B, T, p * p * C)
        return unpatchify(x, self.patch_size)  # (B, C, H, W)


def check_sizes(input_size, patch_size, hidden_size, num_heads):
    """Raise ValueError where the sizes of a network do not fit together."""
    if input_size < 1 or input_size % patch_size:
        raise ValueError(f"input size {input_size} is not a multiple of patch size {patch_size}; "
                         f"choose another image size or model")
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden size {hidden_size} is not a multiple of 4 and of the "
                         f"{num_heads} heads; choose a hidden size that is")


def unpatchify(x, p):
    """Patches (B, T, p * p * C), channels fastest -> image (B, C, H, W) with H = W."""
    grid = math.isqrt(x.shape[1])
    # Not unflatten: the compiler of torch 2.11 cannot trace it within ForwardModeRules
    x = x.reshape(len(x), grid, grid, p, p, -1)  # (B, row, column, p, q, C)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, row, p, column, q)
    return x.flatten(4).flatten(2, 3)  # (B, C, H, W)


def sincos_table(hidden_size, grid):
    """The fixed position table (1, grid^2, hidden_size) of MAE (arXiv 2111.06377): half of the
    channels encode the column, then half the row, each as sines, then cosines."""
    i = torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] / 10000**i  # (grid, D / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D / 2)
    column = axis.expand(grid, grid, -1)
    row = axis[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(1, grid * grid, hidden_size).float()


# ---- the network of improved MeanFlow ------------------------------------------------------------


class ImprovedDiT(nn.Module):
    """The average velocity u and the instantaneous velocity v, given a label and guidance.

    ``net(z, r, t, y, omega, t_min, t_max)``: z, r, t, y as for DiT; omega (B,) the guidance scale,
    1 or more, which acts at times from t_min to t_max, both (B,) in [0, 1]. Returns (u, v), each
    (B, C, H, W). heads: "uv", or "u" or "v" alone, which saves the other head's blocks and returns
    None in its place; by default all that there are. Of the times only t - r is an input.

    depth counts the blocks of the u path: depth - head_depth shared ones, then head_depth of the u
    head; the v head has as many. v_head=False leaves it out: sampling needs u alone. Set
    ``checkpoint_activations`` to recompute the blocks in the backward pass.

    Raises ValueError where the sizes do not fit together.
    """

    def __init__(self, *, input_size=32, patch_size=2, in_channels=4, hidden_size=768, depth=12,
                 head_depth=8, num_heads=12, num_classes=1000, v_head=True):
        super().__init__()
        check_sizes(input_size, patch_size, hidden_size, num_heads)
        if not 0 < head_depth < depth:
            raise ValueError(f"head depth {head_depth} is not between 0 and the depth {depth}")
        if hidden_size // num_heads % 2:
            raise ValueError(f"{hidden_size // num_heads} channels a head are not an even number")
        self.patch_size, self.num_classes = patch_size, num_classes
        self.checkpoint_activations = False

        def tokens(count):
            return nn.Parameter(torch.empty(count, hidden_size))

        self.class_tokens, self.omega_tokens = tokens(8), tokens(4)
        self.t_min_tokens, self.t_max_tokens, self.time_tokens = tokens(2), tokens(2), tokens(4)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.omega_embedder = TimestepEmbedder(hidden_size)  # names as in the official state dict
        self.cfg_t_start_embedder = TimestepEmbedder(hidden_size)
        self.cfg_t_end_embedder = TimestepEmbedder(hidden_size)
        self.h_embedder = TimestepEmbedder(hidden_size)  # of h = t - r
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        length = 20 + (input_size // patch_size)**2  # conditions, then patches
        self.register_buffer("rope", rotary_table(hidden_size // num_heads, length),
                             persistent=False)

        def blocks(count):
            return nn.ModuleList(ImprovedBlock(hidden_size, num_heads) for _ in range(count))

        self.shared_blocks = blocks(depth - head_depth)
        self.u_heads, self.v_heads = blocks(head_depth), blocks(head_depth if v_head else 0)
        patch = patch_size**2 * in_channels
        self.u_final_layer = ImprovedFinalLayer(hidden_size, patch)
        self.v_final_layer = ImprovedFinalLayer(hidden_size, patch) if v_head else None
        self.initialize_weights()

    def initialize_weights(self):
        """Normals scaled by the fan-in; gates and output layers start at 0, so u = v = 0."""
        width = self.class_tokens.shape[1]
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = 1 if "embedder" in name else 0.32
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.class_tokens, self.omega_tokens, self.t_min_tokens, self.t_max_tokens,
                      self.time_tokens, self.y_embedder.embedding_table.weight):
            nn.init.normal_(table, std=1 / math.sqrt(width))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in filter(None, (self.u_final_layer, self.v_final_layer)):
            nn.init.zeros_(layer.linear.weight)

    def sequence(self, z, h, y, omega, t_min, t_max):
        """(B, N, D): tokens of the class, omega, interval and h, then the patches of z."""
        conditions = ((self.class_tokens, self.y_embedder(y)),
                      (self.omega_tokens, self.omega_embedder(1 - 1 / omega)),
                      (self.t_min_tokens, self.cfg_t_start_embedder(t_min)),
                      (self.t_max_tokens, self.cfg_t_end_embedder(t_max)),
                      (self.time_tokens, self.h_embedder(h)))
        tokens = [tokens + condition[:, None] for tokens, condition in conditions]
        return torch.cat([*tokens, self.x_embedder(z)], dim=1)

    def forward(self, z, r, t, y, omega, t_min, t_max, heads=None):
        x = self.sequence(z, t - r, y, omega, t_min, t_max)  # (B, N, D), N = 20 + (H / p)^2
        x = self.through(self.shared_blocks, x)
        paths = {"u": (self.u_heads, self.u_final_layer), "v": (self.v_heads, self.v_final_layer)}
        velocities = {}
        for head in heads or ("uv" if self.v_final_layer else "u"):
            blocks, final_layer = paths[head]
            patches = self.through(blocks, x)[:, 20:]  # (B, T, D)
            velocities[head] = unpatchify(final_layer(patches), self.patch_size)  # (B, C, H, W)
        return velocities.get("u"), velocities.get("v")

    def through(self, blocks, x):
        """(B, N, D) -> (B, N, D) through blocks."""
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in blocks:
            x = (checkpoint(block, x, self.rope, use_reentrant=False) if recompute
                 else block(x, self.rope))
        return x


class ImprovedBlock(nn.Module):
    """A transformer block (B, N, D) -> (B, N, D) with RMSNorm, rotary attention and SwiGLU, each
    branch scaled by a learned vector. No linear layer has a bias."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden_size, eps=1e-6)
        self.attn = RotaryAttention(hidden_size, num_heads)
        self.norm2 = nn.RMSNorm(hidden_size, eps=1e-6)
        self.mlp = SwiGLU(hidden_size, int(hidden_size * 8 / 3))
        self.attn_scale = nn.Parameter(torch.zeros(hidden_size))
        self.mlp_scale = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x, rope):
        x = x + self.attn_scale * self.attn(self.norm1(x), rope)
        return x + self.mlp_scale * self.mlp(self.norm2(x))


class RotaryAttention(nn.Module):
    """Attention of all tokens (B, N, D): queries and keys are normalised, then rotated."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)

    def forward(self, x, rope):
        q, k, v = (layer(x).reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))  # (B, H, N, d)
        precise = self.q_norm.weight.dtype  # float32 also under autocast, as official
        q, k = self.q_norm(q.to(precise)), self.k_norm(k.to(precise))
        q, k = (rotate(a, rope).to(v.dtype) for a in (q, k))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x): (B, N, D) -> (B, N, D), M wide in between."""

    def __init__(self, hidden_size, width):
        super().__init__()
        self.w1 = nn.Linear(hidden_size, width, bias=False)
        self.w3 = nn.Linear(hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ImprovedFinalLayer(nn.Module):
    """Maps tokens to patches: (B, T, D) -> (B, T, patch_size^2 * out_channels)."""

    def __init__(self, hidden_size, patch):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch)

    def forward(self, x):
        return self.linear(self.norm(x))


def rotary_table(width, length):
    """Cosines and sines (2, N, d / 2) of position * 10000^(-2i / d) (arXiv 2104.09864)."""
    frequencies = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # (N, d / 2)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x, rope):
    """x (B, H, N, d), each pair of neighbouring channels turned by its angle."""
    (a, b), (cos, sin) = (x[..., 0::2], x[..., 1::2]), rope
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(3)


# ---- sizes ---------------------------------------------------------------------------------------


# depth, hidden size, heads; parameters at patch 2 with 4 channels and 1,000 classes
SIZES = {
    "T": (4, 96, 3),  # 0.8 M, for tests and the quickstart
    "S": (12, 384, 6),  # 33.1 M
    "B": (12, 768, 12),  # 131.1 M
    "M": (16, 1024, 16),  # 308.0 M
    "L": (24, 1024, 16),  # 459.1 M
    "XL": (28, 1152, 16),  # 676.4 M
}

# depth, head depth, hidden size, heads, patch; parameters with the v head and without it
IMPROVED_SIZES = {
    "T/4": (4, 2, 96, 3, 4),  # for tests and the digits
    "B/2": (12, 8, 768, 12, 2),  # 145.6 M, 88.9 M
    "M/2": (24, 8, 768, 12, 2),  # 230.6 M, 173.9 M
    "L/2": (32, 8, 1024, 16, 2),  # 509.8 M, 409.1 M
    "XL/2": (48, 8, 1024, 16, 2),  # 711.1 M, 610.4 M
}

# The table: "DiT-B/4" -> constructor, to which input_size, in_channels and num_classes are given
DiT_models = {
    f"DiT-{size}/{patch}": partial(
        DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for size, (depth, width, heads) in SIZES.items()
    for patch in (2, 4, 8)
} | {
    f"iMF-{size}": partial(
        ImprovedDiT, depth=depth, head_depth=head_depth, hidden_size=width, num_heads=heads,
        patch_size=patch)
    for size, (depth, head_depth, width, heads, patch) in IMPROVED_SIZES.items()
}
# Networks outside the table, whose sizes the config has
FAMILIES = {"DiT": DiT, "iMF": ImprovedDiT}


def constructor_of(name):
    """The constructor of the network of this name. Raises ValueError for an unknown name."""
    networks = DiT_models | FAMILIES
    if name not in networks:
        raise ValueError(f"no network is called {name!s:.60}; there are {', '.join(DiT_models)}")
    return networks[name]


def network_class(name):
    """The class of the network of this name, or None where a function makes it."""
    constructor = constructor_of(name)
    network = getattr(constructor, "func", constructor)
    return network if isinstance(network, type) else None


def describe(config):
    """The name of a config's network, with the sizes that its name does not tell."""
    return ", ".join([config["model"], *(f"{name} {value}" for name, value in
                                         (config.get("sizes") or {}).items())])


def build(config):
    """The network that a config describes, freshly initialised.

    config: as for arguments. Raises ValueError for an unknown name and for sizes that do not fit
    together.
    """
    return constructor_of(config["model"])(**arguments(config))


def arguments(config):
    """The arguments, by name, with which a config's network is made.

    config: a dict with model, a name of DiT_models or FAMILIES, latent_shape (C, ...), num_classes
    and perhaps sizes, which replace the table's. C is in_channels; input_size is the side of
    squares (C, H, H) and the length of signals (C, L), else the tuple of sizes.
    """
    channels, *sides = config["latent_shape"]
    return getattr(constructor_of(config["model"]), "keywords", {}) | dict(
        input_size=sides[0] if len(set(sides)) == 1 else tuple(sides),
        in_channels=channels, num_classes=config["num_classes"], **(config.get("sizes") or {}))
