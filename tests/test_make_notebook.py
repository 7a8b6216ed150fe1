"""The tutorial: the notebook is the script, can be read on the web, and runs."""

import base64
import importlib
import io
import json
import re
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

NOTEBOOK = ROOT / "examples" / "meanflow.ipynb"


@pytest.fixture
def make_notebook(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    return importlib.import_module("make_notebook")


def cells_of(path):
    return json.loads(path.read_text())["cells"]


def outputs_of(cells):
    """(all that was printed, all pictures as arrays)."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    printed = "".join("".join(output.get("text", [])) for output in outputs)
    pngs = [output["data"]["image/png"] for output in outputs if "data" in output]
    return printed, [np.array(Image.open(io.BytesIO(base64.b64decode(png))).convert("L"))
                     for png in pngs]


def check_outputs(cells):
    """Pictures show something, and the numbers say what the text says."""
    printed, pictures = outputs_of(cells)
    assert len(pictures) == 4 and all(picture.std() > 10 for picture in pictures)
    distances = dict(re.findall(r"^(\w[\w ,:]*\w) +(0\.\d+)$", printed, re.MULTILINE))
    assert len(distances) == 6
    data, one, _, flow_one, flow_two, flow_many = map(float, distances.values())
    assert max(one, flow_many) < 2 * data < flow_two < flow_one


def test_the_notebook_is_the_script(make_notebook):
    """If this fails, run python examples/make_notebook.py."""
    cells = cells_of(NOTEBOOK)
    script = make_notebook.read_cells(make_notebook.SCRIPT)
    for cell, ours in zip(cells, script, strict=True):
        assert {key: cell[key] for key in ("id", "cell_type", "source")} == {
            key: ours[key] for key in ("id", "cell_type", "source")}
    assert len(cells) > 15 and all(len(cell["source"]) <= 15 for cell in cells
                                   if cell["cell_type"] == "code")


def test_the_notebook_holds_its_pictures():
    cells = cells_of(NOTEBOOK)
    check_outputs(cells)
    code = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert code == list(range(1, len(code) + 1))
    assert NOTEBOOK.stat().st_size < 1_000_000


@pytest.mark.slow
def test_the_notebook_runs(make_notebook, tmp_path):
    make_notebook.main(make_notebook.parse_args(["--out", str(tmp_path / "new.ipynb")]))
    check_outputs(cells_of(tmp_path / "new.ipynb"))
