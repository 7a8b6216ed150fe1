"""What a run needs of optimisers: groups of parameters, two at once, and a check of their state."""

import torch
from torch import nn


def parameter_groups(net):
    """The parameters of a network as two groups for torch.optim: the weights of linear layers,
    which are matrices, and the rest, in which are tables of embeddings."""
    linear = {m.weight for m in net.modules() if isinstance(m, nn.Linear)}
    return [{"params": [p for p in net.parameters() if p in linear]},
            {"params": [p for p in net.parameters() if p not in linear]}]


class Both:
    """Two optimisers as one, with one state dict, in which parameters are numbered through."""

    def __init__(self, first, second):
        self.optimizers = first, second

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self):
        return self.optimizers[0].state | self.optimizers[1].state

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self):
        first, second = (optimizer.state_dict() for optimizer in self.optimizers)
        count = sum(len(group["params"]) for group in first["param_groups"])
        groups = [{**group, "params": [count + i for i in group["params"]]}
                  for group in second["param_groups"]]
        return {"state": first["state"] | {count + i: a for i, a in second["state"].items()},
                "param_groups": first["param_groups"] + groups}

    def load_state_dict(self, state):
        begin = 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()["param_groups"]
            end = begin + sum(len(group["params"]) for group in own)
            optimizer.load_state_dict({"param_groups": own, "state": {
                i - begin: a for i, a in state["state"].items() if begin <= i < end}})
            begin = end


# What these keep of each parameter, of its shape; others are not known
STATES = {"AdamW": {"exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def check_state(optimizer, state):
    """Raise ValueError for a state by parameter number that is of another network."""
    begin = 0
    for part in getattr(optimizer, "optimizers", (optimizer,)):
        params = [p for group in part.param_groups for p in group["params"]]
        names = STATES.get(type(part).__name__)
        for i, p in enumerate(params, begin):
            found = {name: a.shape for name, a in state.get(i, {}).items()
                     if isinstance(a, torch.Tensor) and name != "step"}
            if names and found != dict.fromkeys(names, p.shape):
                raise ValueError("the optimiser's state is of another network")
        begin += len(params)
    if not state.keys() <= set(range(begin)):
        raise ValueError("the optimiser's state is of another network")
