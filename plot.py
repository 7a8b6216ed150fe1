"""Plot the curves of one or several runs of train.py as one picture.

    python plot.py results/quickstart
    python plot.py results/DiT-B-4-cfg1.0 results/DiT-B-4-cfg3.0 --out curves-guidance.png

One panel per quantity, one color per run. A run that is still going on can be plotted, too. Needs
matplotlib, but neither TensorBoard nor a display.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import UserError, naming, run_main
from engine.files import atomic_file, check_folder
from engine.log import read_records
from engine.options import Parser, int_range
from metrics.reference import METRICS, metric_names

SOFTWARE = "plot.py of MeanFlow-PyTorch"  # in the PNG file: marks what may be overwritten
COLUMNS = 3
# Panels of training, by the keys of metrics.jsonl
TRAINING = {"error": "error", "error_equal": "error, rows with r = t",
            "error_unequal": "error, rows with r < t", "velocity_error": "velocity error",
            "velocity_error_equal": "velocity error, rows with r = t",
            "velocity_error_unequal": "velocity error, rows with r < t",
            "grad_norm": "gradient norm", "images_per_second": "images/s",
            "gpu_memory_gb": "GPU memory at its peak, GB",
            "skipped_steps": "steps left out, not finite"}
FROM_ZERO = ("images_per_second", "gpu_memory_gb", "skipped_steps")
LINEAR = ("inception_score", "precision", "recall")
LOG_FROM = 3  # ratio of the largest to the smallest value from which all others have a log axis


class Panel(NamedTuple):
    """What a panel shows. Values of different evaluations have panels of their own."""

    key: str
    title: str


def parse_args(argv=None):
    parser = Parser("Plot the curves of one or several runs of train.py as one PNG file.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                        help="run directory, as --run-dir of train.py")
    parser.add_argument("--out", type=Path, default=Path("curves.png"),
                        help="PNG file to write; of the files that exist, only those that plot.py "
                             "wrote are overwritten")
    parser.add_argument("--smooth", type=int_range(1), default=1, metavar="N",
                        help="draw means of up to N records of training, and the records faintly; "
                             "1 = no smoothing")
    return parser.parse_args(argv)


def main(args):
    check_out(args.out)
    runs = [read_run(folder) for folder in args.runs]
    figure = draw(runs, names_of(args.runs), args.smooth)
    with atomic_file(args.out) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": SOFTWARE})
    print(args.out)


def check_out(path):
    """Raise UserError unless path can be written and holds nothing but an older plot."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {path}; choose such a name")
    with naming("--out"):
        check_folder(path.parent)
    if path.is_symlink() or path.exists():
        head = path.read_bytes()[:1000] if path.is_file() else b""
        if not head.startswith(b"\x89PNG") or SOFTWARE.encode() not in head:
            raise UserError(f"--out must be a new file or one that plot.py wrote, got {path}; "
                            f"choose another name")


# ---- what the runs recorded ----------------------------------------------------------------------


def read_run(folder):
    """The curves of a run: {Panel: array (2, N)}, steps and values. Raises UserError."""
    path = folder / "metrics.jsonl"
    if not (path.is_file() and (folder / "config.json").is_file()):
        raise UserError(f"RUN must be the --run-dir of a run of train.py, got {folder}; it has no "
                        f"config.json or no metrics.jsonl")
    try:
        records, damaged = read_records(path)
    except OSError as error:
        raise UserError(f"RUN must be readable, got {path}: {error.strerror}; change that or "
                        f"choose another") from error
    if damaged:  # also a last line that train.py is writing at this moment
        print(f"damaged lines of {path}, skipped: {damaged}", file=sys.stderr)
    curves = {}
    for record in records:
        for panel, value in panels_of(record):
            curves.setdefault(panel, []).append((record["step"], value))
    if not curves:
        raise UserError(f"RUN must have metrics, got {folder} without; wait for its first log line")
    return {panel: np.array(points, dtype=float).T for panel, points in curves.items()}


def panels_of(record):
    """Yields (Panel, value) for every number of a record that is plotted."""
    titles, about = TRAINING, ""
    if "protocol" in record:
        titles = metric_names(record["protocol"])
        about = f" ({record['protocol']}, {record.get('num_samples', '?')} samples)"
    for key, title in titles.items():
        value = record.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and (key != "skipped_steps" or value > 0):
            yield Panel(key, title + about), value


def names_of(folders):
    """The names of the runs: those of their folders, or where two are the same the paths."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [name.encode(errors="replace").decode() for name in names]  # matplotlib needs UTF-8


# ---- the picture ---------------------------------------------------------------------------------


def draw(runs, names, smooth):
    """A matplotlib Figure of the curves of runs, by panel; smooth: records per mean."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError as error:
        raise UserError("plot.py needs matplotlib; pip install matplotlib") from error

    order = [*TRAINING, *METRICS]
    panels = sorted({panel for run in runs for panel in run},
                    key=lambda panel: (order.index(panel.key), panel.title))
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows + 0.8), layout="constrained")
    few = len(runs) <= 10
    colors = matplotlib.colormaps["tab10" if few else "turbo"]
    colors = [colors(i if few else i / (len(runs) - 1)) for i in range(len(runs))]
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex="all").flat)
    for panel, axis in zip(panels, axes):
        for run, color in zip(runs, colors):
            if panel in run:
                # An evaluation measures one step's network: a mean would hide that
                draw_curve(axis, *run[panel], color, smooth if panel.key in TRAINING else 1)
        finish_panel(axis, panel)
    for axis in axes[len(panels):]:
        axis.remove()
    faint = f" (faint), lines: means of up to {smooth} records" if smooth > 1 else ""
    figure.supxlabel(f"step; each record of training: the mean since the one before{faint}",
                     fontsize=10)
    add_legend(figure, names, colors)
    return figure


def draw_curve(axis, steps, values, color, smooth):
    """One curve of steps (N,) and values (N,); single points are visible as such."""
    marker = "o" if len(steps) <= 30 else None
    if smooth > 1:
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = [values[max(0, i - smooth + 1):i + 1].mean() for i in range(len(values))]
    axis.plot(steps, values, color=color, linewidth=1.3, marker=marker, markersize=3)


def finish_panel(axis, panel):
    """Title, grid and the scale of the values."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.tick_params(labelsize=8, which="both", labelbottom=True)
    if panel.key in FROM_ZERO:
        axis.set_ylim(bottom=0)
    elif panel.key not in LINEAR and axis.dataLim.y1 > LOG_FROM * axis.dataLim.y0 > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 20, not 2 x 10^1
        axis.yaxis.set_minor_formatter(NullFormatter())


def add_legend(figure, names, colors):
    """The names of the runs above the panels, as they are: no mathematics, no hidden ones."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=2) for color in colors]
    legend = figure.legend(handles, [str(i) for i in range(len(names))], fontsize=9,
                           loc="outside upper center",
                           ncols=max(1, min(4, 100 // (max(map(len, names)) + 6))))
    for text, name in zip(legend.get_texts(), names):
        text.set_parse_math(False)
        text.set_text(name)


if __name__ == "__main__":
    run_main(main, parse_args)
