"""Names of classes: what a person calls them -> their labels."""

import difflib

from engine.options import UserError


def find_classes(texts, config):
    """The labels, from 0, of the classes that these texts name, for --classes.

    A text is the name of a class folder, a label, or, of 1,000 classes, a name or WordNet number of
    ImageNet's (goldfish, n01443537). config: of a checkpoint. Raises UserError for others, with the
    names most like them.
    """
    names = label_names(config)
    return [_find(text, names, config["num_classes"]) for text in texts]


def label_names(config):
    """{name: label} of all names of a config's classes, lower case."""
    count, names = config["num_classes"], {}
    if count == 1000:
        from timm.data import ImageNetInfo  # takes seconds to import

        info = ImageNetInfo("imagenet-1k")
        for label in range(count):
            for name in (*info.index_to_description(label).split(","),
                         info.index_to_label_name(label)):
                names.setdefault(name.strip().lower(), label)
    folders = config.get("classes") or ()
    return names | {str(name).lower(): label for label, name in enumerate(folders)}


def _find(text, names, count):
    name = text.strip().lower().replace("_", " ")
    for known in (text.lower(), name):
        if known in names:
            return names[known]
    if text.isdecimal() and int(text) < count:
        return int(text)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    remedy = f"did you mean {' or '.join(near)}?" if near else "give a number or a name of a class"
    raise UserError(f"--classes must be class names or numbers from 0 to {count - 1}, got {text}; "
                    f"{remedy}")
