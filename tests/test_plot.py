"""The curves of runs as one picture or table: what is shown, refused, overwritten."""

import csv
import json
import os
import warnings

import numpy as np
import pytest
from conftest import call
from PIL import Image

import plot

ONE, TWO = (f"Frechet distance of pixels (pixels, {count} samples)" for count in (60, 90))
RECALL = "Recall (pixels, 60 samples)"


def write_run(folder, *records):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    return folder


def write_config(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))


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


def table_of(capfd, *folders):
    """The rows of the printed table, {title: text} each, and what stands on stderr."""
    call("plot", *folders, "--table", "csv")
    out, err = capfd.readouterr()
    return [*csv.DictReader(out.splitlines())], err


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


def test_a_further_number_of_training_has_a_panel_with_all_that_others_have(tmp_path):
    """A method's own values were in metrics.jsonl alone, and true was drawn as 1."""
    others = {"name": "text", "flag": True, "nothing": None, "list": [1.0]}
    run = write_run(tmp_path / "run", *(
        training(step, gap=gap, alignment=-0.5, fid=1.0, **others)
        for step, gap in ((1, 90.0), (2, 10), (3, 1e101), (4, 10.0))), evaluation(4))
    _, axes = figure_of([run], smooth=2)
    assert [*axes] == ["error", "gradient norm", "images/s", "fid", "alignment", "gap", ONE]
    faint, line = axes["gap"].lines
    assert faint.get_xydata().tolist()[:2] == [[1, 90], [2, 10]] and np.isnan(faint.get_ydata()[2])
    assert line.get_ydata()[1] == 50 and axes["gap"].get_yscale() == "log"
    assert axes["alignment"].get_yscale() == "linear"
    assert len(axes["fid"].lines) == 2 and len(axes[ONE].lines) == 1


def test_names_of_further_numbers_are_drawn_as_one_short_line(tmp_path, capfd):
    names = ["$x^{", "a\nb", "x" * 10**5, "\ud800", ""]
    run = write_run(tmp_path / "run", {"step": 1, **dict.fromkeys(names, 1.0)})
    _, axes = figure_of([run])
    assert [*axes] == ["", "$x^{", "a?b", "x" * 40, "?"]
    assert [*table_of(capfd, run)[0][0]] == ["run", "step", *(f"{title} last" for title in axes)]


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
            ("$x^{", "a\nb", ["list"], {"a": 1}, None, "x" * 10**5, "\ud800", 10**400)), *(
            (1.0, {"step": 6, "protocol": f"timm:{name}", "fd": 3.0}) for name in
            ("a\n$", "y" * 10**5)))]
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
    titles = [title for title in axes if title.startswith("FD of ")]
    assert "FD of a?$ (timm:a?$, ? samples)" in titles
    assert len(titles) == 2 and max(map(len, titles)) < 130


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


def test_a_table_shows_the_last_and_the_best_values(tmp_path, capfd):
    one = write_run(
        tmp_path / "one", *(training(step, velocity_error=value, gap=step / 3)
                            for step, value in ((10, 12.34567), (20, float("nan")), (30, 70.0))),
        evaluation(10), {**evaluation(30), "fid": 7.0, "recall": 0.25},
        {**evaluation(40), "fid": 6.0, "recall": 0.125})
    two = write_run(tmp_path / "two", training(50000, error=float("nan")))
    rows, _ = table_of(capfd, one, two)
    assert rows == [
        {"run": "one", "step": "40", "velocity_error last": "70", "velocity_error best": "12.35",
         "error last": "3.333", "error best": "3.333", "gap last": "10", f"{ONE} last": "6",
         f"{ONE} best": "5", f"{RECALL} last": "0.125", f"{RECALL} best": "0.25"},
        {**dict.fromkeys(rows[0], ""), "run": "two", "step": "50000", "error last": "nan",
         "error best": "nan"}]
    assert [*rows[0]][:4] == ["run", "step", "velocity_error last", "velocity_error best"]


def test_a_table_shows_the_options_that_differ(runs, capfd):
    same = {"model": "DiT-T/4", "weights": [1, 2], "cfg": None}
    write_config(runs[0], lr=1e-4, run_dir="a", num_workers=1, vae="a\nb", sizes={"ü": [1, 2]},
                 **same)
    write_config(runs[1], lr=0.00012345, run_dir="b", num_workers=2, vae="日本", sizes=None,
                 flip=True, **same)
    rows, err = table_of(capfd, *runs)
    shown = [{key: row[key] for key in [*row][1:[*row].index("step")]} for row in rows]
    assert shown == [{"lr": "0.0001", "vae": "a?b", "sizes": '{"ü":[1,2]}', "flip": ""},
                     {"lr": "0.00012345", "vae": "日本", "sizes": "", "flip": "true"}] and not err


@pytest.mark.parametrize("config", [None, "{", "[1, 2]", "[" * 10**5])
def test_a_run_without_readable_options_is_in_the_table_and_named(runs, tmp_path, capfd, config):
    for folder, lr in zip(runs, (1, 2)):
        write_config(folder, lr=lr, seed=0)
    bad = write_run(tmp_path / "bad", training(1))
    if config:
        (bad / "config.json").write_text(config)
    rows, err = table_of(capfd, *runs, bad)
    assert [row["lr"] for row in rows] == ["1", "2", ""] and "seed" not in rows[0]
    assert str(bad / "config.json") in err and err.count("\n") == 1


def test_a_table_is_markdown_whatever_the_names_are(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a|b", 0), ("a\\|b", 1)):
        write_config(write_run(tmp_path / name, {"step": 5, "gap|x": 0.5}), seed=seed)
    call("plot", "a|b", "a\\|b", "--table")
    assert capfd.readouterr().out.splitlines() == [
        r"| run | seed | step | gap\|x last |", "| --- | --- | --- | --- |",
        r"| a\|b | 0 | 5 | 0.5 |", r"| a\\\|b | 1 | 5 | 0.5 |"]
    assert not [*tmp_path.glob("*.png")]
    call("plot", "a|b")
    assert (tmp_path / "curves.png").exists()


def test_options_of_the_picture_are_refused_beside_a_table(runs, refusal, tmp_path):
    for option, value in (("--out", tmp_path / "curves.png"), ("--smooth", 1)):
        line = refusal("plot", [*runs, "--table", option, value], option)
        assert f"{option} must come without --table, got {value}; leave one out" in line


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
    for options in (["--out", tmp_path / "curves.png"], ["--table"]):
        refusal("plot", [*runs, tmp_path, *options], "RUN")
