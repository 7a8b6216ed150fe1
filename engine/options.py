"""Command lines, and the errors that end a script with one line."""

import argparse
import math
from pathlib import Path


class OneLine(Exception):
    """What ends a run with one line, the message."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


class UserError(OneLine, ValueError):
    """A mistake of the user's: option, rule, value and remedy. The exit code is 2."""


class RunError(OneLine, RuntimeError):
    """What ends a run through no fault of its options. The exit code is 1."""


class LostError(RunError):
    """Another process or its machine is gone. Each rank prints what it saw of that."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, from rank 0, and whose help prints defaults."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        remedies = {"unrecognized": "--help lists the options", "expected": "give it",
                    "required": "give them", "not allowed with": "give one of them"}
        remedy = next((remedies[word] for word in remedies if word in message), None)
        raise UserError(f"{message}; {remedy}" if remedy else message)

    def validate(self, build, /, *args, **kwargs):
        """What build(...) returns; its ValueError, a rule broken by the options, is our error."""
        try:
            return build(*args, **kwargs)
        except ValueError as error:
            self.error(f"--{error}".replace("_", "-", 1) if _names_option(self, error) else error)


def _names_option(parser, error):
    """Whether the message opens with an option's name, as 'label_drop must be ...' does."""
    first = str(error).split(" ", 1)[0]
    return any(action.dest == first for action in parser._actions)


def int_range(low, high=2**63 - 1):
    """An argparse type: a whole number from low to high."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            bound = f"{low} or more" if high == 2**63 - 1 else f"one from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"must be a whole number, got {text!r}; give {bound}")
        return value
    return parse


def float_range(low, high=math.inf, *, above=False):
    """An argparse type: a finite number from low (or above it) to high."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or value > high or math.isinf(value):
            bound = f"above {low:g}" if above else f"{low:g} or more"
            bound = bound if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}; give one {bound}")
        return value
    return parse


def utf8_path(text):
    """An argparse type: a path for PyTorch and TensorBoard, which take names in UTF-8 alone."""
    if text.encode(errors="replace").decode() != text:
        raise argparse.ArgumentTypeError(f"must be a name in UTF-8, got {text!r}; choose another")
    return Path(text)
