"""Plot the curves of one or several runs of train.py as one picture, also while they go on, or
print their last and best values as a table.

    python plot.py results/DiT-B-4-cfg1.0 results/DiT-B-4-cfg3.0 --out curves-guidance.png
"""

import csv
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from engine.errors import UserError, naming, run_main
from engine.files import atomic_file, check_folder
from engine.log import OF_DATA, OF_START, read_records
from engine.options import Parser, int_range
from metrics.reference import metric_names

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
WITHOUT_PANEL = ("step", "loss")  # all other numbers of training have one
FROM_ZERO = ("images_per_second", "gpu_memory_gb", "skipped_steps")
LINEAR = ("inception_score", "precision", "recall")  # whose best value is the greatest
ERRORS = ("velocity_error", "error")  # the fixed panels that the table shows
LEFT_OUT = (*OF_DATA, *OF_START, "run_dir", "num_workers")  # of a config in the table
LARGEST = 1e100  # no quantity of training; axes of larger values overflow
PANELS = 60  # at most: a PNG file has fewer than 2^16 rows
LOG_FROM = 3  # the other panels have a log axis if the largest value is so many times the smallest


class Panel(NamedTuple):
    evaluated: bool  # measured by an evaluation, not by training
    key: str
    title: str


def parse_args(argv=None):
    parser = Parser("Plot the curves of one or several runs of train.py as one PNG file, or print "
                    "a table of them.")
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run directory, --run-dir of train.py")
    add("--out", type=Path,
        help="PNG file to write, a new one or one that plot.py wrote (default: curves.png)")
    add("--smooth", type=int_range(1), metavar="N",
        help="draw means of up to N records of training, and the records faintly (default: 1)")
    add("--table", nargs="?", const="markdown", choices=["markdown", "csv"],
        help="print, in place of the picture, the options in which the runs differ and their last "
             "and best values; comes after the runs, without --out and --smooth")
    args = parser.parse_args(argv)
    for option, value in (("--out", args.out), ("--smooth", args.smooth)):
        if args.table and value is not None:
            parser.error(f"{option} must come without --table, got {value}; leave one out")
    args.out, args.smooth = args.out or Path("curves.png"), args.smooth or 1
    return args


def main(args):
    if args.table:
        runs = [read_run(folder) for folder in args.runs]
        options = [read_options(folder) for folder in args.runs]
        print_table(table(runs, names_of(args.runs), options), args.table)
        return
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
    """The curves of a run: {Panel: array (2, N)}, steps and values. Raises UserError."""
    path = folder / "metrics.jsonl"
    records, damaged = read_records(path) if path.is_file() else ([], 0)
    if damaged:  # also a last line that train.py is writing at this moment
        print(f"damaged lines of {path}, skipped: {damaged}", file=sys.stderr)
    curves = {}
    for record in records:
        if evaluated := "protocol" in record:  # different evaluations have panels of their own
            evaluation = _one_line(f" ({record['protocol']!s:.40}, "
                                   f"{record.get('num_samples', '?')!s:.20} samples)")
            titles = {key: _one_line(name) + evaluation
                      for key, name in metric_names(record["protocol"]).items()}
        else:
            titles = {key: TRAINING.get(key) or _short(key) for key in record
                      if key not in WITHOUT_PANEL}
        for key, title in titles.items():
            value = record.get(key)
            if type(value) in (int, float) and (value or key != "skipped_steps"):
                value = value if abs(value) <= LARGEST else np.nan  # a gap in the curve
                curves.setdefault(Panel(evaluated, key, title), []).append((record["step"], value))
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


def _short(key):
    """The key of a file as a title."""
    return _one_line(key[:40])


def read_options(folder):
    """The options of a run as text, without those that are None: {key: text}. {}, and a line on
    stderr, if its config.json cannot be read."""
    path = folder / "config.json"
    try:
        return {key: _one_line(value if isinstance(value, str) else json.dumps(
                    value, separators=(",", ":"), ensure_ascii=False))
                for key, value in json.loads(path.read_bytes()).items()
                if value is not None and key not in LEFT_OUT}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        print(f"options left empty, {path} cannot be read: {error!s:.200}", file=sys.stderr)
        return {}


def table(runs, names, options):
    """The rows of the table, tuples of texts: the titles, then a row for each run."""
    columns = [["run", *names]]
    for key in dict.fromkeys(key for run in options for key in run):
        if len({run.get(key, "") for run in options if run}) > 1:
            columns.append([_short(key), *(run.get(key, "") for run in options)])
    last = [max(steps[-1] for steps, _ in run.values()) for run in runs]
    columns.append(["step", *(f"{step:.0f}" for step in last)])
    panels = [panel for panel in panels_of(runs)
              if panel.key in ERRORS or panel.key not in TRAINING]
    for panel in sorted(panels, key=lambda panel: panel.key != ERRORS[0]):
        picks = {"last": lambda values: values[-1]}
        if panel.evaluated or panel.key in ERRORS:
            # Unlike min and max these pass over NaN
            picks["best"] = (np.fmax if panel.key in LINEAR else np.fmin).reduce
        name = panel.key if panel.key in ERRORS else panel.title
        for word, pick in picks.items():
            columns.append([f"{name} {word}", *(f"{pick(run[panel][1]):.4g}" if panel in run else ""
                                                for run in runs)])
    return [*zip(*columns)]


def print_table(rows, form):
    """Print the rows on stdout in this form: markdown or csv."""
    if form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        return
    titles, *rows = [[re.sub(r"([\\|])", r"\\\1", text) for text in row] for row in rows]
    for row in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(row)} |")


def panels_of(runs):
    """The panels of the runs in order: the fixed ones of training, further ones, evaluations."""
    places = {key: place for place, key in enumerate([*TRAINING, *metric_names("")])}
    return sorted({panel for run in runs for panel in run}, key=lambda panel: (
        panel.evaluated, places.get(panel.key, len(places)), panel))


def draw(runs, names, smooth):
    """A Matplotlib Figure of the curves of runs, a panel each; smooth: records per mean."""
    panels = panels_of(runs)
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
    for i, panel in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, i, sharex=axis)
        axis.set_title(panel.title, fontsize=10, parse_math=False)
        for run, color in zip(runs, colors):
            if panel in run:
                # An evaluation measures one step's network: a mean would hide that
                draw_curve(axis, *run[panel], color, 1 if panel.evaluated else smooth)
        axis.grid(alpha=0.3, which="both")
        if panel.key in FROM_ZERO:
            axis.set_ylim(bottom=0)
        elif panel.key not in LINEAR and axis.dataLim.y1 > LOG_FROM * axis.dataLim.y0 > 0:
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
