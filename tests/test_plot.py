"""The curves of runs as one picture: what is drawn, what is refused, what is overwritten."""

import json
import os
import sys

import numpy as np
import pytest
from conftest import call
from PIL import Image

import plot


def write_run(folder, *records):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}\n")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    return folder


def training(step, **values):
    return {"step": step, "error": 100 / step, "velocity_error": 90.0, "loss": 0.999,
            "grad_norm": 1.0, "skipped_steps": 0, "images_per_second": 2000.0, **values}


def evaluation(step, **values):
    return {"step": step, "protocol": "pixels", "num_samples": 60, "fid": 5.0, "seed": 0, **values}


@pytest.fixture
def runs(tmp_path):
    """A run with everything, and one of an older train.py, without the errors by rows."""
    split = {f"{name}_{rows}": 3.0 for name in ("error", "velocity_error")
             for rows in ("equal", "unequal")}
    return [write_run(tmp_path / "new", *(training(step, **split) for step in (1, 2, 3, 4)),
                      evaluation(2), evaluation(4), evaluation(4, num_samples=90)),
            write_run(tmp_path / "old", *(training(step) for step in (1, 2)))]


def axes_of(figure):
    return {axis.get_title(): axis for axis in figure.axes}


def figure_of(folders, smooth=1):
    """The axes by title, drawn once, and the legend's texts."""
    figure = plot.draw([plot.read_run(folder) for folder in folders], plot.names_of(folders),
                       smooth)
    figure.draw_without_rendering()
    return axes_of(figure), [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_trained_run_is_plotted(trained, tmp_path, capfd):
    call("plot", trained.parent.parent, "--out", tmp_path / "curves.png")
    assert capfd.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    image = Image.open(tmp_path / "curves.png")
    assert image.width > 1000 and np.array(image.convert("L")).std() > 10


def test_every_quantity_has_a_panel_and_every_run_a_color(runs):
    axes, names = figure_of(runs)
    assert names == ["new", "old"]
    assert {title: len(axis.lines) for title, axis in axes.items()} == {
        "error": 2, "error, rows with r = t": 1, "error, rows with r < t": 1, "velocity error": 2,
        "velocity error, rows with r = t": 1, "velocity error, rows with r < t": 1,
        "gradient norm": 2, "images/s": 2, "Frechet distance of pixels (pixels, 60 samples)": 1,
        "Frechet distance of pixels (pixels, 90 samples)": 1}
    new, old = axes["error"].lines
    assert new.get_xydata().tolist() == [[step, 100 / step] for step in (1, 2, 3, 4)]
    assert new.get_color() != old.get_color()
    assert axes["error"].get_yscale() == "log" and axes["images/s"].get_yscale() == "linear"


def test_smoothing_is_said_and_keeps_the_records_visible(runs):
    axes, _ = figure_of(runs[:1], smooth=2)
    faint, line = axes["error"].lines
    assert faint.get_ydata().tolist() == [100, 50, 100 / 3, 25]
    assert line.get_ydata() == pytest.approx([100, 75, 125 / 3, 175 / 6])
    assert len(axes["Frechet distance of pixels (pixels, 60 samples)"].lines) == 1
    figure = plot.draw([plot.read_run(runs[0])], ["new"], 2)
    assert "means of up to 2 records" in figure.get_supxlabel()


def test_a_torn_last_line_is_skipped(runs, tmp_path, capfd):
    """The picture of a run that is going on."""
    path = runs[0] / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "error": 2')
    call("plot", runs[0], "--out", tmp_path / "curves.png")
    assert f"damaged lines of {path}, skipped: 1" in capfd.readouterr().err
    assert plot.read_run(runs[0])[plot.Panel("error", "error")][0].tolist() == [1, 2, 3, 4]


def test_values_that_have_no_logarithm_are_drawn(tmp_path):
    run = write_run(tmp_path / "run", training(1, error=float("nan")), training(2, error=0.0),
                    training(3, error=None), training(4, error="x"), training(5, grad_norm=1e9))
    axes, _ = figure_of([run])
    assert axes["error"].get_yscale() == "linear" and len(axes["error"].lines[0].get_xdata()) == 3


def test_names_are_shown_as_they_are(tmp_path):
    """A legend of matplotlib hides names with a leading underscore and sets $...$ as formulas."""
    odd = os.fsdecode(b"caf\xe9")
    folders = [write_run(tmp_path / name, training(1), training(2))
               for name in ("_hidden", "$\\frac$", odd, "a/run", "b/run")]
    assert figure_of(folders[:3])[1] == ["_hidden", "$\\frac$", "caf?"]
    assert figure_of(folders[3:])[1] == [str(tmp_path / "a/run"), str(tmp_path / "b/run")]


def test_many_runs_have_distinct_colors(runs):
    lines = figure_of(runs * 6)[0]["error"].lines
    colors = np.array([line.get_color() for line in lines])  # (12, 4)
    distances = np.abs(colors[:, None] - colors).max(2) + np.eye(12)
    assert distances.min() > 0.05


def test_only_pictures_of_its_own_are_overwritten(runs, refusal, tmp_path):
    out = tmp_path / "curves.png"
    for folder in runs:
        call("plot", folder, "--out", out)
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "link.png").symlink_to("nowhere")
    for name in ("photo.png", "link.png", "new"):
        refusal("plot", [runs[0], "--out", tmp_path / name], "--out")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(plot.UserError, match="new file"):
        plot.check_out(tmp_path / "pipe.png")
    refusal("plot", [runs[0], "--out", out / "curves.png"], "--out")


def test_what_is_no_run_with_metrics_is_refused(runs, refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    early = write_run(tmp_path / "early")
    torn = write_run(tmp_path / "torn", [1])
    for folder in (tmp_path / "empty", tmp_path / "absent", runs[0] / "metrics.jsonl", early):
        refusal("plot", [runs[0], folder, "--out", tmp_path / "curves.png"], "RUN")
    with pytest.raises(plot.UserError, match="RUN must have metrics"):
        plot.read_run(torn)


def test_without_matplotlib_one_line_says_what_to_install(runs, refusal, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # to import it is an error
    assert "pip install matplotlib" in refusal(
        "plot", [runs[0], "--out", tmp_path / "curves.png"], "matplotlib")
