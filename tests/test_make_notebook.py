"""The tutorial: the notebook is the script, can be read on the web, and runs."""

import base64
import io
import json
import re

import make_notebook  # soak.py, which conftest.py imports, finds examples/
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

NOTEBOOK = ROOT / "examples" / "meanflow.ipynb"


def checked_cells(path):
    """The cells, whose pictures must show something and whose numbers are as the text says."""
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


def test_the_notebook_is_the_script_with_pictures():
    """If this fails, run python examples/make_notebook.py."""
    script = make_notebook.read_cells(make_notebook.SCRIPT)
    for cell, ours in zip(checked_cells(NOTEBOOK), script, strict=True):
        assert all(cell[key] == ours[key] for key in ("id", "cell_type", "source"))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    make_notebook.main(make_notebook.parse_args(["--out", str(tmp_path / "new.ipynb")]))
    checked_cells(tmp_path / "new.ipynb")
