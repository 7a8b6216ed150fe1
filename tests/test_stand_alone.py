"""Files that stand alone: what they take along, and under which names."""

import sys
from pathlib import Path

import pytest

from weights.stand_alone import ROOT, stand_alone

LOWER = """
import math
from functools import partial

# Half of it,
# and a quarter
HALF, QUARTER = 0.5, 0.25
UNUSED = 3


def scale(x):
    return HALF * x


def area(radius):
    return math.pi * radius ** 2
"""
UPPER = """
import lower
from lower import QUARTER as FOURTH, scale

HALF = 1 / 2


class Base:
    part = FOURTH


class Sum(Base):
    def value(self, x):
        return scale(x) + lower.area(1) + HALF + self.part + lower.QUARTER + len(text(x))


def text(x):
    return f"{scale(x)}"


def faulty(x):
    return missing(x)


def late(x):
    from lower import area
    return area(x)
"""


@pytest.fixture
def upper(tmp_path):
    (tmp_path / "lower.py").write_text(LOWER)
    (tmp_path / "upper.py").write_text(UPPER)
    return tmp_path / "upper.py"


def test_a_definition_takes_along_all_that_it_uses_once(upper, monkeypatch):
    source, known = stand_alone(upper, "Sum"), {}
    assert "from lower" not in source and "UNUSED" not in source and "partial" not in source
    assert source.count("HALF, QUARTER =") == source.count("QUARTER = 0.5") == 1
    assert "# Half of it,\n# and a quarter\nHALF" in source
    exec(source, known)
    monkeypatch.syspath_prepend(upper.parent)
    expected = __import__("upper").Sum().value(3)
    for name in ("upper", "lower"):
        monkeypatch.delitem(sys.modules, name)
    assert known["Sum"]().value(3) == expected


@pytest.mark.parametrize(("name", "message"), [
    ("faulty", "upper.py has no missing"), ("nothing", "upper.py has no nothing"),
    ("late", "upper.py imports a file of its own within a function")])
def test_what_cannot_stand_alone_is_named(upper, name, message):
    with pytest.raises(ValueError, match=message):
        stand_alone(upper, name)


@pytest.mark.parametrize(("file", "name"), [
    ("models.py", "DiT"), ("models.py", "ImprovedDiT"), ("weights/pipeline.py", "SoFlowPipeline"),
    ("weights/pipeline.py", "MeanFlowPipeline"),
    ("weights/pipeline.py", "ImprovedMeanFlowPipeline")])
def test_our_own_code_needs_nothing_but_diffusers_and_torch(file, name):
    """And what these bring along."""
    lines = stand_alone(Path(ROOT, file), name).splitlines()
    packages = {line.split()[1].split(".")[0] for line in lines
                if line.startswith(("import ", "from "))}
    assert packages - sys.stdlib_module_names <= {"torch", "diffusers", "numpy", "PIL"}
