"""The style holds: imports point down, options have help and readers, the pages' commands parse."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {"train", "sample", "encode_imagenet", "evaluate_fid", "convert_checkpoint", "plot"}
PROGRAMS = {"benchmarks", "examples", "tests"}
FOLDERS = {"engine", "weights", "dataset", "metrics"} | PROGRAMS
TREES = {path.relative_to(ROOT): ast.parse(path.read_text())
         for folder in ("", *sorted(FOLDERS)) for path in sorted((ROOT / folder).glob("*.py"))}
# A file may import from the floors below its own and from its own folder. The lowest are meanflow
# and models, then what else in the root is no script: methods and their table
ROOMS = {path.stem for path, tree in TREES.items() if len(path.parts) == 1
         and "parse_args" not in {getattr(node, "name", "") for node in tree.body}}
LOWEST = {"meanflow", "models"}
FLOORS = [LOWEST, ROOMS - LOWEST, {"engine"}, {"dataset"}, {"weights"}, {"metrics"}, SCRIPTS]
SIDEWAYS = {("train", "sample"), *((room, other) for room in ROOMS - LOWEST for other in ROOMS)}
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "RESULTS.md"]


def imported(nodes):
    """Names of the top-level modules that these nodes import."""
    return {name.split(".")[0] for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or node.names[0].name]}


def test_imports_point_down_and_only_the_engine_knows_processes():
    levels = {name: level for level, floor in enumerate(FLOORS) for name in floor}
    for path, tree in TREES.items():
        name, names = path.parts[0].removesuffix(".py"), imported(ast.walk(tree))
        if name in PROGRAMS:
            assert not any(other.startswith("test_") for other in names), path
            continue
        for other in names & levels.keys() - {name}:
            assert levels[other] < levels[name] or (name, other) in SIDEWAYS, (path, other)
        if path != Path("weights", "pipeline.py"):  # which nothing imports
            assert "diffusers" not in imported(tree.body), f"{path}: it takes seconds to import"
        if name != "engine":
            text = (ROOT / path).read_text()
            assert not re.search("torch.distributed|LOCAL_RANK|WORLD_SIZE", text), path


def test_every_option_has_help_and_a_reader():
    for path, tree in TREES.items():
        read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                and "args" in (getattr(node.value, "id", ""), getattr(node.value, "attr", ""))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and "add_argument" in (
                    getattr(node.func, "attr", ""), f"{getattr(node.func, 'id', '')}_argument"):
                option = getattr(node.args[0], "value", None)
                if option is None:
                    continue  # of the settings of methods, which have help and are read by name
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                assert "help" in keywords, f"{path} {option} has no help"
                name = keywords["dest"].value if "dest" in keywords else option
                assert name.lstrip("-").replace("-", "_") in read, f"{path} {option} is dead"


@pytest.mark.parametrize("path", [path for path, tree in TREES.items() if "parse_args" in {
    getattr(node, "name", "") for node in tree.body}], ids=str)
def test_help_answers(path, monkeypatch, capsys):
    """A percent sign in a help text breaks it."""
    monkeypatch.syspath_prepend((ROOT / path).parent)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(path.stem).parse_args(["--help"])
    assert not end.value.code and "usage:" in capsys.readouterr().out


def test_functions_are_short_and_written_once():
    bodies = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path} {node.name}"
                body = node.body[1:] if ast.get_docstring(node) else node.body
                text = "\n".join(map(ast.unparse, body))
                twin = bodies.setdefault(text, node) if "\n" in text else node
                assert twin is node, f"{path} {node.name} = {twin.name}"


def test_commands_of_the_pages_parse(monkeypatch):
    """Command lines in code blocks, and those in backticks, which may span lines."""
    pages = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    block = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
    lines = [line for text in block.findall(pages) for line in text.splitlines()]
    lines += [span.replace("\n", " ") for span in re.findall("`([^`]+)`", block.sub("", pages))]
    command = re.compile(r"\b(?:torchrun|python) (?:.* )?([\w/]+)\.py([^&|>#]*)")
    commands = [match.groups() for match in map(command.search, lines)
                if match and "--help" not in match[2]]
    assert {program for program, _ in commands} >= SCRIPTS
    for program, options in commands:
        monkeypatch.syspath_prepend((ROOT / program).parent)
        options = options.replace("--precision P", "--precision bf16")
        importlib.import_module(Path(program).name).parse_args(shlex.split(options))


def test_readme_opens_with_the_two_commands():
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:15])
    assert "bash quickstart.sh" in head and "bash run_tests.sh" in head


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([\w./-]+)[)#]", text)
    names = re.findall(rf"\b(?:{'|'.join(FOLDERS)})/\w+\.\w+\b", text)
    paths = [page.parent / link for link in links] + [ROOT / name for name in names]
    assert not [path for path in paths if not path.exists()]
