"""Names of classes: what a person calls them -> their labels."""

import difflib
import unicodedata

from engine.errors import UserError


def find_classes(texts, config):
    """The labels, from 0, of the classes that these texts name, for --classes, each once, as
    find_label finds them. config: of a checkpoint. Raises UserError."""
    names = names_of_classes(config)
    try:
        return list(dict.fromkeys(find_label(text, names) for text in texts))
    except ValueError as error:
        raise UserError(f"--classes {error}") from error


def find_label(text, names):
    """The label, from 0, of the class that a text names, or of which it is the number.

    names: of each class a list, the best first: of a folder, or, of ImageNet's 1,000 classes, all
    names and the WordNet number (goldfish, n01443537). The text is compared first as it is, then in
    one Unicode form, then without regard to case and underscores; a class's first name comes before
    other names. Raises ValueError, "must ...", for a text that names no class, with the names most
    like it, or several.
    """
    first = [(known[0], label) for label, known in enumerate(names)]
    others = [(name, label) for label, known in enumerate(names) for name in known[1:]]
    for form in (str, _composed, _folded):
        for level in (first, others):
            labels = sorted({label for name, label in level if form(name) == form(text)})
            if len(labels) > 1:
                which = " and ".join(f"{label} ({names[label][-1]})" for label in labels)
                raise ValueError(f"must each name one class, got {text}, which is {which}; give a "
                                 f"number")
            if labels:
                return labels[0]
    numbers = {str(label): label for label in range(len(names))}
    if text in numbers:
        return numbers[text]
    known = {_folded(name) for name, _ in first + others}
    near = difflib.get_close_matches(_folded(text[:99]), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"must be class names or numbers from 0 to {len(names) - 1}, got "
                     f"{text:.99}; {hint}quote names with spaces")


def _composed(name):
    return unicodedata.normalize("NFC", name)


def _folded(name):
    return _composed(" ".join(_composed(name).casefold().replace("_", " ").split()))


def class_names(config, labels):
    """What to call the classes of these labels in a picture."""
    names = names_of_classes(config)
    return [names[label][0] for label in labels]


def names_of_classes(config):
    """Of each class its names, the best first: folders, ImageNet's with WordNet number, or none
    but its label. ImageNet's 1,000 classes are those without names in the config, or with folders
    of all its WordNet numbers."""
    folders, count = config.get("classes"), config["num_classes"]
    if count == 1000:
        imagenet = imagenet_names()
        if not folders:
            return list(imagenet.values())
        if imagenet.keys() == set(folders):
            return [imagenet[folder] for folder in folders]
    return [[str(name)] for name in folders or range(count)]


def imagenet_names():
    """{WordNet number: names, the best known first, and that number}, in the official order."""
    from timm.data import ImageNetInfo  # takes seconds to import

    info = ImageNetInfo("imagenet-1k")
    return {number: [*(name.strip() for name in info.label_name_to_description(number).split(",")),
                     number] for number in info.label_names()}
