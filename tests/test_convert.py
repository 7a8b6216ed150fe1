"""Files of other repositories become our networks, with the same numbers, and go back."""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import GOLDEN, GOLDEN_SIZES, assert_official, flip_bit, golden, refused
from safetensors.torch import save_file
from torch import nn

from engine.errors import BadValue
from models import DiT, FinalLayer, TimestepEmbedder, build
from weights.convert import EARLIER_NAMES, REPOSITORIES, convert, reverse_time
from weights.foreign_files import read_weights

SIZES = {**GOLDEN_SIZES, "hidden_size": 96, "num_heads": 3, "mlp_ratio": 2.5}


def randomised(net):
    """The network with random weights: no zero gates or output layers."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    net.pos_embed += 1e-3 * torch.randn(net.pos_embed.shape)  # as averages are
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net():
    return randomised(DiT(**SIZES))


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    r, t = torch.rand(2, 4).sort(dim=0).values
    return torch.randn(4, 4, 8, 8), r, t, torch.tensor([0, 3, 9, 10])


def training_file(weights, args=(("seed", 0),), **more):
    """What the PyTorch ports save while they train; the average is not the raw weights."""
    raw = {name: value + 1 for name, value in weights.items()}
    args = argparse.Namespace(**dict(args))
    return {"model": raw, "ema": weights, "opt": {}, "args": args, **more}


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
    "noamelata/MeanFlow": training_file,
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


def soflow_file(weights, rows=11):
    """What SoFlow saves while it trains; without guidance its label table has no null row."""
    theirs = {f"network.{name}": value for name, value in renamed(weights, "^r_", "s_").items()}
    table = "network.y_embedder.embedding_table.weight"
    theirs[table] = theirs[table][:rows].clone()
    raw = {name: value + 1 for name, value in theirs.items()}
    return {"model": raw, "ema_model": theirs, "optimizer": {}, "finished_steps": 7,
            "finished_epochs": 1}


@pytest.mark.parametrize(("rows", "options"), [(11, {}), (10, {"num_classes": 10})])
def test_a_soflow_file_gives_the_network_and_the_method(tmp_path, net, inputs, rows, options):
    path = save(tmp_path, soflow_file(net.state_dict(), rows))
    ours, config, report = opened(path, **options)
    rest = slice(None, 3 if rows == 10 else None)  # the null row was never trained
    assert torch.equal(ours(*inputs)[rest], net(*inputs)[rest])
    assert (config["method"], config["vae"], config["scale"]) == ("soflow", "mse", 0.18215)
    assert config["num_classes"] == 10 and "averaged weights of step 7" in config["source"]
    assert ("without a null row" in report) == (rows == 10)
    assert ("the last of 11 rows" in report) == (rows == 11)
    raw, *_ = opened(path, raw=True, **options)
    assert torch.equal(raw.t_embedder.mlp[0].bias, net.t_embedder.mlp[0].bias + 1)


def test_a_file_with_two_embedders_of_the_interval_is_refused(tmp_path, net):
    content = soflow_file(net.state_dict())
    content["ema_model"]["network.r_embedder.mlp.0.bias"] = torch.zeros(32)
    with refused("one embedder"):
        opened(save(tmp_path, content))


def test_another_number_of_classes_than_the_table_has_is_refused(tmp_path, net):
    with refused("--num-classes", "11 or 10", "got 12"):
        opened(save(tmp_path, soflow_file(net.state_dict())), num_classes=12)
    with refused("--num-classes", "must be 10", "got 11"):
        opened(save(tmp_path, training_file(net.state_dict())), num_classes=11, source="noamelata")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.module.", "module._orig_mod."])
def test_a_bare_state_dict_needs_its_source_and_may_have_prefixes(tmp_path, net, inputs, prefix):
    path = save(tmp_path, renamed(net.state_dict(), "^", prefix),
                _use_new_zipfile_serialization=bool(prefix))  # or as before PyTorch 1.6
    with refused("--source must be noamelata or zhuyu"):
        opened(path)
    for source, scale in ("noamelata", 0.18215), ("zhuyu", 0.18125):
        ours, config, _ = opened(path, source=source)
        assert torch.equal(ours(*inputs), net(*inputs)) and config["scale"] == scale


# ---- flow models as a start --------------------------------------------------------------------

SIT_ARGS = {"path_type": "Linear", "prediction": "velocity", "vae": "mse"}


def flow_model(channels, dtype=torch.float32):
    """(weights in dtype, velocity v(z, t, y)) of a flow model with one time embedder, as SiT's."""
    net = DiT(**SIZES)
    net.final_layer = FinalLayer(SIZES["hidden_size"], 2, channels)
    randomised(net).to(dtype).float()
    for p in net.r_embedder.parameters():
        p.zero_()  # as if there were none
    weights = {name: value.to(dtype) for name, value in net.state_dict().items()
               if not name.startswith("r_embedder")}
    return weights, lambda z, t, y: net(z, t, t, y)[:, :4]


@pytest.mark.parametrize(("source", "args", "channels", "dtype"), [
    ("sit", None, 4, torch.float16), ("sit", None, 8, torch.bfloat16),
    ("sit", SIT_ARGS, 4, torch.float32), ("sit", SIT_ARGS, 8, torch.float32),
    ("repa", None, 4, torch.float32),
    ("repa", {"path_type": "linear", "prediction": "v", "vae": "mse"}, 4, torch.float32)])
def test_a_flow_model_becomes_a_start_with_its_velocity_for_every_r(
        tmp_path, inputs, source, args, channels, dtype):
    """SiT's time and sign are turned, in float32: in half precision that was off by 1e-3."""
    weights, v = flow_model(channels, dtype)
    weights["projectors.0.0.bias"] = torch.ones(3)
    if args:
        content = training_file(weights, args)
    elif source == "sit":
        content = weights
    else:  # REPA's released file has another name for blocks after the first
        content = {"ema": renamed(weights, r"^blocks\.([12])\.",
                                  lambda match: f"decoder_blocks.{int(match[1]) - 1}.")}
    path = save(tmp_path, content)
    if not args:  # DiT has the same tensors, too
        with refused("--source must be sit or repa"):
            opened(path)
    ours, config, report = opened(path, source=None if args else source)
    z, r, t, y = inputs
    velocity = -v(z, 1 - t, y) if source == "sit" else v(z, t, y)
    for s in (r, t, torch.zeros(4)):
        assert (ours(z, s, t, y) - velocity).abs().max() < 1e-5 * velocity.abs().max()
    assert ours.r_embedder.mlp[0].weight.std() > 0.01  # or its second layer could not learn
    assert REPOSITORIES[source].name in report and "start for training" in report
    assert "left out: projectors" in report and config["vae"] == ("mse" if args else "ema")


def test_the_reversed_first_layer_is_exact():
    first, t = nn.Linear(256, 32).double().weight, torch.rand(100, dtype=torch.float64)
    features = TimestepEmbedder(32).features
    torch.testing.assert_close(features(t) @ reverse_time(first).T, features(1 - t) @ first.T,
                               atol=1e-13, rtol=0)


# ---- JAX ---------------------------------------------------------------------------------------


def put(tree, path, value):
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def jax_tree(weights, shift=0):
    """The nested dicts of arrays that the official MeanFlow saves for our weights."""
    tree = {}
    for name, value in weights.items():
        name = re.sub(r"\b(\d+)\b", r"layers_\1", name.replace("r_embedder", "h_embedder"))
        (*path, last), value = name.split("."), np.asarray(value + shift)
        if last == "weight":
            last = "embedding" if "table" in name else "kernel"
        if last == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if "x_embedder" not in name:
            path.append("_flax_embedding" if "table" in name else "_flax_linear")
        put(tree, ["net", *path, last], np.ascontiguousarray(value))
    return tree


def write_msgpack(path, state):
    """As flax does: an array is an extension of shape, dtype and bytes."""
    msgpack = pytest.importorskip("msgpack")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgpack.packb(state, default=lambda array: msgpack.ExtType(
        1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))))


def write_ocdbt(folder, state, name=""):
    """As newer orbax does: zarr arrays with dotted paths in one OCDBT store."""
    tensorstore = pytest.importorskip("tensorstore")
    for key, value in state.items():
        if isinstance(value, dict):
            write_ocdbt(folder, value, f"{name}{key}.")
        elif key != "opt_state":
            value, base = np.asarray(value), {"driver": "file", "path": f"{folder}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{name}{key}/"}
            spec = {"driver": "zarr", "kvstore": store, "metadata": {"compressor": {"id": "zstd"}}}
            tensorstore.open(spec, create=True, dtype=value.dtype.name,
                             shape=value.shape).result().write(value).result()


@pytest.fixture
def jax_state():
    official = golden("params", torch.float32)
    return {"ema_params": jax_tree(official), "opt_state": [{"count": 3}, None, None],
            "params": jax_tree(official, shift=1), "step": 400000}


@pytest.mark.parametrize("layout", ["file", "chunks", "folder", "parent", "ocdbt"])
def test_the_official_jax_state_gives_the_official_numbers(tmp_path, jax_state, layout):
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
    assert torch.equal(raw.blocks[2].mlp.fc1.weight, net.blocks[2].mlp.fc1.weight + 1)


@pytest.mark.parametrize(("v_head", "names"), [(True, "present"), (False, "earlier")])
def test_improved_meanflow_in_jax_gives_the_official_numbers(tmp_path, v_head, names):
    table = json.loads((GOLDEN / "imf" / "mapping.json").read_text())["table"]
    earlier = {new: old for old, new in EARLIER_NAMES.items()} if names == "earlier" else {}
    axes = {"transpose": (1, 0), "HWIO->OIHW": (2, 3, 1, 0)}
    arrays, tree = np.load(GOLDEN / "imf" / "params.npz"), {}
    for entry in table:
        if v_head or not entry["training_only"]:
            value = arrays[entry["name"]]
            if entry["transform"] != "none":
                value = value.transpose(axes[entry["transform"]])
            path = [earlier.get(part, part) for part in entry["official_jax"].split("/")]
            put(tree, path, np.ascontiguousarray(value))
    write_msgpack(tmp_path / "state", {"ema_params": tree, "step": 800640})
    net, config, report = opened(tmp_path / "state", image_size=64)
    numbers = golden("imf/forward", torch.float32)
    u, v = net(numbers["x"], numbers["t"] - numbers["h"],
               *(numbers[name] for name in ("t", "y", "omega", "t_min", "t_max")))
    assert_official(u.detach(), numbers["u"])
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
    "prediction x": lambda net: training_file(flow_model(8)[0], {"prediction": "x"}),
    "q_norm": lambda net: net | {"blocks.0.attn.q_norm.weight": torch.ones(32)},
    "U-Net": lambda net: {"model": {"net.model.map_noise.freqs": torch.ones(3),
                                    "num_updates": torch.ones(1)}, "optimizer": {}},
    "net.pos_embed": lambda net: renamed(net, "^", "net.") | renamed(net, "^", "net_ema."),
    "add --raw": lambda net: {"model": net},
    "other tensors": lambda net: {},
    "float8": lambda net: net | {BIAS: torch.ones(240).to(torch.float8_e4m3fn)},
    "not finite": lambda net: net | {BIAS: torch.full((240,), 1e300, dtype=torch.float64)},
    "ValueError": lambda net: {name: torch.ones(7) for name in net},
    "blocks.2.attn": lambda net: renamed(net, "blocks.2", "blocks.1000000000"),
    "final_layer.linear": lambda net: {  # zhuyu's fine-tuned SiT
        name: torch.cat([value] * 2) if name.startswith("final_layer.linear") else value
        for name, value in net.items()},
    "JSON": lambda net: {"ema": net, "config": {"model": "DiT-T/4", "vae": b"x"}},
    "depth is 1000000000": lambda net: {"ema": net, "config": OURS},
    "null row": lambda net: training_file(net, {"num_classes": 11}),
    "a list": lambda net: [net],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_such_network_is_refused(tmp_path, net, reason):
    content = REFUSED[reason](net.state_dict())
    source = None if "args" in content or "config" in content else "zhuyu"
    with refused("must ", reason) as error:
        convert(read_weights(save(tmp_path, content)), source=source)
    assert isinstance(error.value, BadValue)


@pytest.mark.parametrize("content", [
    {"steps": float("nan")}, {"steps": torch.ones(3)}, {"steps": [1]}, {"ema": torch.ones(3)},
    {"ema": 3, "model": torch.ones(3)}, {1: 2, "steps": 3}], ids=str)
def test_odd_values_beside_the_weights_are_refused(tmp_path, net, content):
    for raw in (False, True):
        with refused("must"):
            convert(read_weights(save(tmp_path, {"model": {}, "ema": {1: 2}, **content}), raw=raw))


@pytest.mark.parametrize("metadata", [
    {"shape": [10**9, 10**3]}, {"shape": [-10**9, 10**9]}, {"chunks": [10**9, 10**8]},
    {"dtype": "|S1000000000"}, {"dtype": [["a", "<f4", [10**5, 10**5]]]}, {"shape": ["a", 10**9]}])
def test_arrays_that_claim_more_than_the_folder_has_are_not_read(tmp_path, metadata):
    """TensorStore fills what is not on disk with zeros, and ended the process at bad_alloc."""
    tensorstore = pytest.importorskip("tensorstore")
    write_ocdbt(tmp_path / "theirs", {"ema_params": {"a": np.ones((10, 10), np.float32)}})
    files = tensorstore.KvStore.open({"driver": "ocdbt", "base": {
        "driver": "file", "path": f"{tmp_path / 'theirs'}/"}}).result()
    name = "ema_params.a/.zarray"
    whole = json.loads(files.read(name).result().value)
    files.write(name, json.dumps(whole | metadata)).result()
    with refused("must be a whole file", "rray" if "shape" not in metadata else ""):
        read_weights(tmp_path / "theirs")
    files.write(name, json.dumps(whole)).result()
    assert torch.equal(read_weights(tmp_path / "theirs").tensors["a"], torch.ones(10, 10))


def test_a_report_has_the_sha_256_of_what_was_read_and_says_where_no_format_has_one(
        tmp_path, net, jax_state):
    """Of 200 bits in a file without a checksum 106 changed a weight, and nobody knew."""
    weights, note = net.state_dict(), "no checksum"
    zipped = save(tmp_path, {"ema": weights})
    old = save(tmp_path, {"ema": weights}, _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "bare.safetensors")
    write_msgpack(tmp_path / "jax", jax_state)
    for path in zipped, old, tmp_path / "bare.safetensors", tmp_path / "jax":
        origin = read_weights(path).origin
        assert hashlib.sha256(path.read_bytes()).hexdigest() in origin and str(path) in origin
        assert (note in origin) == (path != zipped)
    write_ocdbt(tmp_path / "folder", jax_state)
    said = subprocess.run("find -L . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum",
                          shell=True, cwd=tmp_path / "folder", capture_output=True, text=True)
    origin = read_weights(tmp_path / "folder").origin
    assert said.stdout.split()[0] in origin and note in origin


def test_code_in_a_pickle_is_named_and_not_run(tmp_path, net):
    class Hostile:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    with refused("exec"):
        read_weights(save(tmp_path, {"ema": net.state_dict(), "args": Hostile()}))
    assert not (tmp_path / "ran").exists()


def test_torn_damaged_or_compressed_files_are_refused(tmp_path, net, jax_state, monkeypatch):
    """Mapped into memory, compressed bytes were taken for weights."""
    whole, compressed = save(tmp_path, net.state_dict()), tmp_path / "compressed.pt"
    write_msgpack(tmp_path / "jax", jax_state)
    with (zipfile.ZipFile(whole) as stored,
          zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive):
        for part in stored.infolist():
            archive.writestr(part.filename, stored.read(part))
    damaged = [compressed]
    for path in (whole, tmp_path / "jax"):
        content = path.read_bytes()
        for keep in (0, 2, 100, len(content) // 2, len(content) - 1000):
            damaged.append(tmp_path / f"{path.stem}-{keep}.torn")
            damaged[-1].write_bytes(content[:keep])
    flip_bit(whole, whole.stat().st_size // 2)
    for path in (*damaged, whole):
        with refused("must be a whole file"):
            read_weights(path)
    monkeypatch.setattr("torch.load", None)  # which would unpack any amount
    with refused("a compressed part"):
        read_weights(compressed)


def test_a_folder_without_a_finished_checkpoint_is_refused(tmp_path, jax_state):
    write_msgpack(tmp_path / "checkpoint_5.orbax-checkpoint-tmp-1" / "checkpoint", jax_state)
    write_ocdbt(tmp_path / "cut", jax_state)
    for path in (tmp_path / "cut" / "d").iterdir():
        path.unlink()
    for path in (tmp_path, tmp_path / "cut", tmp_path / "nowhere"):
        with refused("must be"):
            read_weights(path)


def test_a_missing_package_is_named(tmp_path, jax_state, monkeypatch):
    write_msgpack(tmp_path / "state", jax_state)
    monkeypatch.setitem(sys.modules, "msgpack", None)  # to import it is an error
    with refused("pip install msgpack"):
        read_weights(tmp_path / "state")


@pytest.mark.parametrize(("file", "options", "named"), [
    ("port", {"heads": 4}, "--heads"), ("port", {"image_size": 32}, "--image-size"),
    ("port", {"source": "sit"}, "--source"), ("jax", {"image_size": 64}, "--heads"),
    ("jax", {"heads": 7}, "--heads"), ("jax", {"heads": 4, "image_size": 72}, "--image-size")])
def test_options_that_do_not_fit_are_refused(tmp_path, net, jax_state, file, options, named):
    path = save(tmp_path, PORTS["zhuyu-cs/MeanFlow"](net.state_dict()))
    if file == "jax":  # it tells neither heads nor image size
        write_msgpack(path, jax_state)
    with refused(f"{named} must be"):
        opened(path, **options)
