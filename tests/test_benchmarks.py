"""The benchmarks and examples start, compare like with like, and count right."""

import copy
import importlib
import re
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import DiT_models

PROGRAMS = sorted(path for folder in ("benchmarks", "examples")
                  for path in (ROOT / folder).glob("*.py")
                  if path.stem != "meanflow_2d")  # the tutorial has no options


@pytest.fixture(autouse=True)
def folders(monkeypatch):
    """The programs import one another from their folder, as when they are run."""
    monkeypatch.setattr(sys, "path", [*sys.path, *{str(path.parent) for path in PROGRAMS}])


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_help_answers(path, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(path.stem).parse_args(["--help"])
    assert not stop.value.code and "usage:" in capsys.readouterr().out


def test_flops_of_a_guided_step_are_four_and_a_half_forwards():
    """Forward and backward 3, null pass 1, derivative on a quarter .5; the derivative of views of
    fake tensors once failed."""
    gpu_hours = importlib.import_module("gpu_hours")
    with sdpa_kernel(SDPBackend.MATH):
        forward, step = gpu_hours.flops("DiT-T/4", cfg=3.0)
    assert step / forward == pytest.approx(4.5, abs=0.05)


def test_updates_take_the_time_of_their_bytes():
    """B/4's 131 million parameters at 90 % of 3.35 TB/s: 1.9 ms, whatever the batch."""
    gpu_hours = importlib.import_module("gpu_hours")
    assert gpu_hours.update_seconds("DiT-B/4", "H100") == pytest.approx(
        44 * 131.2e6 / (0.9 * 3.35e12), rel=1e-3)


# ---- the formulations of the step --------------------------------------------------------------


@pytest.fixture
def train_step(monkeypatch):
    """The module, in which every method draws the same numbers."""
    module = importlib.import_module("train_step")
    for name in ("MeanFlow", "ImprovedMeanFlow"):
        draw = getattr(module, name).draw

        def seeded(*args, draw=draw, **options):
            torch.manual_seed(0)
            return draw(*args, **options)
        monkeypatch.setattr(getattr(module, name), "draw", seeded)
    return module


def variants_of(train_step, model, modes):
    """({(name, mode): Variant} on a small random network, the network)."""
    torch.manual_seed(1)
    depth = {"depth": 2, "head_depth": 1} if model.startswith("iMF") else {"depth": 1}
    net = DiT_models[model](input_size=8, num_classes=train_step.NUM_CLASSES, **depth)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, y = torch.randn(8, 4, 8, 8), torch.randint(1000, (8,))
    variants = train_step.build_variants(net, x, y, modes=modes)
    return {(v.name, v.mode): v for v in variants}, net


def loss_and_gradient(variant, net):
    """(1,) and (N,), as float64."""
    net.zero_grad()
    loss = variant.loss()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    return loss.detach().double(), gradient.double()


@pytest.mark.parametrize("model", ["DiT-T/4", "iMF-T/4"])
def test_the_formulations_are_the_same_step(train_step, model):
    """The cost table compares like with like: loss, gradient and du/dt of all are equal, and those
    of finite differences are near."""
    variants, net = variants_of(train_step, model, ("eager",))
    exact = copy.deepcopy(net).double()
    loss, gradient = loss_and_gradient(variants["ours", "eager"], net)
    for name in ("ours, but a central difference for the derivative", *train_step.RIVALS):
        variant, near = variants[name, "eager"], 2e-2 if "difference" in name else 1e-5
        found = loss_and_gradient(variant, net)
        assert (found[0] - loss).abs() <= near * loss, name
        assert (found[1] - gradient).norm() <= near * gradient.norm(), name
        rows, du_dt = variant.seen
        error = train_step.relative_error(du_dt, rows,
                                          train_step.exact_derivative(exact, rows))
        assert error <= near, name
        if "difference" in name:
            assert error > 1e-5, "nothing was measured"


def test_difference_errors_are_those_of_the_definition(train_step):
    """JVP is exact to rounding, a central difference in float32 has its least error in between."""
    variants, net = variants_of(train_step, "DiT-T/4", ("eager",))
    loss_and_gradient(variants["ours", "eager"], net)
    rows = variants["ours", "eager"].seen[0]
    lines = train_step.difference_errors(net, rows, torch.device("cpu"))[2:]
    errors = {line.split(" | ")[0][2:]: [float(cell.strip(" |")) for cell in line.split(" | ")[1:]]
              for line in lines}
    assert errors["JVP"][0] < 1e-5 < errors["JVP"][1] < 5e-2
    steps = [errors[f"central difference, step {step:g}"] for step in train_step.STEPS]
    assert steps[0][0] > steps[1][0] and steps[0][1] > steps[-1][1] > errors["JVP"][1]


@pytest.mark.slow
def test_the_cost_table_is_markdown(train_step, capsys):
    train_step.main(train_step.parse_args(
        ["--model", "DiT-T/4", "--input-size", "8", "--batch-size", "4", "--no-compile",
         "--seconds", "0"]))
    out = capsys.readouterr().out
    assert "CUDA graphs: left out" in out
    for heading, count in ("| step |", 10), ("| derivative |", 5):
        lines = out[out.index(heading):].split("\n\n")[0].strip().split("\n")
        assert len(lines) == 2 + count
        assert len({line.count("|") for line in lines}) == 1
    flow = next(line for line in out.split("\n") if line.startswith("| flow matching |"))
    assert flow.startswith("| flow matching | 1.00 |  | 1.00 | 1.00 |")


@pytest.mark.slow
def test_passes_for_cuda_graphs_are_the_same_step(train_step, monkeypatch):
    """On a CPU PyTorch compiles them and leaves the graphs out. Outputs are copies: the next replay
    overwrites them."""
    torch._dynamo.reset()
    monkeypatch.setattr(train_step, "RIVALS", {})
    variants, net = variants_of(train_step, "DiT-T/4", ("eager", "CUDA graphs"))
    graphs = [name for name, mode in variants if mode == "CUDA graphs"]
    assert "flow matching" not in graphs and len(graphs) in (3, 5)
    for name in graphs[-1:]:  # of the most passes; each takes half a minute to compile
        loss, gradient = loss_and_gradient(variants[name, "eager"], net)
        found = loss_and_gradient(variants[name, "CUDA graphs"], net)
        near = 1e-3 if "difference" in name else 1e-5
        assert (found[0] - loss).abs() <= near * loss, name
        assert (found[1] - gradient).norm() <= near * gradient.norm(), name


# ---- scaling on paper --------------------------------------------------------------------------


@pytest.fixture
def scaling():
    return importlib.import_module("scaling")


def test_collectives_cost_what_they_cost_by_hand(scaling):
    """One gigabyte and one kilobyte; 7 hops over NVLink, 56 over NVLink and 7 over the network."""
    large = scaling.ring(1e9, 8, 400e9)  # protocol Simple
    assert large.latency == pytest.approx(8.4e-6 + 7 * 3.4e-6)
    assert large.transfer == pytest.approx(7 / 8 * 1e9 / 360e9)
    small = scaling.ring(1e3, 64, 400e9)  # LL128
    assert small.latency == pytest.approx(14e-6 + 56 * 1.9e-6 + 7 * 4e-6)
    assert scaling.ring(1e9, 64, 50e9).transfer == pytest.approx(63 / 64 * 1e9 / 50e9)
    assert scaling.ring(1e9, 8, 50e9) == large  # one node needs no network
    assert scaling.all_reduce(1e3, 256, 400e9).latency == pytest.approx(
        14e-6 + 2 * (7 * 1.25e-6 + 5 * 8.5e-6))  # a tree of 32 nodes
    assert scaling.all_reduce(1e10, 8, 400e9).transfer == pytest.approx(14 / 8 * 1e10 / 360e9)


def test_a_step_costs_what_it_costs_by_hand(scaling):
    """Two blocks and a rest, on 8 GPUs, four rows a GPU of which one has r < t."""
    net = scaling.Network(forward=10.0, velocity=10.0, derivative=20.0, blocks={"blocks": [6, 6]},
                          rest=4, velocity_lists=("blocks",), derivative_lists=("blocks",),
                          bucket=32)
    steps = scaling.passes(net, 4, 1)
    assert [flops for flops, _ in steps] == [40, 10, 40, 20, 80]  # 4.75 forwards

    def gather(size):
        return scaling.ring(size, 8, 1).seconds
    seconds, collectives = scaling.fully_sharded(net, steps, 8, 1, speed=1.0)
    # rest once, two blocks in five passes; gradients of two blocks and of the rest
    assert len(collectives) == 1 + 5 * 2 + 3
    assert sum(c.seconds for c in collectives) == pytest.approx(
        gather(8) + 10 * gather(12) + 2 * gather(24) + gather(16))
    assert seconds == pytest.approx(190 + 4 * gather(12) + gather(16))  # arithmetic hides the rest
    assert scaling.limit(190, seconds, collectives) == "arithmetic"
    seconds, _ = scaling.fully_sharded(net, steps, 8, 1, speed=1e12)
    assert seconds == pytest.approx(sum(c.seconds for c in collectives))
    assert scaling.limit(190e-12, seconds, collectives) == "latency"
    seconds, collectives = scaling.data_parallel(net, steps, 8, 1, speed=1.0)
    assert len(collectives) == 2  # 16 weights of 4 bytes, buckets of 32
    assert seconds == pytest.approx(190 + scaling.all_reduce(32, 8, 1).seconds)


def test_the_counted_step_is_the_one_of_the_papers_runs(scaling):
    """XL/2 with kappa > 0: 4.76 forwards, as gpu_hours.py counts by running the step."""
    net = scaling.describe("DiT-XL/2")
    assert sum(flops for flops, _ in scaling.passes(net, 4, 1)) / 4 == pytest.approx(
        1129.0e9, rel=2e-3)
    assert net.parameters == pytest.approx(676.4e6, rel=1e-4) and len(net.blocks["blocks"]) == 28


def test_the_counted_step_of_improved_meanflow_is_the_one_that_is_run(scaling):
    gpu_hours = importlib.import_module("gpu_hours")
    with sdpa_kernel(SDPBackend.MATH):
        _, step = gpu_hours.flops("iMF-T/4", omega_max=8.0)
    counted = sum(flops for flops, _ in scaling.passes(scaling.describe("iMF-T/4"), 4, 2)) / 4
    assert step == pytest.approx(counted, rel=2e-3)


def test_a_pass_of_improved_meanflow_gathers_the_heads_that_it_uses(scaling):
    net = scaling.describe("iMF-T/4")
    assert set(net.blocks) == {"shared_blocks", "u_heads", "v_heads"}
    assert set(net.velocity_lists) == {"shared_blocks", "v_heads"}
    assert set(net.derivative_lists) == {"shared_blocks", "u_heads"}
    assert net.velocity < net.forward
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_between_two_counts_is_at_most_that_of_their_line(recompute):
    memory = importlib.import_module("memory")
    options = {"precision": "bf16", "recompute": recompute, "shard": False}
    fixed, slope = memory.fit_step("DiT-T/4", **options)
    for batch in (16, 64):
        whole = memory.count_step("DiT-T/4", batch, **options)
        assert whole <= fixed + batch * slope <= 1.05 * whole


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_counted_is_what_a_real_step_allocates(precision, capsys):
    memory = importlib.import_module("memory")
    args = memory.parse_args(["--measure", "--model", "DiT-T/4", "--precision", precision])
    memory.main(args)
    measured, counted = re.findall(r"([\d.]+)(?= MB|$)", capsys.readouterr().out.strip())
    assert float(counted) == pytest.approx(float(measured), rel=0.02)
