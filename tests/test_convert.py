"""Files of other repositories become our networks, with the same numbers, and go back."""

import argparse
import json
import re
import sys
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
    refused,
)
from torch import nn

from engine.errors import BadValue
from models import DiT, FinalLayer, TimestepEmbedder, build
from weights.convert import EARLIER_NAMES, convert, reverse_time
from weights.foreign_files import read_weights

SIZES = {**GOLDEN_SIZES, "hidden_size": 96, "num_heads": 3, "mlp_ratio": 2.5}
B = 4


def randomised(net):
    """The network with random weights: no zero gates or output layers."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1, generator=generator)
    net.pos_embed += 1e-3 * torch.randn(net.pos_embed.shape, generator=generator)  # as averages are
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return randomised(DiT(**SIZES))


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(1)
    r, t = torch.rand(2, B, generator=g).sort(dim=0).values
    return torch.randn(B, 4, 8, 8, generator=g), r, t, torch.tensor([0, 3, 9, 10])


def training_file(weights, args=(("seed", 0),), **more):
    """What the PyTorch ports save while they train; the average is not the raw weights."""
    raw = {name: value + 1 for name, value in weights.items()}
    return {"model": raw, "ema": weights, "opt": {"state": {}, "param_groups": []},
            "args": argparse.Namespace(**dict(args)), **more}


def renamed(weights, old, new):
    return {re.sub(old, new, name): value for name, value in weights.items()}


def save(tmp_path, content, **options):
    """A new file of its own: one that is mapped into memory must not be written again."""
    path = tmp_path / f"theirs-{len(list(tmp_path.iterdir()))}.pt"
    torch.save(content, path, **options)
    return path


def opened(path, raw=False, **options):
    """(network, config, report) of a file."""
    state, report = convert(read_weights(path, raw=raw), **options)
    net = build(state["config"])
    net.load_state_dict(state["ema"])
    return net.eval(), state["config"], "\n".join(report)


PORTS = {
    "noamelata/MeanFlow": lambda w: training_file(w),
    "zhuyu-cs/MeanFlow": lambda w: training_file(w, {"path_type": "linear"}, steps=7),
    "HaoyiZhu/MeanFlow-PyTorch": lambda w: training_file(
        renamed(w, "^r_", "h_") | {"projectors.0.0.weight": torch.ones(2, 2)}, steps=7),
}


@pytest.mark.parametrize("repository", PORTS)
def test_a_ports_training_file_gives_its_average_or_raw_weights(tmp_path, net, inputs, repository):
    path = save(tmp_path, PORTS[repository](net.state_dict()))
    ours, config, report = opened(path)
    assert torch.equal(ours(*inputs), net(*inputs))  # the position table is a copy, too
    assert repository in report and repository in config["source"]
    assert ("left out: projectors" in report) == ("Haoyi" in repository)
    assert config["scale"] == (0.18125 if "zhuyu" in repository else 0.18215)
    assert config["model"] == "DiT" and config["sizes"]["depth"] == 3
    raw, config, _ = opened(path, raw=True)
    assert all(torch.equal(raw.state_dict()[name], value + 1)
               for name, value in net.state_dict().items())
    assert ("raw weights of step 7" in config["source"]) == ("noamelata" not in repository)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_a_bare_state_dict_needs_its_source_and_may_have_prefixes(tmp_path, net, inputs,
                                                                  prefix):
    """noamelata's and zhuyu's differ in their scale of the latents alone."""
    path = save(tmp_path, renamed(net.state_dict(), "^", prefix),
                _use_new_zipfile_serialization=bool(prefix))  # or as before PyTorch 1.6
    with refused("--source must be noamelata or zhuyu"):
        opened(path)
    for source, scale in ("noamelata", 0.18215), ("zhuyu", 0.18125):
        ours, config, _ = opened(path, source=source)
        assert torch.equal(ours(*inputs), net(*inputs)) and config["scale"] == scale


# ---- flow models as a start --------------------------------------------------------------------

SIT_ARGS = {"path_type": "Linear", "prediction": "velocity", "vae": "mse"}
REPA_ARGS = {"path_type": "linear", "prediction": "v"}


def flow_model(channels, dtype=torch.float32):
    """(weights, v): a flow model with one time embedder, as SiT's, its weights rounded to a dtype,
    and its velocity v(z, t, y), of the first channels."""
    net = DiT(**SIZES)
    net.final_layer = FinalLayer(SIZES["hidden_size"], 2, channels)
    randomised(net).to(dtype).float()
    for p in net.r_embedder.parameters():
        p.zero_()  # as if there were none
    weights = {name: value.to(dtype) for name, value in net.state_dict().items()
               if not name.startswith("r_embedder")}
    return weights, lambda z, t, y: net(z, t, t, y)[:, :4]


def assert_starts_as(ours, v, inputs, *, reverse):
    """u(z, r, t, y) is the flow's velocity for every r."""
    z, r, t, y = inputs
    velocity = -v(z, 1 - t, y) if reverse else v(z, t, y)
    for s in (r, t, torch.zeros(B)):
        difference = (ours(z, s, t, y) - velocity).abs().max()
        assert difference < 1e-5 * velocity.abs().max()
    assert ours.r_embedder.mlp[0].weight.std() > 0.01  # or its second layer could not learn


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("kind", ["bare", "average", "training"])
def test_sit_starts_with_time_and_sign_turned(tmp_path, inputs, kind, channels):
    weights, v = flow_model(channels)
    path = save(tmp_path, {"bare": weights, "average": {"ema": weights},
                           "training": training_file(weights, SIT_ARGS)}[kind])
    if kind != "training":  # DiT has the same tensors; REPA, too, with four channels
        with refused("--source must be sit or repa"):
            opened(path)
    ours, config, report = opened(path, source=None if kind == "training" else "sit")
    assert_starts_as(ours, v, inputs, reverse=True)
    assert "start for training" in report and "willisma/SiT" in report
    assert config["vae"] == ("mse" if kind == "training" else "ema")  # its options tell


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_flow_is_turned_in_float32(tmp_path, inputs, dtype):
    """Rounded to its own precision the turned layer was off by 1e-4 and 1e-3."""
    weights, v = flow_model(8, dtype)
    ours, _, _ = opened(save(tmp_path, weights), source="sit")
    assert_starts_as(ours, v, inputs, reverse=True)


@pytest.mark.parametrize("released", [True, False])
def test_repa_starts_as_it_is(tmp_path, inputs, released):
    weights, v = flow_model(4)
    weights["projectors.0.0.bias"] = torch.ones(3)
    if released:  # blocks after the first have another name
        file = {re.sub(r"^blocks\.([12])\.", lambda m: f"decoder_blocks.{int(m[1]) - 1}.", name):
                value for name, value in weights.items()}
        assert "decoder_blocks.0.attn.qkv.bias" in file
    else:
        file = training_file(weights, REPA_ARGS, steps=4)
    ours, _, report = opened(save(tmp_path, file), source="repa" if released else None)
    assert_starts_as(ours, v, inputs, reverse=False)
    assert "left out: projectors" in report


def test_the_reversed_first_layer_is_exact():
    first, t = nn.Linear(256, 32).double().weight, torch.rand(100, dtype=torch.float64)
    features = TimestepEmbedder(32).features
    torch.testing.assert_close(features(t) @ reverse_time(first).T, features(1 - t) @ first.T,
                               atol=1e-13, rtol=0)


# ---- JAX ---------------------------------------------------------------------------------------


def put(tree, path, value):
    """Write a value into nested dicts, which are made as needed."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def jax_tree(weights, shift=0):
    """The nested dicts of arrays that the official MeanFlow saves for our weights."""
    tree = {}
    for name, value in weights.items():
        *path, last = name.replace("r_embedder", "h_embedder").split(".")
        value = np.asarray(value + shift)
        if last == "weight":
            last = "embedding" if "table" in name else "kernel"
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif last == "kernel":
            value = value.T
        path = [f"layers_{part}" if part.isdecimal() else part for part in path]
        if "x_embedder" not in name:
            path.append("_flax_embedding" if "table" in name else "_flax_linear")
        put(tree, ["net", *path, last], np.ascontiguousarray(value))
    return tree


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


@pytest.fixture
def jax_state(official):
    return {"ema_params": jax_tree(official), "opt_state": [{"count": 3}, None, None],
            "params": jax_tree(official, shift=1), "step": 400000}


@pytest.mark.parametrize("layout", ["file", "chunks", "folder", "parent", "ocdbt"])
def test_the_official_jax_state_gives_the_official_numbers(tmp_path, official, jax_state, layout):
    parent = tmp_path / "a#b%20c?"
    path = parent / "checkpoint_400000"
    if layout == "chunks":  # as flax cuts arrays above 2^30 bytes
        table = jax_state["ema_params"]["net"]["y_embedder"]["embedding_table"]["_flax_embedding"]
        whole = table["embedding"].ravel()
        table["embedding"] = {"__msgpack_chunked_array__": True, "shape": {"0": 11, "1": 64},
                              "chunks": {"0": whole[:300], "1": whole[300:]}}
    if layout == "ocdbt":
        write_ocdbt(path, jax_state)
    else:
        write_msgpack(path if layout in ("file", "chunks") else path / "checkpoint", jax_state)
    if layout == "parent":  # the newest that is finished
        (parent / "checkpoint_900000.orbax-checkpoint-tmp-17").mkdir()
        write_msgpack(parent / "checkpoint_50000" / "checkpoint", {"step": 50000})
        path = parent
    net, config, report = opened(path, heads=4, image_size=64)
    numbers = golden("forward", torch.float32)
    u = net(numbers["x"], numbers["t"] - numbers["h"], numbers["t"], numbers["y"])
    assert_official(u.detach(), numbers["u"])
    assert "Gsunshine/meanflow, averaged weights of step 400000" in report
    assert config["vae"] == "mse" and config["latent_shape"] == [4, 8, 8]
    raw, _, _ = opened(path, raw=True, heads=4, image_size=64)
    assert torch.equal(raw.blocks[2].mlp.fc1.weight, official["blocks.2.mlp.fc1.weight"] + 1)


@pytest.mark.parametrize("names", ["present", "earlier"])
@pytest.mark.parametrize("v_head", [True, False])
def test_improved_meanflow_in_jax_gives_the_official_numbers(tmp_path, v_head, names):
    table = json.loads((GOLDEN / "imf" / "mapping.json").read_text())["table"]
    earlier = {new: old for old, new in EARLIER_NAMES.items()} if names == "earlier" else {}
    arrays, tree = np.load(GOLDEN / "imf" / "params.npz"), {}
    for entry in table:
        if v_head or not entry["training_only"]:
            axes = {"none": None, "transpose": (1, 0), "HWIO->OIHW": (2, 3, 1, 0)}
            value = arrays[entry["name"]]
            if axes[entry["transform"]]:
                value = value.transpose(axes[entry["transform"]])
            path = [earlier.get(part, part) for part in entry["official_jax"].split("/")]
            put(tree, path, np.ascontiguousarray(value))
    write_msgpack(tmp_path / "state", {"ema_params": tree, "step": 800640})
    net, config, report = opened(tmp_path / "state", image_size=64)
    numbers = golden("imf/forward", torch.float32)
    u, v = net(numbers["x"], numbers["t"] - numbers["h"],
               *(numbers[name] for name in ("t", "y", "omega", "t_min", "t_max")))
    assert_official(u.detach(), numbers["u"])
    assert (v is not None) is v_head
    if v_head:
        assert_official(v.detach(), numbers["v"])
    assert config["sizes"].get("v_head", True) is v_head
    assert ("left out: v_final_layer" in report) is not v_head


# ---- refusals ----------------------------------------------------------------------------------

BIAS = "blocks.0.mlp.fc1.bias"
OURS = {"model": "DiT", "vae": "none", "image_size": 64, "num_classes": 10,
        "latent_shape": [4, 8, 8], "scale": 1.0, "sizes": {"depth": 10**9}}
REFUSED = {  # what the message tells: the file
    "noise at integer times": lambda net: training_file(flow_model(8)[0]),
    "gvp": lambda net: training_file(flow_model(8)[0], {**SIT_ARGS, "path_type": "GVP"}),
    "prediction x": lambda net: training_file(flow_model(8)[0], {**SIT_ARGS, "prediction": "x"}),
    "q_norm": lambda net: net | {"blocks.0.attn.q_norm.weight": torch.ones(32)},
    "U-Net": lambda net: {"model": {"net.model.map_noise.freqs": torch.ones(3),
                                    "num_updates": torch.ones(1)}, "optimizer": {}},
    "net.pos_embed": lambda net: renamed(net, "^", "net.") | renamed(net, "^", "net_ema."),
    "without them": lambda net: {"ema": {}, "model": net},
    "add --raw": lambda net: {"model": net},
    "other tensors": lambda net: {},
    "int8": lambda net: net | {BIAS: torch.ones(240, dtype=torch.int8)},
    "float8": lambda net: net | {BIAS: torch.ones(240).to(torch.float8_e4m3fn)},
    "not finite": lambda net: net | {BIAS: torch.full((240,), 1e300, dtype=torch.float64)},
    "ValueError": lambda net: {name: torch.ones(7) for name in net},
    "blocks.2.attn": lambda net: renamed(net, "blocks.2", "blocks.1000000000"),
    "proj.bias": lambda net: {k: v for k, v in net.items() if "2.attn.proj.bias" not in k},
    "final_layer.linear": lambda net: {  # zhuyu's fine-tuned SiT
        name: torch.cat([value] * 2) if name.startswith("final_layer.linear") else value
        for name, value in net.items()},
    "state_dict": lambda net: {"state_dict": net},
    "JSON": lambda net: {"ema": net, "config": {"model": "DiT-T/4", "vae": b"x"}},
    "depth is 1000000000": lambda net: {"ema": net, "config": OURS},
    "null row": lambda net: training_file(net, {"num_classes": 11}),
    "a list": lambda net: [net],
    "Linear, code": lambda net: {"ema": net, "net": nn.Linear(1, 1)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_such_network_is_refused(tmp_path, net, reason):
    content = REFUSED[reason](net.state_dict())
    source = None if "args" in content or "config" in content else "zhuyu"
    with refused("must ", reason) as error:
        convert(read_weights(save(tmp_path, content)), source=source)
    assert isinstance(error.value, BadValue) and len(str(error.value)) < 450


def test_code_in_a_pickle_is_named_and_not_run(tmp_path, net):
    class Hostile:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    with refused("exec"):
        read_weights(save(tmp_path, {"ema": net.state_dict(), "args": Hostile()}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 2, 100, 0.5, 0.999])
def test_a_torn_file_is_refused(tmp_path, net, jax_state, keep):
    write_msgpack(tmp_path / "jax", jax_state)
    for path in (save(tmp_path, net.state_dict()), tmp_path / "jax"):
        content = path.read_bytes()
        path.write_bytes(content[:keep if keep > 1 else int(keep * len(content))])
        with refused("must be a whole file"):
            read_weights(path)


def test_damaged_or_compressed_bytes_are_refused(tmp_path, net):
    """Mapped into memory, compressed bytes were taken for weights."""
    path, again = save(tmp_path, net.state_dict()), tmp_path / "again.pt"
    with (zipfile.ZipFile(path) as stored,
          zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as archive):
        for part in stored.infolist():
            archive.writestr(part.filename, stored.read(part))
    flip_bit(path, path.stat().st_size // 2)
    for damaged in (path, again):
        with refused("must be a whole file"):
            read_weights(damaged)


def test_a_folder_without_a_finished_checkpoint_is_refused(tmp_path, jax_state):
    write_msgpack(tmp_path / "checkpoint_5.orbax-checkpoint-tmp-1" / "checkpoint", jax_state)
    write_ocdbt(tmp_path / "cut", jax_state)
    for path in (tmp_path / "cut" / "d").iterdir():
        path.unlink()
    for path in (tmp_path, tmp_path / "cut", tmp_path / "nowhere"):
        with refused("must be"):
            read_weights(path)


@pytest.mark.parametrize("write", [write_msgpack, write_ocdbt])
def test_a_missing_package_is_named(tmp_path, jax_state, monkeypatch, write):
    write(tmp_path / "state", jax_state)
    module = "msgpack" if write is write_msgpack else "tensorstore"
    monkeypatch.setitem(sys.modules, module, None)  # to import it is an error
    with refused(f"pip install {module}"):
        read_weights(tmp_path / "state")


@pytest.mark.parametrize(("file", "options", "named"), [
    ("port", {"heads": 4}, "--heads"), ("port", {"image_size": 32}, "--image-size"),
    ("port", {"source": "sit"}, "--source"), ("jax", {"image_size": 64}, "--heads"),
    ("jax", {"heads": 7}, "--heads"), ("jax", {"heads": 4, "image_size": 72}, "--image-size")])
def test_options_that_do_not_fit_the_file_are_refused(tmp_path, net, jax_state, file, options,
                                                      named):
    path = save(tmp_path, PORTS["zhuyu-cs/MeanFlow"](net.state_dict()))
    if file == "jax":  # it tells neither heads nor image size
        write_msgpack(path, jax_state)
    with refused(f"{named} must be"):
        opened(path, **options)
