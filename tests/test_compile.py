"""Compiled passes equal plain ones, span blocks, and are done without where the compiler fails."""

import functools
import inspect
import json
import re

import pytest
import torch
import watched_train
from conftest import assert_same_training, call, load_state, load_weights, run_ranks, tiny
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from engine.errors import RunError, UserError
from engine.sharding import data_parallel
from meanflow import MeanFlow
from models import DiT, DiT_models, build

pytestmark = pytest.mark.slow


def refuse(graph, inputs):
    raise RuntimeError("no such\ninstruction\n\nset a variable for more")


BACKENDS = {"forward": refuse, "derivative": refuse, "backward": aot_autograd(
    fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=refuse)}  # by where they fail


def compile_unasked(monkeypatch):
    """Without --compile, too, as with a GPU."""
    make_config = train.make_config
    monkeypatch.setattr(train, "make_config",
                        lambda *known: make_config(*known) | {"compile": True})


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """One block a path in this process's networks: they compile in a quarter of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DiT_models["DiT-T/4"].keywords, "depth", 1)
        patch.setitem(DiT_models["iMF-T/4"].keywords, "depth", 2)
        patch.setitem(DiT_models["iMF-T/4"].keywords, "head_depth", 1)
        yield


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    call("train", *tiny(digits, folder), "--max-steps", 2, "--no-compile")
    return folder


@pytest.mark.parametrize("which", BACKENDS)
def test_a_run_goes_on_plain_where_the_compiler_fails(which, plain, digits, tmp_path, monkeypatch):
    """It once ended with the compiler's traceback."""
    def compile(function, original=torch.compile, **options):
        derivative = getattr(function, "__func__", None) is MeanFlow.time_derivative
        fails = which != "derivative" or derivative
        return original(function, backend=BACKENDS[which] if fails else "eager", **options)

    monkeypatch.setattr(torch, "compile", compile)
    compile_unasked(monkeypatch)
    call("train", *tiny(digits, tmp_path), "--max-steps", 2)
    line, = re.findall("torch.compile failed.*", (tmp_path / "log.txt").read_text())
    assert "rank 0: " in line and "no such instruction" in line and "variable" not in line
    one, two = load_weights(plain, 2), load_weights(tmp_path, 2)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


# ---- whole graphs ------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often each graph that is compiled from here on has been called."""
    watched_train.calls.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend=lambda graph, inputs: watched_train.counted(
            lookup_backend("aot_eager")(graph, inputs))))
    return watched_train.calls


@pytest.mark.parametrize("method", ["guided", "improved"])
def test_each_pass_is_one_graph_that_every_step_calls(method, digits, calls, tmp_path, request):
    """The passes are the forward, two velocities and the derivative. With torch 2.11 a graph broke
    at Tensor.unflatten, and from the second step on all ran without the compiler."""
    last = []
    for precision, compiler in (("fp32", "--no-compile"), ("fp32", "--compile"),
                                ("bf16", "--compile")):
        folder = tmp_path / (precision + compiler)
        calls.clear()
        call("train", *tiny(digits, folder), *request.getfixturevalue(method), compiler,
             "--precision", precision)
        last.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]))
        assert calls == ([1 + 8] * 4 if compiler == "--compile" else [])  # the first to compile
    plain, *compiled = last
    for key in ("error", "velocity_error"):
        assert [record[key] for record in compiled] == pytest.approx([plain[key]] * 2, rel=0.02)
    assert all(value.dtype == torch.float32 for value in load_weights(folder, 8).values())


@pytest.mark.parametrize("settings", [["--cfg", 2, "--kappa", 0.5], ["--cfg", 1]])
def test_a_schedule_makes_no_new_graphs(settings, digits, calls, tmp_path):
    """l of SoFlow is another in each of 50 steps. The passes are the forward, and the average
    velocity of the batch and of the rows with r < t, which guidance takes twice."""
    call("train", *tiny(digits, tmp_path), "--method", "soflow", *settings, "--compile",
         "--max-steps", 50)
    assert calls == [51] + ([51, 102] if settings[1] == 2 else [51])


class Breaks(DiT):
    def forward(self, z, r, t, y):
        torch._dynamo.graph_break()
        return super().forward(z, r, t, y)


class Counts(DiT):
    passes = 0

    def forward(self, z, r, t, y):
        self.passes += 1
        return super().forward(z * self.passes, r, t, y)


@pytest.fixture
def options(digits, tmp_path, monkeypatch):
    """Of train.py, which knows the two networks above."""
    for network in Breaks, Counts:
        monkeypatch.setitem(DiT_models, network.__name__, functools.partial(
            network, patch_size=4, hidden_size=32, depth=1, num_heads=2))
    return tiny(digits, tmp_path)


def test_a_network_that_breaks_the_graph_is_named_with_its_line(options, tmp_path, monkeypatch):
    compile_unasked(monkeypatch)
    call("train", *options, "--model", "Breaks", "--max-steps", 1)
    line, = re.findall("torch.compile failed for Breaks, .*", (tmp_path / "log.txt").read_text())
    number = inspect.getsourcelines(Breaks.forward)[1] + 1
    assert "graph_break" in line and f"(test_compile.py, line {number})" in line
    with pytest.raises(UserError, match="--compile.* Breaks .*graph_break"):
        call("train", *options, "--model", "Breaks", "--max-steps", 2, "--compile")


def test_a_network_that_needs_a_new_graph_in_every_step_ends_the_run(options, calls):
    with pytest.raises(RunError, match="step .* Counts .*--no-compile"):
        call("train", *options, "--model", "Counts", "--max-steps", 20, "--compile")


# ---- two processes -----------------------------------------------------------------------------


def run_pair(digits, folder, guided, *options, **env):
    """What the two ranks of a watched run print."""
    return run_ranks("watched_train", *tiny(digits, folder), *guided, "--grad-accum-steps", 2,
                     *options, processes=2, output=folder.with_name(f"{folder.name} said"), **env)


@pytest.fixture(scope="module")
def plain_pair(digits, guided, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair") / "run"
    run_pair(digits, folder, guided, "--no-compile")
    return folder


def test_two_processes_compile_several_blocks_at_once_and_only_before_the_first_step(
        plain_pair, digits, guided, tmp_path):
    for said in run_pair(digits, tmp_path / "run", guided, "--compile", BACKEND="aot_eager"):
        before, after = said.split("made a step", 1)
        assert 2 <= before.count("compiles a graph of the forward") <= 3, said
        assert before.count("compiles a graph of the target") == 3 and "compiles" not in after, said
        first, *others = [json.loads(line) for line in re.findall(r"made a step (\[.*\])", said)]
        assert len(others) == 7 and all(set(calls) == {2} for calls in others), said
    ours, theirs = load_state(tmp_path / "run", 8), load_state(plain_pair, 8)
    torch.manual_seed(0)
    start = build(theirs["config"] | {"sizes": {"depth": 4}})  # here the table says 1
    assert_same_training(ours, theirs, start.state_dict())


def test_all_processes_go_on_plain_where_the_compiler_of_one_fails(plain_pair, digits, guided,
                                                                   tmp_path):
    said = run_pair(digits, tmp_path / "run", guided, FAILS="1", BACKEND="eager")
    one, two = load_weights(plain_pair, 8), load_weights(tmp_path / "run", 8)
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    line, = re.findall("torch.compile failed.*", said[0])
    assert "rank 1: " in line and "no such instruction" in line


def test_the_compiled_network_is_cut_between_blocks():
    """PyTorch's own bucket size cuts blocks of this width, DiT-B's, in two."""
    graphs = []

    def count(graph, inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    # What is left of a real process group may be collected in a process that a later test forks,
    # where its destructor waits for threads that are not there
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        forward = torch.compile(data_parallel(DiT(input_size=8, depth=6)), backend=count)
        forward(torch.randn(1, 4, 8, 8), *torch.rand(2, 1), torch.zeros(1, dtype=torch.int64))
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 5 and len(set(graphs[1:-1])) == 1, graphs
