"""Classes are found by what people call them."""

import pytest
from conftest import refused

from dataset.classes import find_classes

IMAGENET = {"num_classes": 1000}
FLOWERS = {"num_classes": 3, "classes": ["rose", "Blue Tulip", "1"]}


@pytest.mark.parametrize("text, label", [
    ("207", 207), ("goldfish", 1), ("Carassius_auratus", 1), ("n01443537", 1), ("goldfinch", 11),
    ("great white shark", 2), ("0", 0), ("999", 999)])
def test_imagenets_classes_have_names_and_numbers(text, label):
    assert find_classes([text], IMAGENET) == [label]


def test_folder_names_come_before_numbers():
    assert find_classes(["1", "0", "ROSE", "blue_tulip", "rose"], FLOWERS) == [2, 0, 0, 1, 0]


def test_unknown_names_suggest_the_nearest():
    with refused("--classes must be", "goldfich", "did you mean", "goldfinch"):
        find_classes(["goldfich"], IMAGENET)
    with refused("--classes must be", "blu tulp", "did you mean", "blue tulip"):
        find_classes(["blu tulp"], FLOWERS)
    for text in ("3", "-1", "", "1000"):
        with refused("--classes must be", "from 0 to 2"):
            find_classes([text], FLOWERS)
