"""Command lines: numbers in their range, errors that are one line."""

import argparse

import pytest

from engine.errors import UserError
from engine.options import Parser, float_range, int_range


@pytest.mark.parametrize(("kind", "text"), [
    (int_range(1), "0"), (int_range(1), "1.5"), (int_range(1), "x"), (int_range(0), "-1"),
    (int_range(0), "9" * 30), (int_range(0, 7), "8"), (float_range(0, 1), "nan"),
    (float_range(0, 1), "1.1"), (float_range(0), "inf"), (float_range(0, above=True), "0")])
def test_numbers_out_of_range_are_refused_with_a_remedy(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"got '{text}'; give"):
        kind(text)
    assert int_range(1)("1") == float_range(0, 1)("1") == 1
    assert float_range(0, above=True)("1e-9") == 1e-9


@pytest.fixture
def parser():
    parser = Parser("A script.")
    parser.add_argument("--label-drop", type=float_range(0), required=True, help="a probability")
    return parser


@pytest.mark.parametrize("words", [
    [], ["--label-drop"], ["--label-drop", "x"], ["--label-drop", "1", "--other"],
    ["--label", "1"]])  # no abbreviations: the next option would change their meaning
def test_every_error_of_a_command_line_is_one_line_with_a_remedy(parser, words):
    with pytest.raises(UserError) as error:
        parser.parse_args(words)
    assert "; " in str(error.value) and "\n" not in str(error.value)


def test_help_tells_each_default_once(parser):
    parser.add_argument("--count", type=int_range(1), default=3, help="how many")
    parser.add_argument("--folder", help="where (default: here)")
    parser.add_argument("--steps", type=int_range(1), help="how long")
    help = parser.format_help()
    assert "how many (default: 3)" in help and "where (default: here)\n" in help
    assert "how long\n" in help and "None" not in help
    args = parser.parse_args(["--label-drop", "1"])
    assert (args.label_drop, args.count, args.folder, args.steps) == (1.0, 3, None, None)
