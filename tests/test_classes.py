"""Classes are found by what people call them."""

import pytest
from conftest import refused

from dataset.classes import class_names, find_classes, imagenet_names

IMAGENET = {"num_classes": 1000}
NUMBERS = [*imagenet_names()]
FLOWERS = {"num_classes": 3, "classes": ["rose", "Blue Tulip", "1"]}


@pytest.mark.parametrize("text, label", [
    ("207", 207), ("goldfish", 1), ("Carassius_auratus", 1), ("n01443537", 1), ("goldfinch", 11),
    ("great white shark", 2), ("0", 0), ("999", 999)])
def test_imagenets_classes_have_names_and_numbers(text, label):
    assert find_classes([text], IMAGENET) == [label]


def test_folder_names_come_before_numbers():
    assert find_classes(["1", "0", "ROSE", "blue_tulip", "rose"], FLOWERS) == [2, 0, 1]


@pytest.mark.parametrize("text, label", [
    ("harp", 594), ("gong", 577), ("tub", 876), ("partridge", 86), ("crayfish", 124),
    ("missile", 657), ("polecat", 358), ("Cardigan", 264), ("cardigan", 474)])
def test_a_first_name_wins_over_another_classs_synonym(text, label):
    """harp was harmonica, gong chime: the lower label of the two."""
    assert find_classes([text], IMAGENET) == [label]


@pytest.mark.parametrize("text, words", [
    ("panda", ["387 (n02509815)", "388 (n02510455)"]), ("maillot", ["638 (", "639 ("]),
    ("crane", ["134 (n02012849)", "517 (n03126707)"]), ("CARDIGAN", ["264 (", "474 ("])])
def test_a_name_of_two_classes_is_refused_with_both(text, words):
    with refused("--classes must each name one class, got", text, *words):
        find_classes([text], IMAGENET)


@pytest.mark.parametrize("folders", [
    [f"person_{i:04d}" for i in range(1000)], sorted(map(str, range(1000))),
    [f"n{i:08d}" for i in range(1000)], [*NUMBERS[1:], "n00000000"]])
def test_a_thousand_other_classes_are_not_imagenets(folders):
    config = {"num_classes": 1000, "classes": folders}
    assert class_names(config, [2, 999]) == [folders[2], folders[999]]
    assert find_classes([folders[2]], config) == [2]
    with refused("--classes must be class names"):
        find_classes(["goldfish"], config)


def test_imagenets_folders_have_its_names_in_any_order():
    for folders in (NUMBERS, NUMBERS[::-1]):
        config = {"num_classes": 1000, "classes": folders}
        label = folders.index("n01443537")
        assert find_classes(["goldfish"], config) == [label]
        assert class_names(config, [label]) == ["goldfish"]


E_1, E_2 = "caf\u00e9", "cafe\u0301"  # one name to a person


@pytest.mark.parametrize("folders, text, label", [
    ("ABab", "a", 2), ("ABab", "A", 0), (["A b", "c"], "a_B", 0), ([E_1, "b"], E_2, 0),
    ([E_2, "b"], E_1, 0), ([E_2, "b"], E_1.upper(), 0), ([E_1, E_2], E_2, 1),
    (["1", "0"], "1", 0), (["a", "b"], "1", 1)])
def test_the_exact_spelling_comes_first_then_one_that_is_alike(folders, text, label):
    """Of A and a the last won, and a decomposed letter was none."""
    config = {"num_classes": len(folders), "classes": [*folders]}
    assert find_classes([text], config) == [label]


@pytest.mark.parametrize("text", ["A_B", "a  b"])
def test_a_spelling_that_two_classes_are_alike_to_is_refused(text):
    with refused("--classes", text, "0 (A b) and 1 (a B)"):
        find_classes([text], {"num_classes": 2, "classes": ["A b", "a B"]})


@pytest.mark.parametrize("text, config, words", [
    ("goldfich", IMAGENET, ["from 0 to 999, got goldfich; did you mean", "goldfinch"]),
    ("blu tulp", FLOWERS, ["did you mean blue tulip", "quote names with spaces"]),
    *((text, FLOWERS, ["from 0 to 2"])
      for text in ("3", "-1", "", "00", "\u00b2", "\u0661", "9" * 5000))])
def test_unknown_names_suggest_the_nearest(text, config, words):
    with refused("--classes must be", *words):
        find_classes([text], config)


def test_pictures_show_the_best_known_names():
    assert class_names(FLOWERS, [2, 0]) == ["1", "rose"]
    assert class_names({"num_classes": 3}, [2, 0]) == ["2", "0"]
    assert class_names(IMAGENET, [1, 207]) == ["goldfish", "golden retriever"]
