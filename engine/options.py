"""Command lines."""

import argparse
import contextlib
import math

from engine.errors import UserError


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Prints each default, unless it is None or stands in the help already."""

    def _get_help_string(self, action):
        if action.default is None or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors and whose help prints defaults."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Defaults)

    def error(self, message):
        """Raises UserError, of argparse's own messages with a remedy."""
        raise UserError(message if "; " in message else f"{message}; --help lists the options")


def int_range(low, high=2**63 - 1):
    """An argparse type: a whole number from low to high."""
    remedy = f"{low} or more" if high == 2**63 - 1 else f"one from {low} to {high}"
    return _number(int, lambda value: low <= value <= high, "a whole number", remedy)


def float_range(low, high=math.inf, *, above=False):
    """An argparse type: a finite number from low to high; above: low itself is refused."""
    remedy = f"above {low:g}" if above else f"{low:g} or more" if low > -math.inf else "finite"
    remedy = remedy if high == math.inf else f"from {low:g} to {high:g}"
    return _number(float, lambda value: (low < value if above else low <= value) and value <= high
                   and math.isfinite(value), "a number", f"one {remedy}")


def _number(kind, accepts, rule, remedy):
    def parse(text):
        with contextlib.suppress(ValueError):
            if accepts(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}; give {remedy}")
    return parse
