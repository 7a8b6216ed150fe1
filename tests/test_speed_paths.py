"""What makes a step fast or small changes its numbers by rounding only: compiled, in parts, with
activations recomputed, in bfloat16; each against the official step's numbers."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_official, assert_official_gradients, golden_step, precisions
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from meanflow import ForwardModeRules

CASES = ["loss_none", "loss_cfg_w3_k0", "loss_cfg_w1_k05"]


def keep_one_block(net):
    """Of each list: more take longer to compile."""
    for blocks in (child for child in net.children() if isinstance(child, nn.ModuleList)):
        del blocks[1:]


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "imf/loss_default"])
def test_compiled_step_equals_the_plain_one(case):
    """As traced and differentiated; test_gpu_check.py makes machine code of it, too."""
    (plain, flow, batch, _), (net, *_) = (golden_step(case) for _ in range(2))
    keep_one_block(plain)
    keep_one_block(net)
    expected = flow.loss(plain, *batch)
    expected.loss.backward()
    flow.compile(backend="aot_eager")
    out = flow.loss(net, *batch, forward=torch.compile(net, backend="aot_eager"))
    out.loss.backward()
    assert_official(out.error, expected.error)
    assert_official(out.velocity_error, expected.velocity_error)
    for a, b in zip(net.parameters(), plain.parameters()):
        assert_official(a.grad, b.grad)


@pytest.mark.parametrize("case", CASES)
@precisions
def test_step_in_parts_with_recomputed_activations_equals_the_official_implementation(case, dtype):
    """The mean gradient of the parts is the batch's."""
    net, flow, (x, y, draws), numbers = golden_step(case, dtype)
    net.checkpoint_activations = True
    for i in range(2):
        out = flow.loss(net, x[i::2], y[i::2], draws.part(i, 2))
        (out.loss / 2).backward()
        assert_official(out.error, numbers["sq_err"][i::2])
    assert_official_gradients(net, numbers, stride=7)


@pytest.mark.slow
def test_parts_of_unequal_shares_compile_and_add_up():
    """Five rows with r = t and three without, in two parts: 3 + 1 and 2 + 2."""
    net, flow, (x, y, draws), _ = golden_step("loss_cfg_w1_k05")
    keep_one_block(net)
    draws = replace(draws, r=draws.r.where(torch.arange(8) != 5, 0.5 * draws.t), equal=5)
    flow.loss(net, x, y, draws).loss.backward()
    whole = gradient(net)
    net.zero_grad()
    flow.compile(backend="aot_eager")
    for i in range(2):
        (flow.loss(net, x[i::2], y[i::2], draws.part(i, 2)).loss / 2).backward()
    assert (gradient(net) - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_bf16_step_is_the_float32_step_to_bfloat16_rounding(case):
    """bfloat16 has 8 bits: each product rounds by up to 2^-9, and an error sums over squares."""
    net, flow, batch, numbers = golden_step(case)
    with torch.autocast("cpu", torch.bfloat16):
        out = flow.loss(net, *batch)
    out.loss.backward()
    bf16 = gradient(net)
    net.zero_grad()
    flow.loss(net, *batch).loss.backward()
    assert out.loss.dtype == out.error.dtype == bf16.dtype == torch.float32
    assert not torch.equal(bf16, gradient(net))
    assert torch.allclose(out.error, torch.as_tensor(numbers["sq_err"]), rtol=0.02)
    assert F.cosine_similarity(bf16, gradient(net), dim=0) > 0.999
    assert 0.98 < bf16.norm() / gradient(net).norm() < 1.02


class Conversions(TorchDispatchMode):
    """Counts conversions of tensors of four dimensions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten._to_copy.default and out.ndim == 4
        return out


def test_attention_of_the_derivative_stays_in_bfloat16_with_the_same_numbers(monkeypatch):
    """By default PyTorch converts queries, keys, values and their tangents, six a block."""
    net, flow, batch, _ = golden_step("loss_none")
    errors, counts = [], []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), Conversions() as conversions:
            errors.append(flow.loss(net, *batch).error)
        counts.append(conversions.count)
        monkeypatch.setattr("meanflow.attention_in_bfloat16", contextlib.nullcontext)
    assert torch.equal(*errors) and counts[1] - counts[0] == 6 * len(net.blocks), counts
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_derivative_equals_forward_mode_of_pytorch_with_a_third_less_products():
    """PyTorch multiplies the input of a linear layer by a weight tangent of zeros too."""
    net, flow, (x, y, draws), _ = golden_step("loss_none", torch.float64)
    v_g = torch.randn_like(x)
    tangents = (v_g, torch.zeros_like(draws.r), torch.ones_like(draws.t))
    with (FlopCounterMode(display=False) as theirs, torch.no_grad(),
          sdpa_kernel(SDPBackend.MATH)):
        _, expected = torch.func.jvp(lambda *point: net(*point, y), (x, draws.r, draws.t), tangents)
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        du_dt = flow.time_derivative(net, x, draws.r, draws.t, y, v_g)
    assert torch.allclose(du_dt, expected, rtol=1e-10, atol=1e-12)
    assert ours.get_total_flops() < 0.7 * theirs.get_total_flops()


@pytest.mark.parametrize("layer", [
    nn.Linear(8, 5), nn.Linear(8, 5, bias=False),
    nn.RMSNorm(8, elementwise_affine=False), nn.RMSNorm((8, 8)), nn.RMSNorm(8, eps=0.1),
    nn.Conv2d(3, 6, 4), nn.Conv2d(3, 6, 4, stride=2, padding=1), nn.Conv2d(3, 6, 4, groups=3)])
def test_rules_of_forward_mode_are_pytorchs_without_products_of_zeros(layer):
    """PyTorch's own broke the graph at RMSNorm on a GPU, and with torch 2.11 at a convolution."""
    x, tangent = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    layer.double().requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    expected = torch.func.jvp(layer, (x,), (tangent,))
    with FlopCounterMode(display=False) as plain, ForwardModeRules():
        assert torch.allclose(layer(x), expected[0])
    with FlopCounterMode(display=False) as forward_mode, ForwardModeRules():
        results = torch.func.jvp(layer, (x,), (tangent,))
    assert all(map(torch.allclose, results, expected))
    assert forward_mode.get_total_flops() == 2 * plain.get_total_flops()
    with ForwardModeRules():
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
