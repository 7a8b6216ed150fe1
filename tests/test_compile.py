"""Compiled passes: in one piece for several blocks, equal to plain ones, and done without where the
compiler fails."""

import json

import pytest
import torch
from conftest import ROOT, call, run_script, tiny
from torch._dynamo.backends.common import aot_autograd

import train
from engine.distributed import data_parallel
from engine.options import UserError
from meanflow import MeanFlow
from models import DiT


def weights(folder, step):
    return torch.load(folder / "checkpoints" / f"{step:07d}.pt", weights_only=True)


def refuse(graph, inputs):
    raise RuntimeError("no such\ninstruction\n\nset a variable for more")


FAILS_IN_BACKWARD = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward,
                                 bw_compiler=refuse)


def fail_where(monkeypatch, where):
    """A compiler that fails in this pass: a stand-in for one that has not what it needs."""
    def compile(function, **options):
        derivative = getattr(function, "__func__", None) is MeanFlow.time_derivative
        refused = where == "forward" or where == "derivative" and derivative
        backend = refuse if refused else FAILS_IN_BACKWARD if where == "backward" else "eager"
        return original(function, **options, backend=backend)
    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile)


def compile_unasked(monkeypatch):
    """Compile where --compile is not given, as with a GPU."""
    make_config = train.make_config
    monkeypatch.setattr(train, "make_config",
                        lambda *known: make_config(*known) | {"compile": True})


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    """The folder of a run of four steps without the compiler."""
    folder = tmp_path_factory.mktemp("plain")
    call("train", *tiny(digits, folder), "--max-steps", 4, "--no-compile")
    return folder


@pytest.mark.parametrize("where", ["forward", "backward", "derivative"])
def test_a_run_goes_on_plain_where_the_compiler_fails(where, plain, digits, tmp_path, monkeypatch):
    """It once ended with the compiler's traceback."""
    fail_where(monkeypatch, where)
    compile_unasked(monkeypatch)
    call("train", *tiny(digits, tmp_path), "--max-steps", 4)
    log = (tmp_path / "log.txt").read_text().splitlines()
    line, = [line for line in log if "torch.compile failed" in line]
    assert "rank 0: " in line and "no such instruction" in line and "variable" not in line
    one, two = weights(plain, 4)["model"], weights(tmp_path, 4)["model"]
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert json.loads((tmp_path / "config.json").read_text())["compile"] is True
    assert json.loads((plain / "config.json").read_text())["compile"] is False


def test_a_compiler_that_fails_ends_a_run_that_asked_for_it(digits, tmp_path, monkeypatch):
    fail_where(monkeypatch, "backward")
    with pytest.raises(UserError, match="^--compile must .*no such instruction; .*--no-compile"):
        call("train", *tiny(digits, tmp_path), "--max-steps", 4, "--compile")


@pytest.mark.slow
def test_without_a_c_compiler_the_error_is_one_line(digits, tmp_path):
    """PyTorch's own compiler, which needs one for any graph."""
    done = run_script("train.py", *tiny(digits, tmp_path), "--max-steps", 1, "--compile",
                      CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "--compile must" in last and "/nonexistent" in last
    assert "Traceback" not in done.stderr


# A run of eight blocks of 0.6 MiB, two to a bucket, whose compiler counts what it is given
COUNTED = """
import os, sys
import torch, models, train
from engine import distributed
from torch._dynamo.backends.registry import lookup_backend

rank, fails = os.environ["RANK"], sys.argv.pop(1)
models.SIZES["T"] = 8, 96, 3
models.DiT_models["DiT-T/4"].keywords["depth"] = 8
distributed.LEAST_BUCKET_MIB = 0
make_config = train.make_config
train.make_config = lambda *known: (
    make_config(*known) | {"compile": known[0].compile is not False})

def say(what):
    print(f"rank {rank} {what};\\n", end="", flush=True)  # in one piece: both write to one pipe

def compile(function, **options):
    forward = isinstance(function, torch.nn.Module)
    def backend(graph, inputs):
        say(f"compiles a piece of the {'forward' if forward else 'target'}")
        if rank == fails and not forward:
            raise RuntimeError("no such instruction")
        return lookup_backend("aot_eager")(graph, inputs)
    return original(function, backend=backend, **options)

def warm_up(*known):
    original_warm_up(*known)
    say("is warm")

original, torch.compile = torch.compile, compile
original_warm_up, train.warm_up = train.warm_up, warm_up
distributed.run_main(train.main, train.parse_args)
"""


def run_counted(digits, folder, *extra, fails=""):
    """Two processes whose compiler fails on one rank, or on none; what they print."""
    script = folder.with_name("counted.py")
    script.write_text(COUNTED)
    done = run_script(script, fails, *tiny(digits, folder), "--max-steps", 4, "--cfg", 2, "--kappa",
                      0.5, *extra, processes=2, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_compile_several_blocks_at_once_and_only_before_the_first_step(
        parts, digits, tmp_path):
    """What GPUs run by default: with and without the exchange of gradients, by the same graphs."""
    words = "--grad-accum-steps", parts
    run_counted(digits, tmp_path / "plain", "--no-compile", *words)
    done = run_counted(digits, tmp_path / "compiled", "--compile", *words)
    said = done.stdout
    assert "Profiler" not in done.stderr  # a warning of Dynamo's, of no use to anybody
    for rank in (0, 1):
        before, after = said.split(f"rank {rank} is warm;")
        pieces = f"rank {rank} compiles a piece of the "
        assert 2 <= before.count(pieces + "forward;") <= 5, said
        assert before.count(pieces + "target;") == 3 and pieces not in after, said
    one, two = (weights(tmp_path / name, 4)["model"] for name in ("plain", "compiled"))
    for key, value in one.items():
        if not key.endswith("qkv.bias"):  # of key biases Adam sees the rounding only
            assert (two[key] - value).abs().max() <= 1e-5 * value.abs().max(), key


def test_the_compiled_network_is_cut_between_blocks():
    """PyTorch's own bucket size cuts blocks of this width, DiT-B's, in two."""
    pieces = []

    def count(graph, inputs):
        pieces.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        forward = torch.compile(data_parallel(DiT(input_size=8, depth=6)), backend=count)
        forward(torch.randn(1, 4, 8, 8), *torch.rand(2, 1), torch.zeros(1, dtype=torch.int64))
    finally:
        torch.distributed.destroy_process_group()
    assert len(pieces) == 5 and len(set(pieces[1:-1])) == 1, pieces


@pytest.mark.slow
def test_all_processes_go_on_plain_where_the_compiler_of_one_fails(digits, tmp_path):
    run_counted(digits, tmp_path / "plain", "--no-compile")
    done = run_counted(digits, tmp_path / "one", fails="1")
    one, two = (weights(tmp_path / name, 4)["model"] for name in ("plain", "one"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    line, = [line for line in done.stderr.splitlines() if "torch.compile failed" in line]
    assert "rank 1: " in line and "no such instruction" in line
