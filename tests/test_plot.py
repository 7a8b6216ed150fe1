"""The curves of runs as one picture: what is drawn, what is refused, what is overwritten."""

import json
import os
import warnings

import numpy as np
import pytest
from conftest import call
from PIL import Image

import plot

ONE, TWO = (f"Frechet distance of pixels (pixels, {count} samples)" for count in (60, 90))


def write_run(folder, *records):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    return folder


def training(step, **values):
    return {"step": step, "error": 100 / step, "grad_norm": 1.0, "loss": 0.999, "skipped_steps": 0,
            "images_per_second": 2000.0, **values}


def evaluation(step, num_samples=60):
    return {"step": step, "protocol": "pixels", "num_samples": num_samples, "fid": 5.0, "seed": 0}


@pytest.fixture
def runs(tmp_path):
    """A run with evaluations and errors by rows, and one without."""
    return [write_run(tmp_path / "new", *(training(step, error_equal=3.0) for step in (1, 2, 3, 4)),
                      evaluation(2), evaluation(4), evaluation(4, num_samples=90)),
            write_run(tmp_path / "old", *(training(step) for step in (1, 2)))]


def figure_of(folders, smooth=1):
    """The figure, and its axes by title."""
    figure = plot.draw([plot.read_run(folder) for folder in folders], plot.names_of(folders),
                       smooth)
    figure.draw_without_rendering()
    return figure, {axis.get_title(): axis for axis in figure.axes}


def test_a_trained_run_is_plotted(trained, tmp_path, capfd):
    call("plot", trained.parent.parent, "--out", tmp_path / "curves.png")
    assert capfd.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    image = Image.open(tmp_path / "curves.png")
    assert image.width > 1000 and np.array(image.convert("L")).std() > 10


def test_every_quantity_has_a_panel_and_every_run_a_color(runs):
    _, axes = figure_of(runs)
    assert {title: len(axis.lines) for title, axis in axes.items()} == {
        "error": 2, "error, rows with r = t": 1, "gradient norm": 2, "images/s": 2, ONE: 1, TWO: 1}
    new, old = axes["error"].lines
    assert new.get_xydata().tolist() == [[step, 100 / step] for step in (1, 2, 3, 4)]
    assert new.get_color() != old.get_color() and axes["error"].get_yscale() == "log"
    assert axes["images/s"].get_yscale() == "linear" and axes["images/s"].get_ylim()[0] == 0


def test_smoothing_is_said_and_keeps_the_records_visible(runs):
    figure, axes = figure_of(runs[:1], smooth=2)
    faint, line = axes["error"].lines
    assert faint.get_ydata().tolist() == [100, 50, 100 / 3, 25]
    assert line.get_ydata() == pytest.approx([100, 75, 125 / 3, 175 / 6])
    assert len(axes[ONE].lines) == 1  # evaluations are not smoothed
    assert "means of up to 2 records" in figure.get_supxlabel()


def test_values_that_have_no_logarithm_are_drawn(tmp_path):
    run = write_run(tmp_path / "run", training(1, error=float("nan")), training(2, error=0.0),
                    training(3, error=None), training(5, skipped_steps=2))
    _, axes = figure_of([run])
    assert axes["error"].get_yscale() == "linear" and len(axes["error"].lines[0].get_xdata()) == 3
    assert axes["steps left out, not finite"].lines[0].get_xydata().tolist() == [[5, 2]]


def test_odd_numbers_and_protocols_are_drawn_without_a_word(tmp_path, capfd):
    """Numbers of 400 digits and 1e308 beside -1e308 ended in a traceback, $ was a formula, and of
    a letter that the font lacks Matplotlib warns."""
    run = tmp_path / "日本"
    run.mkdir()
    lines = [json.dumps({"error": value, **more}) for value, more in (
        (10**400, {"step": 1}), (1e308, {"step": 2}), (-1e308, {"step": 3}), (2.0, {"step": 4}),
        (float("inf"), {"step": 5}), (1.0, {"step": 10**400}), (1.0, {"step": -1}),
        (1.0, {"step": True}), *(
            (1.0, {"step": 6, "protocol": protocol, "fid": 3.0}) for protocol in
            ("$x^{", "a\nb", ["list"], {"a": 1}, None, "x" * 10**5, "\ud800", 10**400)))]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 1' + "0" * 5000]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call("plot", run, "--out", tmp_path / "curves.png")
    _, axes = figure_of([run.rename(tmp_path / "run")])
    assert capfd.readouterr().err.count("skipped: 4") == 2
    np.testing.assert_array_equal(axes["error"].lines[0].get_ydata(), [np.nan] * 3 + [2, np.nan])
    titles = [title for title in axes if title.startswith("FID")]
    assert "FID ($x^{, ? samples)" in titles and "FID (a?b, ? samples)" in titles
    assert len(titles) == 8 and max(map(len, titles)) < 80


def test_more_panels_than_a_picture_holds_are_left_out(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(plot, "PANELS", 3)
    run = write_run(tmp_path / "run", *(evaluation(4, count) for count in range(9)))
    call("plot", run, "--out", tmp_path / "curves.png")
    assert "left out: 6 of 9 panels" in capfd.readouterr().err


def test_names_are_shown_as_they_are(tmp_path):
    """A legend of Matplotlib hides names with a leading underscore and sets $...$ as formulas."""
    for names, shown in (([b"_hidden", b"$\\frac$", b"caf\xe9"], ["_hidden", "$\\frac$", "caf?"]),
                         ([b"a/run", b"b/run"], [f"{tmp_path}/a/run", f"{tmp_path}/b/run"])):
        folders = [write_run(tmp_path / os.fsdecode(name), training(1)) for name in names]
        assert [text.get_text() for text in figure_of(folders)[0].legends[0].get_texts()] == shown


def test_only_pictures_of_its_own_are_overwritten(runs, refusal, tmp_path):
    for folder in runs:
        call("plot", folder, "--out", tmp_path / "curves.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "link.png").symlink_to("nowhere")
    for name in ("photo.png", "link.png", "new", "curves.png/new.png"):
        refusal("plot", [runs[0], "--out", tmp_path / name], "--out")


def test_what_is_no_run_with_metrics_is_refused(runs, refusal, tmp_path):
    for folder in (tmp_path, tmp_path / "absent", runs[0] / "metrics.jsonl",
                   write_run(tmp_path / "early")):
        with pytest.raises(plot.UserError, match="RUN must"):
            plot.read_run(folder)
    refusal("plot", [*runs, tmp_path, "--out", tmp_path / "curves.png"], "RUN")
