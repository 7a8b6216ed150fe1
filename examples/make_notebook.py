"""Write meanflow.ipynb: the cells of meanflow_2d.py, run in order, with what they print and draw.

    python examples/make_notebook.py        # half a minute on a CPU; needs matplotlib, not Jupyter

In the script "# %%" opens a cell of code and "# %% [markdown]" a cell of text.
"""

import argparse
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPT = HERE / "meanflow_2d.py"
MARK = re.compile(r"^# %%(.*)\n", re.MULTILINE)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Write the notebook of meanflow_2d.py.")
    parser.add_argument("--out", type=Path, default=HERE / "meanflow.ipynb",
                        help="the notebook to write")
    return parser.parse_args(argv)


def main(args):
    sys.path.insert(0, str(HERE.parent))  # so that it also runs elsewhere
    cells = read_cells(SCRIPT)
    run_cells(cells)
    notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    args.out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(args.out)


METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}


def read_cells(path):
    """The cells of a script, in the notebook format 4.5, without outputs."""
    cells = []
    _, *parts = MARK.split(Path(path).read_text())
    for kind, source in zip(parts[::2], parts[1::2]):
        text, number = kind.strip() == "[markdown]", len(cells)
        if text:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        cell = {"cell_type": "markdown" if text else "code", "id": f"cell-{number:02d}",
                "metadata": {}, "source": source.strip("\n").splitlines(keepends=True)}
        cells.append(cell if text else cell | {"execution_count": None, "outputs": []})
    return cells


def run_cells(cells):
    """Run the cells of code in order, in one namespace, and keep what they print and draw."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names, code = {"__name__": "__main__"}, [c for c in cells if c["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["execution_count"], printed = number, io.StringIO()
        show, plt.show = plt.show, lambda cell=cell: cell["outputs"].extend(take_figures(plt))
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        finally:
            plt.show = show
        if printed.getvalue():
            cell["outputs"].insert(0, {"output_type": "stream", "name": "stdout",
                                       "text": printed.getvalue().splitlines(keepends=True)})


def take_figures(plt):
    """Yields the open figures as outputs, and closes them."""
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=80, metadata={"Software": None})
        plt.close(number)
        png = base64.b64encode(picture.getvalue()).decode()
        yield {"output_type": "display_data", "metadata": {},
               "data": {"image/png": png, "text/plain": ["<Figure>"]}}


if __name__ == "__main__":
    main(parse_args())
