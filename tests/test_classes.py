"""Classes are found by what people call them."""

import pytest
from conftest import refused

from dataset.classes import find_classes
from engine.errors import UserError

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
    with refused("from 0 to 999, got xyzzy; give a number or a name of a class"):
        find_classes(["xyzzy"], IMAGENET)
    with refused("--classes must be", "blu tulp", "did you mean", "blue tulip"):
        find_classes(["blu tulp"], FLOWERS)
    with refused("got blu tulp; did you mean blue tulip? the classes are rose (0), Blue Tulip (1), "
                 "1 (2); quote names with spaces"):
        find_classes(["blu tulp"], FLOWERS)
    for text in ("3", "-1", "", "1000"):
        with refused("--classes must be", "from 0 to 2"):
            find_classes([text], FLOWERS)


@pytest.mark.parametrize("config, remedy", [
    ({"num_classes": 2, "classes": ["china temple", "flower"]},
     "the classes are china temple (0), flower (1); quote names with spaces"),
    ({"num_classes": 2, "classes": ["a", "b"]}, "the classes are a (0), b (1)"),
    ({"num_classes": 21, "classes": [f"c{i}" for i in range(21)]},
     "give a number or a name of a class"),
    ({"num_classes": 2}, "give a number or a name of a class")])
def test_few_classes_are_listed(config, remedy):
    """--classes china temple, without quotes, was told nothing of "china temple"."""
    with pytest.raises(UserError) as error:
        find_classes(["china", "temple"], config)
    assert str(error.value).endswith(f"got china; {remedy}")
