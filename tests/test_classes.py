"""Classes are found by what people call them."""

import pytest
from conftest import refused

from dataset.classes import class_names, find_classes

IMAGENET = {"num_classes": 1000}
FLOWERS = {"num_classes": 3, "classes": ["rose", "Blue Tulip", "1"]}


@pytest.mark.parametrize("text, label", [
    ("207", 207), ("goldfish", 1), ("Carassius_auratus", 1), ("n01443537", 1), ("goldfinch", 11),
    ("great white shark", 2), ("0", 0), ("999", 999)])
def test_imagenets_classes_have_names_and_numbers(text, label):
    assert find_classes([text], IMAGENET) == [label]


def test_folder_names_come_before_numbers():
    assert find_classes(["1", "0", "ROSE", "blue_tulip", "rose"], FLOWERS) == [2, 0, 0, 1, 0]


@pytest.mark.parametrize("text, config, words", [
    ("goldfich", IMAGENET, ["from 0 to 999, got goldfich; did you mean", "goldfinch"]),
    ("blu tulp", FLOWERS, ["did you mean blue tulip", "quote names with spaces"]),
    *((text, FLOWERS, ["from 0 to 2"]) for text in ("3", "-1", ""))])
def test_unknown_names_suggest_the_nearest(text, config, words):
    with refused("--classes must be", *words):
        find_classes([text], config)


def test_pictures_show_the_best_known_names():
    assert class_names(FLOWERS, [2, 0]) == ["1", "rose"]
    assert class_names({"num_classes": 3}, [2, 0]) == ["2", "0"]
    assert class_names(IMAGENET, [1, 207]) == ["goldfish", "golden retriever"]
