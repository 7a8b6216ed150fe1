"""Sharded runs (--shard) train as the others do, hold a share each, and leave the same files."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import (
    assert_same_training,
    call,
    load_state,
    load_weights,
    run_ranks,
    sharding,
    tiny,
)
from soak import Child, differences, ranks, wait_for_step

from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.distributed import World
from engine.errors import UserError
from engine.sharding import check_sharding
from train import check_batch, parse_args, resolve

STEPS = 20
slow = pytest.mark.slow


@pytest.fixture(scope="module", params=["guided", "improved"])
def method(request):
    """Options of a run with either method, at the rate of the recipes."""
    return [*request.getfixturevalue(request.param), "--lr", 1e-4]


@pytest.fixture(scope="module")
def evaluation(reference):
    """Options that draw and evaluate. 75 images are two batches, of 50 and of 25, so that one rank
    has more to do than the other."""
    return ["--sample-every", 10, "--eval-every", 10, "--fid-ref", reference, "--eval-samples", 75,
            "--protocol", "pixels"]


def options(digits, folder, method, *extra, steps=STEPS):
    return [*tiny(digits, folder), *method, "--max-steps", steps, "--keep-last", 0, *extra]


def train_sharded(digits, folder, *words, **more):
    """What the ranks of a sharded run of two processes print."""
    return run_ranks("train", *options(digits, folder, *words, "--shard", **more), processes=2,
                     output=folder.with_name(f"{folder.name} said"))


@pytest.fixture(scope="module")
def one(digits, method, evaluation, tmp_path_factory):
    """The folder of a plain run of one process."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    call("train", *options(digits, folder, method, *evaluation))
    return folder


@pytest.fixture(scope="module")
def sharded(digits, method, evaluation, tmp_path_factory):
    """The folder of the same run, sharded over two processes."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    train_sharded(digits, folder, method, *evaluation)
    return folder


def half(folder, copy):
    """A copy of a run as it was after half of its steps."""
    shutil.copytree(folder, copy)
    (copy / "checkpoints" / f"{STEPS:07d}.pt").unlink()
    return copy


def assert_same_run(ours, theirs):
    assert_same_training(load_state(ours, STEPS), load_state(theirs, STEPS))


# ---- one result ----------------------------------------------------------------------------


@slow
@sharding
def test_a_sharded_run_is_the_plain_one(sharded, one):
    """In weights, averages and evaluations, but for rounding. Its checkpoints are of full tensors
    that need no process group: load_weights opens no others."""
    assert_same_run(sharded, one)
    ours, theirs = (json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
                    for folder in (sharded, one))
    assert ours["fid"] == pytest.approx(theirs["fid"], rel=1e-3) and ours["fid"] > 0
    shapes = {kind: {key: value.shape for key, value in load_weights(one, STEPS, kind).items()}
              for kind in ("model", "ema")}
    assert shapes == {kind: {key: value.shape for key, value
                             in load_weights(sharded, STEPS, kind).items()} for kind in shapes}
    assert (sharded / "samples" / f"{STEPS:07d}.png").exists()


@slow
@sharding
def test_a_run_may_change_between_sharded_and_not(sharded, one, digits, method, tmp_path):
    call("train", *options(digits, half(sharded, tmp_path / "joined"), method))
    assert_same_run(tmp_path / "joined", one)
    train_sharded(digits, half(one, tmp_path / "divided"), method)
    assert_same_run(tmp_path / "divided", one)


@slow
@sharding
@pytest.mark.parametrize("method", ["improved"], indirect=True)
def test_micro_batches_and_recomputed_activations_change_rounding_only(one, digits, method,
                                                                       tmp_path):
    train_sharded(digits, tmp_path / "run", method, "--grad-accum-steps", 2,
                  "--checkpoint-activations")
    assert_same_run(tmp_path / "run", one)


@slow
@sharding
@pytest.mark.parametrize("method", ["improved"], indirect=True)
def test_a_sharded_run_ended_by_a_signal_resumes_to_the_same_bits(sharded, digits, method,
                                                                  tmp_path):
    """One of two processes hears of it."""
    run = tmp_path / "run"
    pair = [Child("train", *options(digits, run, method, "--shard", "--log-every", 1), **place,
                  output=tmp_path / f"said{i}") for i, place in enumerate(ranks(2))]
    wait_for_step(run, 3, lambda: pair[0].alive)
    os.kill(pair[1].pid, signal.SIGTERM)
    ends = [child.wait() for child in pair]
    assert not any(code for code, _ in ends) and "SIGTERM: saved step" in ends[0][1], ends
    assert 3 <= load_checkpoint(list_checkpoints(run / "checkpoints")[0])["step"] < STEPS
    train_sharded(digits, run, method)
    newest = list_checkpoints(run / "checkpoints")[0]
    assert not differences(*(load_checkpoint(folder / "checkpoints" / newest.name)
                             for folder in (run, sharded)))


# ---- memory, steps that are not finite -----------------------------------------------------

COUNTING = """
import json
import torch
import train
from engine.errors import run_main
from engine.sharding import local_shard

def held(tensors):  # the gradients of a block share their memory
    storages = [local_shard(tensor.detach()).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

def average(ema, net, decay):
    networks.append(ema)
    original_average(ema, net, decay)

def step(self):
    original_step(self)
    params = self.param_groups[0]["params"]
    moments = [value for state in self.state.values() for value in state.values() if value.ndim]
    print("held", json.dumps({
        "weights": held(params), "gradients": held(p.grad for p in params),
        "moments": held(moments) / 2, "averages": held(networks[0].parameters()),
        "all": sum(p.numel() * p.element_size() for p in params)}))

def propagate(loss):
    losses.append(loss)
    bad = torch.distributed.get_rank() == 1 and len(losses) == 4  # in step 3; one is to warm up
    return original_propagate(loss * float("nan") if bad else loss)

networks, losses = [], []
original_average, train.update_average = train.update_average, average
original_step, torch.optim.AdamW.step = torch.optim.AdamW.step, step
original_propagate, train.propagate_nonfinite = train.propagate_nonfinite, propagate
run_main(train.main, train.parse_args)
"""


@slow
@sharding
@pytest.mark.parametrize("processes", [2, 4])
def test_each_rank_holds_its_share_and_all_skip_a_step_of_which_one_is_not_finite(
        processes, digits, guided, tmp_path):
    """A weight of 10 rows over 4 ranks gives one of them a row more: hence 5 % of room."""
    (tmp_path / "counting.py").write_text(COUNTING)
    said = run_ranks(tmp_path / "counting.py", *options(
        digits, tmp_path / "run", guided, "--shard", "--ckpt-every", 1, "--skip-nonfinite", 1,
        steps=4), processes=processes, output=tmp_path / "said")
    for text in said:
        *_, last = [json.loads(line.split(" ", 1)[1]) for line in text.splitlines()
                    if line.startswith("held ")]
        full = last.pop("all")
        assert all(full / processes * 0.95 < value < full / processes * 1.05
                   for value in last.values()), (last, full)
    steps = [load_weights(tmp_path / "run", step) for step in (1, 2, 3, 4)]
    same = [all(torch.equal(value, two[key]) for key, value in one.items())
            for one, two in zip(steps, steps[1:])]
    assert same == [False, True, False]


# ---- bfloat16 ------------------------------------------------------------------------------

GRADIENTS = """
import copy
import torch
from engine.distributed import start_processes
from engine.errors import run_main
from engine.sharding import full_tensor, list_blocks, parallelise
from improved_meanflow import ImprovedMeanFlow
from meanflow import MeanFlow
from models import DiT_models

def main(_):
    with start_processes("bf16") as world:
        for model, method in (("DiT-T/4", MeanFlow(num_classes=10, cfg=2.0, kappa=0.5)),
                              ("iMF-T/4", ImprovedMeanFlow(num_classes=10))):
            torch.manual_seed(0)
            plain = DiT_models[model](input_size=16, in_channels=4, num_classes=10)
            for p in plain.parameters():
                torch.nn.init.normal_(p, std=0.1)
            sharded, spare, seen = copy.deepcopy(plain), copy.deepcopy(plain), set()
            for layer in list_blocks(sharded)[0].modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.register_forward_hook(lambda m, *_: seen.add(m.weight.dtype))
            x, y = torch.randn(8, 4, 16, 16), torch.randint(10, (8,))
            draws, gradients = method.draw(x.shape).part(world.rank, world.size), []
            for net, shard in ((plain, False), (sharded, True)):
                forward = parallelise(net, spare, world, shard=shard)
                with world.autocast():
                    loss = method.loss(net, x[world.rank::2], y[world.rank::2], draws,
                                       forward=forward).loss
                loss.backward()
                gradients.append([full_tensor(p.grad) for p in net.parameters()])
            one, two = (torch.cat([g.flatten() for g in tensors]) for tensors in gradients)
            assert seen == {torch.bfloat16} and two.dtype == torch.float32
            print(float((one - two).norm() / one.norm()))
run_main(main, lambda: None)
"""


@slow
@sharding
def test_weights_gathered_in_bfloat16_are_those_that_autocast_makes(tmp_path):
    """So the gradients of a sharded network equal those of DistributedDataParallel."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    for text in run_ranks(tmp_path / "gradients.py", processes=2, output=tmp_path / "said"):
        assert all(float(line) < 1e-6 for line in text.split()), text


# ---- refusals ------------------------------------------------------------------------------


def test_one_process_and_the_compiler_are_refused(digits, tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.14.0")
    words = [*tiny(digits, tmp_path / "run"), "--max-steps", 1, "--shard"]
    assert "several processes, got 1" in refusal("train", words, "--shard")
    refusal("train", [*words, "--compile"], "--compile")


@pytest.mark.parametrize("version", ["2.11.0+cpu", "2.12.1"])
def test_a_pytorch_without_forward_mode_through_shards_is_refused(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(UserError, match="--shard must come with torch 2.13 or newer.*got 2.1"):
        check_sharding(World(0, 2, torch.device("cpu"), "fp32"))
    monkeypatch.setattr(torch, "__version__", "2.13.0a0+git1")
    check_sharding(World(0, 2, torch.device("cpu"), "fp32"))


@sharding
def test_every_rank_must_have_a_row_with_a_derivative(digits, tmp_path):
    """A rank without one would make fewer passes, and the others would wait for its shards."""
    world = World(0, 2, torch.device("cpu"), "fp32")
    for ratio, fits in ((0.0625, False), (0.125, True), (0, True), (1, True)):  # of 16 rows
        args = parse_args([*map(str, tiny(digits, tmp_path / "run")), "--shard", "--ratio",
                           str(ratio)])
        resolve(args, world)
        if fits:
            check_batch(args, world)
        else:
            with pytest.raises(UserError, match="--global-batch-size must have 2 rows"):
                check_batch(args, world)
