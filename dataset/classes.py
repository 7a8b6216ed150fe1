"""Names of classes: what a person calls them -> their labels."""

import difflib

from engine.errors import UserError


def find_classes(texts, config):
    """The labels, from 0, of the classes that these texts name, for --classes.

    A text is the name of a class folder, a label, or, of 1,000 classes, a name or WordNet number of
    ImageNet's (goldfish, n01443537). config: of a checkpoint. Raises UserError for others, with the
    names most like them.
    """
    names = label_names(config)
    return [_find(text, names, config["num_classes"]) for text in texts]


def _find(text, names, count):
    name = text.strip().lower().replace("_", " ")
    for known in (text.lower(), name):
        if known in names:
            return names[known]
    if text.isdecimal() and int(text) < count:
        return int(text)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"--classes must be class names or numbers from 0 to {count - 1}, got {text}; "
                    f"{hint}quote names with spaces")


def class_names(config, labels):
    """What to call the classes of these labels in a picture."""
    if config["num_classes"] == 1000:
        names = imagenet_names()
        return [names[label][0] for label in labels]
    folders = config.get("classes") or range(config["num_classes"])
    return [str(folders[label]) for label in labels]


def label_names(config):
    """{name: label} of all names of a config's classes, lower case."""
    names = {}
    if config["num_classes"] == 1000:
        for label, known in enumerate(imagenet_names()):
            for name in known:
                names.setdefault(name.lower(), label)
    folders = config.get("classes") or ()
    return names | {str(name).lower(): label for label, name in enumerate(folders)}


def imagenet_names():
    """Of each of ImageNet's 1,000 classes its names, the best known first, and WordNet number."""
    from timm.data import ImageNetInfo  # takes seconds to import

    info = ImageNetInfo("imagenet-1k")
    return [[*(name.strip() for name in info.index_to_description(label).split(",")),
             info.index_to_label_name(label)] for label in range(1000)]
