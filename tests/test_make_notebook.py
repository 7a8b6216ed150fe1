"""The tutorial: the notebook is the script, can be read on the web, and runs."""

import base64
import importlib
import io
import json
import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

NOTEBOOK = ROOT / "examples" / "meanflow.ipynb"


@pytest.fixture
def make_notebook(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("make_notebook")


def checked_cells(path):
    """The cells of a notebook whose pictures show something and whose numbers are as its text says.
    """
    cells = json.loads(path.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
                         .convert("L")) for output in outputs if "data" in output]
    assert len(pictures) == 4 and all(picture.std() > 10 for picture in pictures)
    printed = "".join("".join(output.get("text", [])) for output in outputs)
    distances = dict(re.findall(r"^(\w[\w ,:]*\w) +(0\.\d+)$", printed, re.MULTILINE))
    data, one, _, flow_one, flow_two, flow_many = map(float, distances.values())
    assert max(one, flow_many) < 2 * data < flow_two < flow_one
    return cells


def test_the_notebook_is_the_script_with_pictures(make_notebook):
    """If this fails, run python examples/make_notebook.py."""
    cells = checked_cells(NOTEBOOK)
    script = make_notebook.read_cells(make_notebook.SCRIPT)
    for cell, ours in zip(cells, script, strict=True):
        for key in ("id", "cell_type", "source"):
            assert cell[key] == ours[key]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)) and NOTEBOOK.stat().st_size < 1_000_000


@pytest.mark.slow
def test_the_notebook_runs(make_notebook, tmp_path):
    make_notebook.main(make_notebook.parse_args(["--out", str(tmp_path / "new.ipynb")]))
    checked_cells(tmp_path / "new.ipynb")
