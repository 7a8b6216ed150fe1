"""The style holds: options have help and readers, imports point down, nothing is written twice."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [path.stem for path in ROOT.glob("*.py") if "run_main(main" in path.read_text()]
ROOMS = ("engine", "dataset", "metrics")
LIBRARY = [ROOT / "meanflow.py", ROOT / "improved_meanflow.py", ROOT / "models.py",
           *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
RUN = [*LIBRARY, *(ROOT / f"{script}.py" for script in SCRIPTS)]
TREES = {path: ast.parse(path.read_text())
         for folder in (".", *ROOMS, "benchmarks", "examples", "tests")
         for path in (ROOT / folder).glob("*.py")}

# Who may import whom: each may import what stands before it, and its own room
FLOORS = ["meanflow", "improved_meanflow", "models", "engine", "dataset", "metrics", "scripts"]


def floor(path):
    """The floor of a file, or of the top-level module of this name."""
    name = path if isinstance(path, str) else path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "scripts" if name in SCRIPTS else name


def imported(nodes):
    """Names of the top-level modules that these nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def functions():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_there_are_scripts_and_library_modules():
    assert {"train", "sample"} <= set(SCRIPTS) and len(LIBRARY) > 15
    assert {floor(path) for path in ROOT.glob("*.py")} <= set(FLOORS)


def test_every_option_has_help_and_a_reader():
    for path, tree in TREES.items():
        read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                and "args" in (getattr(node.value, "id", ""), getattr(node.value, "attr", ""))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                option = node.args[0].value
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                assert "help" in given, f"{path.name} {option} has no help"
                dest = given["dest"].value if "dest" in given else option
                assert dest.lstrip("-").replace("-", "_") in read, f"{path.name} {option} is dead"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_diffusers(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # to import it is an error
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(script).parse_args(["--help"])
    assert not exit.value.code and "usage:" in capsys.readouterr().out


def test_diffusers_is_imported_in_functions_only():
    for path in RUN:
        inside = {node for function in ast.walk(TREES[path])
                  if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
        outside = [node for node in ast.walk(TREES[path]) if node not in inside]
        assert "diffusers" not in imported(outside), path.name


def test_imports_point_one_way():
    """Arrows point down; the one between scripts is train.py's, to sample.py's generator."""
    for path in RUN:
        own = floor(path)
        names = imported(ast.walk(TREES[path]))
        for other in {floor(name) for name in names} & set(FLOORS):
            below = FLOORS.index(other) < FLOORS.index(own) or other == own in ROOMS
            generator = path.stem == "train" and names & set(SCRIPTS) == {"sample"}
            assert below or generator, f"{path.relative_to(ROOT)} imports of {other}"
    assert not imported(ast.walk(TREES[ROOT / "models.py"])) & {"meanflow", "improved_meanflow"}


def test_only_the_module_for_it_knows_processes():
    for path in RUN:
        if path != ROOT / "engine" / "distributed.py":
            for word in ("torch.distributed", "LOCAL_RANK", "WORLD_SIZE", "init_process_group"):
                assert word not in path.read_text(), f"{path.name} mentions {word}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_library_modules_only_define(path):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in TREES[path].body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, allowed), f"{path.name} line {node.lineno}"


def test_benchmarks_and_examples_shadow_no_module():
    names = [path.stem for path in LIBRARY] + SCRIPTS + list(ROOMS)
    for folder in ("benchmarks", "examples"):
        assert not {path.stem for path in (ROOT / folder).glob("*.py")} & set(names)


def test_every_file_opens_with_a_docstring():
    for path, tree in TREES.items():
        assert ast.get_docstring(tree), path.name


# What tensors and arrays are called in signatures, and what makes them
DATA = {"activations", "array", "batch", "batches", "eps", "features", "first_batch", "image",
        "images", "iterable", "loss", "losses", "moments", "moving", "noise", "norm", "others",
        "output", "patches", "pixels", "points", "rows", "samples", "tensor", "tensors", "values",
        "x", "y", "z", "z1"}
MAKERS = {"arange", "array", "cat", "concatenate", "cos", "empty", "expand", "frombuffer",
          "from_numpy", "interpolate", "mean", "ndarray", "numpy", "permute", "rand", "randn",
          "sin", "split", "stack", "tensor", "to", "total", "unbind", "where", "zeros"}
# A shape, such as (B,), (B, 3, H, W) or (N, 64), or the words for none in particular
SHAPE = re.compile(r"\([A-Z0-9n][\w.* ^/-]*,[^)]*\)|scalar|any shape")

# What is called so and is none: PIL's images, ranges of rows, data sets
OTHERS = {("images", "center_crop"), ("encode_imagenet", "__init__"),
          ("encode_imagenet", "encode"), ("encode_imagenet", "split"), ("evaluate_fid", "measure"),
          ("evaluate_fid", "compare"), ("evaluate_fid", "make_reference"),
          ("reference", "of"), ("classes", "imagenet_names"), ("meanflow", "equal_rows")}
ENTRANCES = {"__init__", "__call__", "forward"}


def public_functions(tree):
    """(function, class or None) of a module's functions and methods without those in functions."""
    for node in tree.body:
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            public = isinstance(function, ast.FunctionDef) and (
                function.name[0] != "_" or function.name in ENTRANCES)
            if public and getattr(node, "name", "")[0] != "_":
                yield function, node if isinstance(node, ast.ClassDef) else None


def handles_data(function):
    """Whether a function takes or returns tensors or arrays, by the names of what it does."""
    taken = {argument.arg for argument in function.args.args + function.args.kwonlyargs}
    given = [node.value for node in ast.walk(function)
             if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) and node.value]
    calls = [node.func for value in given for node in ast.walk(value) if isinstance(node, ast.Call)]
    return bool(taken & DATA) or any(
        isinstance(call, ast.Attribute) and call.attr in MAKERS for call in calls)


@pytest.mark.parametrize("path", RUN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_docstrings_say_the_shapes_of_data(path):
    """The docstring of a class is that of __init__, __call__ and forward."""
    silent = []
    for function, owner in public_functions(TREES[path]):
        nodes = [function, owner] if owner and function.name in ENTRANCES else [function]
        said = " ".join(ast.get_docstring(node) or "" for node in nodes)
        none = (path.stem, function.name) in OTHERS
        if handles_data(function) and not none and not SHAPE.search(said):
            silent.append(function.name)
    assert not silent


def test_no_function_body_occurs_twice():
    seen = {}
    for path, node in functions():
        body = node.body[1:] if ast.get_docstring(node) else node.body
        text = ast.dump(ast.Module(body, []))
        if len(ast.unparse(ast.Module(body, [])).splitlines()) > 1:
            assert text not in seen, f"{path.name} {node.name} = {seen[text]}"
            seen[text] = f"{path.name} {node.name}"


def test_functions_are_at_most_40_lines():
    for path, node in functions():
        assert node.end_lineno - node.lineno < 40, f"{path.name} {node.name}"


def test_no_test_file_imports_another():
    found = {f"{path.name} imports {name}" for path, tree in TREES.items()
             for name in imported(ast.walk(tree)) if name.startswith("test_")}
    assert not found


def test_lines_are_at_most_100_columns():
    for path in TREES:
        for i, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{i}"


def readme_commands():
    """Every command line of README.md and docs/ that starts one of our scripts."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    for line in text.splitlines():
        found = re.match(r"\s*(?:torchrun|python)\b.*?\b(\w+)\.py(.*)", line)
        if found and found[1] in SCRIPTS:
            yield found[1], found[2].split("#")[0]


def test_commands_of_the_readme_parse():
    commands = list(readme_commands())
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, options in commands:
        importlib.import_module(script).parse_args(shlex.split(options))


PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "RESULTS.md"]
PROGRAMS = sorted({found for page in PAGES for found in re.findall(
    r"python ((?:benchmarks|examples|tests)/\w+\.py)([^`\n]*)", page.read_text())})


@pytest.mark.parametrize("path, options", PROGRAMS)
def test_commands_of_benchmarks_and_examples_parse(path, options, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / Path(path).parent)
    options = shlex.split(options.split("#")[0].replace("--precision P", "--precision bf16"))
    importlib.import_module(Path(path).stem).parse_args(options)


def test_readme_opens_with_the_two_commands():
    first = (ROOT / "README.md").read_text().splitlines()[:15]
    assert "bash quickstart.sh" in "\n".join(first) and "bash run_tests.sh" in "\n".join(first)


def test_the_file_table_of_the_readme_names_every_file():
    """And no file that is gone."""
    table = (ROOT / "README.md").read_text().split("\n## Files\n")[1].split("\n## ")[0]
    missing = [path.name for path in [*RUN, *ROOT.glob("*.sh")] if path.stem != "__init__"
               and not re.search(rf"\b{path.stem}\b", table)]
    assert not missing
    for name in re.findall(r"\w+\.(?:py|sh|md)\b", table):
        assert list(ROOT.glob(name)) + list(ROOT.glob(f"[a-z]*/{name}")), name
