"""train.py, watched from inside: a program that tests start in place of train.py.

After every step the ranks compare their weights bit for bit and print how often each compiled graph
was called in it. The compiler prints a line for each graph it is given, and fails on the rank that
the environment variable FAILS names. It is used unless --no-compile is given, as with a GPU. Two
blocks share a bucket of gradients.
"""

import functools
import os

import torch
from torch._dynamo.backends.registry import lookup_backend

import train
from engine import sharding

parse_args, calls = train.parse_args, []  # calls of each graph in this step


def counted(graph):
    """The compiled graph, whose calls are counted."""
    index = len(calls)
    calls.append(0)

    @functools.wraps(graph)
    def call(*inputs):
        calls[index] += 1
        return graph(*inputs)
    return call


def main(args):
    make_config, optimizer_step, compile = (
        train.make_config, torch.optim.AdamW.step, torch.compile)

    def config_with_compiler(*known):
        return make_config(*known) | {"compile": args.compile is not False}

    def compared_step(self):
        optimizer_step(self)
        total = sum(p.double().sum() for group in self.param_groups for p in group["params"])
        ends = torch.stack([total, -total])
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        assert ends[0] == -ends[1], "the ranks hold different weights"
        print("made a step", calls)
        calls[:] = [0] * len(calls)

    def counted_compile(function, **options):
        kind = "forward" if isinstance(function, torch.nn.Module) else "target"

        def backend(graph, inputs):
            print(f"compiles a graph of the {kind}")
            if kind == "target" and os.environ["RANK"] == os.environ.get("FAILS"):
                raise RuntimeError("no such instruction")
            return counted(lookup_backend(os.environ["BACKEND"])(graph, inputs))
        return compile(function, backend=backend, **options)

    train.make_config, torch.optim.AdamW.step, torch.compile = (
        config_with_compiler, compared_step, counted_compile)
    sharding.LEAST_BUCKET_MIB = 0
    train.main(args)
