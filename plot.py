"""Plot the curves of one or several runs of train.py as one picture, also while they go on.

    python plot.py results/DiT-B-4-cfg1.0 results/DiT-B-4-cfg3.0 --out curves-guidance.png
"""

import os
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

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
LARGEST = 1e100  # no quantity of training; axes of larger values overflow
PANELS = 60  # at most: a PNG file has fewer than 2^16 rows
LOG_FROM = 3  # the other panels have a log axis if the largest value is so many times the smallest


def parse_args(argv=None):
    parser = Parser("Plot the curves of one or several runs of train.py as one PNG file.")
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run directory, --run-dir of train.py")
    add("--out", type=Path, default=Path("curves.png"),
        help="PNG file to write, a new one or one that plot.py wrote")
    add("--smooth", type=int_range(1), default=1, metavar="N",
        help="draw means of up to N records of training, and the records faintly")
    return parser.parse_args(argv)


def main(args):
    check_out(args.out)
    runs = [read_run(folder) for folder in args.runs]
    figure = draw(runs, names_of(args.runs), args.smooth)
    with atomic_file(args.out) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks becomes a box
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": SOFTWARE})
    print(args.out)


def check_out(path):
    """Raise UserError unless path can be written and holds nothing but an older plot."""
    with naming("--out"):
        check_folder(path.parent)
    older = path.is_file() and SOFTWARE.encode() in path.read_bytes()[:1000]
    if path.suffix != ".png" or (os.path.lexists(path) and not older):
        raise UserError(f"--out must be a new file that ends in .png, or one that plot.py wrote, "
                        f"got {path}; choose another name")


def read_run(folder):
    """The curves of a run: {(key, title): array (2, N)}, steps and values. Raises UserError."""
    path = folder / "metrics.jsonl"
    records, damaged = read_records(path) if path.is_file() else ([], 0)
    if damaged:  # also a last line that train.py is writing at this moment
        print(f"damaged lines of {path}, skipped: {damaged}", file=sys.stderr)
    curves = {}
    for record in records:
        titles, evaluation = TRAINING, ""
        if "protocol" in record:  # values of different evaluations have panels of their own
            titles = metric_names(record["protocol"])
            evaluation = _one_line(f" ({record['protocol']!s:.40}, "
                                   f"{record.get('num_samples', '?')!s:.20} samples)")
        for key, title in titles.items():
            value = record.get(key)
            if isinstance(value, int | float) and (value or key != "skipped_steps"):
                value = value if abs(value) <= LARGEST else np.nan  # a gap in the curve
                curves.setdefault((key, title + evaluation), []).append((record["step"], value))
    if not curves:
        raise UserError(f"RUN must be a --run-dir of train.py with metrics, got {folder} without; "
                        f"check the path, or wait for the first log line")
    return {panel: np.array(points, dtype=float).T for panel, points in curves.items()}


def names_of(folders):
    """The names of the runs: those of their folders, or if two are the same the paths."""
    names = [folder.resolve().name for folder in folders]
    return [*map(_one_line, names if len(set(names)) == len(names) else map(str, folders))]


def _one_line(text):
    """The text as Matplotlib draws it: UTF-8, without control characters."""
    text = text.encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def draw(runs, names, smooth):
    """A Matplotlib Figure of the curves of runs, a panel each; smooth: records per mean."""
    order = [*TRAINING, *METRICS]
    panels = sorted({panel for run in runs for panel in run},
                    key=lambda panel: (order.index(panel[0]), panel[1]))
    if panels[PANELS:]:
        print(f"left out: {len(panels) - PANELS} of {len(panels)} panels; plot fewer runs at once",
              file=sys.stderr)
        del panels[PANELS:]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows + 0.8), layout="constrained")
    colors = matplotlib.colormaps["tab10"].colors
    if len(runs) > len(colors):
        colors = matplotlib.colormaps["turbo"](np.linspace(0, 1, len(runs)))
    axis = None
    for i, (key, title) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, i, sharex=axis)
        axis.set_title(title, fontsize=10, parse_math=False)
        for run, color in zip(runs, colors):
            if (key, title) in run:
                # An evaluation measures one step's network: a mean would hide that
                draw_curve(axis, *run[key, title], color, smooth if key in TRAINING else 1)
        axis.grid(alpha=0.3, which="both")
        if key in FROM_ZERO:
            axis.set_ylim(bottom=0)
        elif key not in LINEAR and axis.dataLim.y1 > LOG_FROM * axis.dataLim.y0 > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")  # 20, not 2 x 10^1
            axis.yaxis.set_minor_formatter("")
    smoothing = f" (faint), lines: means of up to {smooth} records" if smooth > 1 else ""
    figure.supxlabel(f"step; each record of training: the mean since the one before{smoothing}")
    lines = [Line2D([], [], color=color, linewidth=2) for color in colors[:len(names)]]
    legend = figure.legend(lines, ["name"] * len(names), loc="outside upper center",
                           ncols=max(1, min(4, 100 // (max(map(len, names)) + 6))))
    for text, name in zip(legend.get_texts(), names):  # as they are: no formulas, no hidden ones
        text.set(parse_math=False, text=name)
    return figure


def draw_curve(axis, steps, values, color, smooth):
    """One curve of steps (N,) and values (N,); single points are visible as such."""
    if smooth > 1:
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = [values[max(0, i - smooth + 1):i + 1].mean() for i in range(len(values))]
    axis.plot(steps, values, color=color, linewidth=1.3, markersize=3,
              marker="o" if len(steps) <= 30 else None)


if __name__ == "__main__":
    run_main(main, parse_args)
