"""Files of other repositories become our networks, with the same numbers, and go back."""

import argparse
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import (
    GOLDEN,
    GOLDEN_SIZES,
    assert_official,
    flip_bit,
    golden,
    golden_improved_network,
)
from torch import nn

from engine.errors import UserError
from models import DiT, FinalLayer, TimestepEmbedder, build
from weights.convert import FORMATS, convert, export, reverse_time
from weights.foreign_files import read_source

SIZES = {**GOLDEN_SIZES, "hidden_size": 96, "num_heads": 3}  # a width of the table
B = 4


class Flow(DiT):
    """A flow model with one time embedder, as SiT's: v(z, t, y), of the first channels."""

    def __init__(self, channels):
        super().__init__(**SIZES)
        del self.r_embedder
        self.final_layer = FinalLayer(SIZES["hidden_size"], 2, channels)

    def forward(self, z, t, y):
        x, c = self.x_embedder(z) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)  # (B, T, p * p * C)
        x = x.unflatten(1, (4, 4)).unflatten(3, (2, 2, -1))  # (B, row, column, p, q, C)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(B, -1, 8, 8)[:, :4]


def randomise(net, seed=0):
    """The network with random weights: no zero gates or output layers."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1, generator=generator)
    net.pos_embed += 1e-4 * torch.randn(net.pos_embed.shape, generator=generator)  # as others drift
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return randomise(DiT(**SIZES))


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(1)
    r, t = torch.rand(2, B, generator=g).sort(dim=0).values
    return torch.randn(B, 4, 8, 8, generator=g), r, t, torch.tensor([0, 3, 9, 10])


def training_file(weights, **more):
    """What the PyTorch ports save while they train; the average is not the raw weights."""
    raw = {name: value + 1 for name, value in weights.items()}
    return {"model": raw, "ema": weights, "opt": {"state": {}, "param_groups": []},
            "args": argparse.Namespace(**more.pop("args", {"seed": 0})), **more}


def renamed(weights, old, new):
    return {re.sub(old, new, name): value for name, value in weights.items()}


def converted(tmp_path, content, **options):
    """(network, config, report) of a file with this content."""
    return opened(save(tmp_path, content), **options)


def save(tmp_path, content):
    """A new file of its own: one that is mapped into memory must not be written again."""
    path = tmp_path / f"theirs-{len(list(tmp_path.iterdir()))}.pt"
    torch.save(content, path)
    return path


def opened(path, raw=False, **options):
    state, report = convert(read_source(path, raw=raw), **options)
    net = build(state["config"])
    net.load_state_dict(state["ema"])
    return net.eval(), state["config"], "\n".join(report)


PORTS = {
    "noamelata/MeanFlow": lambda w: training_file(w),
    "zhuyu-cs/MeanFlow": lambda w: training_file(w, steps=7, args={"path_type": "linear"}),
    "HaoyiZhu/MeanFlow-PyTorch": lambda w: training_file(
        renamed(w, "^r_", "h_") | {"projectors.0.0.weight": torch.ones(2, 2)}, steps=7),
}


@pytest.mark.parametrize("repository", PORTS)
def test_a_ports_training_file_gives_its_average(tmp_path, net, inputs, repository):
    ours, config, report = converted(tmp_path, PORTS[repository](net.state_dict()))
    assert torch.equal(ours(*inputs), net(*inputs))
    assert repository in report and repository in config["source"]
    assert ("left out: projectors" in report) == ("Haoyi" in repository)
    assert config["scale"] == (0.18125 if "zhuyu" in repository else 0.18215)
    assert config["model"] == "DiT" and config["sizes"]["depth"] == 3


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module."])
def test_a_bare_state_dict_may_have_prefixes(tmp_path, net, inputs, prefix):
    ours, _, report = converted(tmp_path, renamed(net.state_dict(), "^", prefix))
    assert torch.equal(ours(*inputs), net(*inputs)) and "a bare state dict" in report
    assert "--source zhuyu" in report  # the two cannot be told apart


def test_raw_takes_the_weights_that_are_not_averaged(tmp_path, net):
    ours, config, _ = converted(tmp_path, PORTS["zhuyu-cs/MeanFlow"](net.state_dict()), raw=True)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, net.state_dict()[name] + 1)
    assert "raw weights of step 7" in config["source"]


def test_position_tables_are_copied(tmp_path, net):
    """An average drifts from the exact table, and its network was trained with the drift."""
    ours, _, _ = converted(tmp_path, training_file(net.state_dict()))
    drift = (ours.pos_embed - DiT(**SIZES).pos_embed).abs().max()
    assert 1e-4 < drift < 1e-2 and torch.equal(ours.pos_embed, net.pos_embed)


def test_half_precision_becomes_float32(tmp_path, net, inputs):
    half = {name: value.bfloat16() for name, value in net.state_dict().items()}
    ours, _, _ = converted(tmp_path, half)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert torch.equal(ours.blocks[0].mlp.fc1.weight, half["blocks.0.mlp.fc1.weight"].float())


# ---- flow models as a start --------------------------------------------------------------------


def assert_starts_as(ours, flow, inputs, *, reverse):
    """u(z, r, t, y) is the flow's velocity for every r."""
    z, r, t, y = inputs
    velocity = -flow(z, 1 - t, y) if reverse else flow(z, t, y)
    for s in (r, t, torch.zeros(B)):
        difference = (ours(z, s, t, y) - velocity).abs().max()
        assert difference < 1e-5 * velocity.abs().max()
    assert ours.r_embedder.mlp[0].weight.std() > 0.01  # or its second layer could not learn


SIT_ARGS = {"path_type": "Linear", "prediction": "velocity", "vae": "mse"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_flow_is_turned_in_float32(tmp_path, inputs, dtype):
    """Rounded to its own precision the turned layer was off by 1e-4 and 1e-3."""
    flow = randomise(Flow(channels=8))
    flow.load_state_dict({name: value.to(dtype) for name, value in flow.state_dict().items()})
    half = {name: value.to(dtype) for name, value in flow.state_dict().items()}
    ours, _, _ = converted(tmp_path, half, named="sit")
    assert_starts_as(ours, flow, inputs, reverse=True)


@pytest.mark.parametrize("content", [lambda w: {"ema": w}, lambda w: {"ema": w, "args": SIT_ARGS}])
def test_sit_needs_no_options_in_its_file(tmp_path, inputs, content):
    flow = randomise(Flow(channels=8))
    ours, _, _ = converted(tmp_path, content(flow.state_dict()), named="sit")
    assert_starts_as(ours, flow, inputs, reverse=True)


def test_sit_with_as_many_channels_is_known_by_its_options(tmp_path, inputs):
    """REPA calls its prediction v."""
    flow = randomise(Flow(channels=4))
    ours, _, report = converted(tmp_path, training_file(flow.state_dict(), args=SIT_ARGS))
    assert_starts_as(ours, flow, inputs, reverse=True)
    assert "willisma/SiT" in report


@pytest.mark.parametrize("bare", [True, False])
def test_sit_starts_with_time_and_sign_turned(tmp_path, inputs, bare):
    flow = randomise(Flow(channels=8))
    file = flow.state_dict() if bare else training_file(flow.state_dict(), args=SIT_ARGS)
    ours, config, report = converted(tmp_path, file, named="sit" if bare else None)
    assert_starts_as(ours, flow, inputs, reverse=True)
    assert "start for training" in report and "willisma/SiT" in report
    assert config["vae"] == ("ema" if bare else "mse")  # its options tell


@pytest.mark.parametrize("released", [True, False])
def test_repa_starts_as_it_is(tmp_path, inputs, released):
    flow = randomise(Flow(channels=4))
    file = flow.state_dict() | {"projectors.0.0.bias": torch.ones(3)}
    if released:  # blocks after the second have another name
        file = {re.sub(r"^blocks\.([12])\.", lambda m: f"decoder_blocks.{int(m[1]) - 1}.", name):
                value for name, value in file.items()}
        assert "decoder_blocks.0.attn.qkv.bias" in file
    else:
        file = training_file(file, steps=4, args={"path_type": "linear", "prediction": "v"})
    ours, _, report = converted(tmp_path, file)
    assert_starts_as(ours, flow, inputs, reverse=False)
    assert "left out: projectors" in report
    assert ("decoder_blocks" in report) == released


def test_the_reversed_first_layer_is_exact():
    first = nn.Linear(256, 32).double()
    embedder, t = TimestepEmbedder(32), torch.rand(100, dtype=torch.float64)
    turned = embedder.features(t) @ reverse_time(first.weight).T
    torch.testing.assert_close(turned, embedder.features(1 - t) @ first.weight.T, atol=1e-13,
                               rtol=0)


# ---- JAX ---------------------------------------------------------------------------------------


def jax_tree(weights):
    """The nested dicts of arrays that the official MeanFlow saves for our weights."""
    tree = {}
    for name, value in weights.items():
        *path, last = name.replace("r_embedder", "h_embedder").split(".")
        value = np.asarray(value)
        if last == "weight":
            last = "embedding" if "table" in name else "kernel"
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif last == "kernel":
            value = value.T
        wrap = ["_flax_embedding" if "table" in name else "_flax_linear"]
        path = [f"layers_{part}" if part.isdecimal() else part for part in path]
        node = tree
        for part in ["net", *path, *(wrap if "x_embedder" not in name else [])]:
            node = node.setdefault(part, {})
        node[last] = np.ascontiguousarray(value)
    return tree


def jax_state(weights):
    shifted = {name: value + 1 for name, value in weights.items()}
    return {"ema_params": jax_tree(weights), "opt_state": [{"count": 3}, None, None],
            "params": jax_tree(shifted), "step": 400000}


def write_msgpack(path, state):
    """As flax does: an array is an extension of shape, dtype and bytes."""
    msgpack = pytest.importorskip("msgpack")

    def array(value):
        content = msgpack.packb((value.shape, value.dtype.name, value.tobytes()))
        return msgpack.ExtType(1, content)

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgpack.packb(state, default=array))


def write_ocdbt(folder, state):
    """As newer orbax does: zarr arrays with dotted paths in one OCDBT store."""
    tensorstore = pytest.importorskip("tensorstore")

    def write(name, value):
        if isinstance(value, dict):
            for key, child in value.items():
                write(f"{name}.{key}", child)
            return
        value = np.asarray(value)
        base = {"driver": "file", "path": f"{folder}/"}
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": store, "metadata": {"compressor": {"id": "zstd"}}}
        tensorstore.open(spec, create=True, dtype=value.dtype.name,
                         shape=value.shape).result().write(value).result()

    folder.mkdir(parents=True)
    for name in ("step", "params", "ema_params"):
        write(name, state[name])


@pytest.fixture(scope="module")
def official():
    return {name: torch.from_numpy(value)
            for name, value in np.load(GOLDEN / "params.npz").items()}


@pytest.mark.parametrize("layout", ["file", "folder", "parent", "ocdbt"])
def test_the_official_jax_state_gives_the_official_numbers(tmp_path, official, layout):
    state, path = jax_state(official), tmp_path / "run" / "checkpoint_400000"
    if layout == "ocdbt":
        write_ocdbt(path, state)
    else:
        write_msgpack(path if layout == "file" else path / "checkpoint", state)
    if layout == "parent":  # the newest that is finished
        (tmp_path / "run" / "checkpoint_900000.orbax-checkpoint-tmp-17").mkdir()
        write_msgpack(tmp_path / "run" / "checkpoint_50000" / "checkpoint", {"step": 50000})
        path = path.parent
    net, config, report = opened(path, heads=4, image_size=64)
    numbers = golden("forward", torch.float32)
    u = net(numbers["x"], numbers["t"] - numbers["h"], numbers["t"], numbers["y"])
    assert_official(u.detach(), numbers["u"])
    assert "Gsunshine/meanflow" in report and "averaged weights of step 400000" in report
    assert config["vae"] == "mse" and config["latent_shape"] == [4, 8, 8]


def test_raw_jax_weights_are_params(tmp_path, official):
    write_msgpack(tmp_path / "state", jax_state(official))
    net, _, _ = opened(tmp_path / "state", raw=True, heads=4, image_size=64)
    assert torch.equal(net.blocks[2].mlp.fc1.weight, official["blocks.2.mlp.fc1.weight"] + 1)


def test_jax_arrays_may_come_in_chunks_and_bfloat16(tmp_path, official):
    """flax cuts arrays above 2^30 bytes; NumPy has no bfloat16."""
    state = jax_state(official)
    table = state["ema_params"]["net"]["y_embedder"]["embedding_table"]["_flax_embedding"]
    whole = table["embedding"].ravel()
    table["embedding"] = {"__msgpack_chunked_array__": True, "shape": {"0": 11, "1": 64},
                          "chunks": {"0": whole[:300], "1": whole[300:]}}
    write_msgpack(tmp_path / "state", state)
    net, _, _ = opened(tmp_path / "state", heads=4, image_size=64)
    assert torch.equal(net.y_embedder.embedding_table.weight,
                       official["y_embedder.embedding_table.weight"])


@pytest.mark.parametrize("v_head", [True, False])
def test_improved_meanflow_in_jax_gives_the_official_numbers(tmp_path, v_head):
    table = json.loads((GOLDEN / "imf" / "mapping.json").read_text())["table"]
    arrays, tree = np.load(GOLDEN / "imf" / "params.npz"), {}
    for entry in table:
        if entry["training_only"] and not v_head:
            continue
        value = arrays[entry["name"]]
        value = {"none": value, "transpose": value.T,
                 "HWIO->OIHW": value.transpose(2, 3, 1, 0) if value.ndim == 4 else value}[
            entry["transform"]]
        *path, last = entry["official_jax"].split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = np.ascontiguousarray(value)
    write_msgpack(tmp_path / "state", {"ema_params": tree, "step": 800640})
    net, config, report = opened(tmp_path / "state", image_size=64)
    assert_improved(net, v_head)
    assert config["sizes"].get("v_head", True) is v_head
    assert ("left out: v_final_layer" in report) is not v_head


def assert_improved(net, v_head):
    numbers = golden("imf/forward", torch.float32)
    r = numbers["t"] - numbers["h"]
    u, v = net(numbers["x"], r, numbers["t"], numbers["y"], numbers["omega"], numbers["t_min"],
               numbers["t_max"])
    assert_official(u.detach(), numbers["u"])
    assert (v is not None) is v_head
    if v_head:
        assert_official(v.detach(), numbers["v"])


# ---- to others, and back -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("ours", "imeanflow")])
def test_ours_to_another_port_and_back_is_bit_equal(tmp_path, net, kind):
    state, _ = convert(read_source(save(tmp_path, training_file(net.state_dict()))))
    theirs = export(state, kind)
    assert ("h_embedder.mlp.0.bias" in theirs["ema"]) == (kind == "haoyizhu")
    back, _, _ = converted(tmp_path, theirs)
    assert_same(back, net)


@pytest.mark.parametrize("v_head", [True, False])
def test_improved_meanflow_to_the_released_layout_and_back_is_bit_equal(tmp_path, v_head):
    net = golden_improved_network(torch.float32, v_head=v_head)
    config = {"model": "iMF", "latent_shape": [4, 8, 8], "num_classes": 10,
              "sizes": {"patch_size": 2, "hidden_size": 64, "depth": 4, "head_depth": 2,
                        "num_heads": 4, "v_head": v_head}}
    theirs = export({"ema": net.state_dict(), "config": config}, "imeanflow")
    table = json.loads((GOLDEN / "imf" / "mapping.json").read_text())["table"]
    assert theirs.keys() == {entry["official_torch_branch"] for entry in table
                             if v_head or not entry["training_only"]}
    back, _, _ = converted(tmp_path, theirs, image_size=64)
    assert_same(back, net)
    assert_improved(back, v_head)


def assert_same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- refusals ----------------------------------------------------------------------------------


def without(weights, *names):
    return {name: value for name, value in weights.items() if name not in names}


REFUSED = {
    "DiT": lambda net: training_file(Flow(channels=8).state_dict(), args={"seed": 0}),
    "bare SiT or DiT": lambda net: Flow(channels=8).state_dict(),
    "SiT of another path": lambda net: training_file(
        Flow(channels=8).state_dict(), args={**SIT_ARGS, "path_type": "GVP"}),
    "SiT that predicts noise": lambda net: training_file(
        Flow(channels=8).state_dict(), args={**SIT_ARGS, "prediction": "noise"}),
    "REPA with the cosine path": lambda net: training_file(
        Flow(channels=4).state_dict(), args={"path_type": "cosine"}, steps=1),
    "q and k norm": lambda net: net | {"blocks.0.attn.q_norm.weight": torch.ones(32)},
    "U-Net": lambda net: {"model": {"net.model.map_noise.freqs": torch.ones(3),
                                    "num_updates": torch.ones(1)}, "optimizer": {}},
    "two networks": lambda net: renamed(net, "^", "net.") | renamed(net, "^", "net_ema."),
    "empty ema": lambda net: {"ema": {}, "model": net},
    "no ema": lambda net: {"model": net},
    "neither": lambda net: {"args": argparse.Namespace(), "opt": {}},
    "nothing": lambda net: {},
    "int8": lambda net: net | {"blocks.0.mlp.fc1.weight": torch.ones(384, 96, dtype=torch.int8)},
    "empty tensor": lambda net: net | {"blocks.0.mlp.fc1.bias": torch.ones(0)},
    "not finite": lambda net: net | {"blocks.0.mlp.fc1.bias": torch.full((384,), float("inf"))},
    "no block 1": lambda net: {k: v for k, v in net.items() if not k.startswith("blocks.1.")},
    "one tensor more": lambda net: net | {"extra.weight": torch.ones(1)},
    "one tensor less": lambda net: without(net, "blocks.2.attn.proj.bias"),
    "no final layer": lambda net: without(net, "final_layer.linear.bias"),
    "twice the channels": lambda net: net | {
        f"final_layer.linear.{kind}": torch.cat([net[f"final_layer.linear.{kind}"]] * 2)
        for kind in ("weight", "bias")},
    "float64 beyond float32": lambda net: net | {
        "blocks.0.mlp.fc1.bias": torch.full((384,), 1e300, dtype=torch.float64)},
    "float8": lambda net: net | {
        "blocks.0.mlp.fc1.bias": torch.ones(384).to(torch.float8_e4m3fn)},
    "a sparse tensor": lambda net: net | {"blocks.0.mlp.fc1.bias": torch.ones(384).to_sparse()},
    "numbers for tensors": lambda net: {name: torch.ones(()) for name in net},
    "vectors for tensors": lambda net: {name: torch.ones(7) for name in net},
    "a wrapper": lambda net: {"state_dict": net},
    "a U-Net and its average": lambda net: {"model": {"net.a": torch.ones(1),
                                                      "net_ema.a": torch.ones(1)}},
    "zhuyu's fine-tuned SiT": lambda net: {
        name: torch.cat([value] * 2) if name.startswith("final_layer.linear") else value
        for name, value in net.items()},
    "no config": lambda net: {"step": 0, "model": net, "ema": net, "opt": None, "config": None},
    "a config of nothing": lambda net: {"step": 0, "model": net, "ema": net, "opt": None,
                                        "config": {"model": "DiT-T/4", "vae": b"x"}},
    "no null row": lambda net: training_file(net, args={"num_classes": 11}),
    "a list": lambda net: [net],
    "an object": lambda net: {"ema": net, "net": nn.Linear(1, 1)},
    "a tensor": lambda net: torch.ones(3),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_network_is_refused(tmp_path, net, case):
    with pytest.raises(UserError) as error:
        converted(tmp_path, REFUSED[case](net.state_dict()))
    line = str(error.value)
    assert line.startswith(("--in must ", "--source must ")) and "; " in line and len(line) < 450


def test_code_in_a_pickle_is_named_and_not_run(tmp_path, net):
    class Hostile:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    with pytest.raises(UserError, match=r"names \S*exec, code"):
        converted(tmp_path, {"ema": net.state_dict(), "args": Hostile()})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 2, 100, 0.5, 0.999])
def test_a_torn_file_is_refused(tmp_path, net, keep):
    for name, write in (("a.pt", lambda path: torch.save(net.state_dict(), path)),
                        ("b", lambda path: write_msgpack(path, jax_state(net.state_dict())))):
        write(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:keep if keep > 1 else int(keep * len(content))])
        with pytest.raises(UserError, match="--in must"):
            opened(tmp_path / name)


def test_a_damaged_byte_is_found(tmp_path, net):
    path = save(tmp_path, training_file(net.state_dict()))
    flip_bit(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="--in must .*damaged"):
        opened(path)


def test_a_compressed_file_is_refused(tmp_path, net):
    """Mapped into memory, its compressed bytes were taken for weights."""
    with (zipfile.ZipFile(save(tmp_path, net.state_dict())) as stored,
          zipfile.ZipFile(tmp_path / "again.pt", "w", zipfile.ZIP_DEFLATED) as archive):
        for part in stored.infolist():
            archive.writestr(part.filename, stored.read(part))
    with pytest.raises(UserError, match="--in must .*(compressed|torn)"):
        opened(tmp_path / "again.pt")


def test_a_folder_of_any_name_is_read(tmp_path, official):
    for name in ("a#b", "a%20b", "a?b"):
        write_ocdbt(tmp_path / name, jax_state(official))
        assert opened(tmp_path / name, heads=4, image_size=64)


def test_a_folder_without_a_finished_checkpoint_is_refused(tmp_path, official):
    interrupted = tmp_path / "checkpoint_5.orbax-checkpoint-tmp-1"
    write_msgpack(interrupted / "checkpoint", jax_state(official))
    (tmp_path / "checkpoint_7").mkdir()
    (tmp_path / "checkpoint_7" / "_METADATA").write_text("{}")
    (tmp_path / "empty").mkdir()
    write_ocdbt(tmp_path / "cut", jax_state(official))
    for path in (tmp_path / "cut" / "d").iterdir():
        path.unlink()
    for path in (interrupted, tmp_path, tmp_path / "checkpoint_7", tmp_path / "empty",
                 tmp_path / "cut", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="--in must"):
            opened(path)


@pytest.mark.parametrize("module", ["msgpack", "tensorstore"])
def test_a_missing_package_is_named(tmp_path, official, monkeypatch, module):
    path = tmp_path / "state"
    (write_msgpack if module == "msgpack" else write_ocdbt)(path, jax_state(official))
    monkeypatch.setitem(__import__("sys").modules, module, None)  # to import it is an error
    with pytest.raises(UserError, match=f"pip install {module}"):
        opened(path)


@pytest.mark.parametrize("options, named", [
    ({"heads": 4}, "--heads"), ({"heads": 5}, "--heads"), ({"image_size": 32}, "--image-size"),
    ({"named": "sit"}, "--source"), ({"named": "repa"}, "--source")])
def test_an_option_that_contradicts_the_file_is_refused(tmp_path, net, options, named):
    with pytest.raises(UserError, match=named):
        converted(tmp_path, net.state_dict(), **options)


def test_heads_must_be_given_for_an_unknown_width_and_divide_it(tmp_path, official):
    write_msgpack(tmp_path / "state", jax_state(official))
    for heads in (None, 7):
        with pytest.raises(UserError, match="--heads"):
            opened(tmp_path / "state", heads=heads, image_size=64)
    with pytest.raises(UserError, match="--image-size"):
        opened(tmp_path / "state", heads=4, image_size=72)


def test_formats_of_the_other_family_are_refused(tmp_path, net):
    state, _ = convert(read_source(save(tmp_path, training_file(net.state_dict()))))
    with pytest.raises(UserError, match="--format must be"):
        export(state, "imeanflow")
