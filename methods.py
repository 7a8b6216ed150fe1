"""The table of training methods, and the methods of networks and configs."""

from improved_meanflow import ImprovedMeanFlow
from meanflow import MeanFlow
from soflow import SoFlow

# A network is trained by the first method that it fits, unless train.py --method names another
METHODS = {
    "meanflow": MeanFlow,  # arXiv 2505.13447
    "improved-meanflow": ImprovedMeanFlow,  # arXiv 2512.02012
    "soflow": SoFlow,  # arXiv 2512.15657
}


def default_method(network):
    """The name of the first method that a network fits, a module, its class, or None for one that
    is not known before it is made; None if there is none."""
    return next((name for name, method in METHODS.items()
                 if network is None or method.fits(network)), None)


def make_method(config, num_classes=None):
    """The method of a config, a dict with method and its settings, of which absent ones have their
    defaults, and num_classes. Raises SettingError for a setting out of its range, and KeyError."""
    method = METHODS[config["method"]]
    stored = {name: config.get(name) for name in method.settings()}
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in stored.items() if value is not None}
    return method(num_classes=config["num_classes"] if num_classes is None else num_classes,
                  **given)


def method_of(config, network):
    """The method of a network that was trained with this config. Raises ValueError or TypeError
    for an unknown one, and for one that does not fit the network or its own settings."""
    name = config.get("method") or default_method(network)
    if name not in METHODS:
        raise ValueError(f"its method {name!s:.60} is not in METHODS of methods.py")
    if network is not None and not METHODS[name].fits(network):
        raise ValueError(f"its method {name} does not fit {type(network).__name__}")
    return make_method(config | {"method": name})


def settings_by_name():
    """{setting: {method's name: Setting}} of all methods."""
    found = {}
    for name, method in METHODS.items():
        for option, known in method.settings().items():
            found.setdefault(option, {})[name] = known
    return found
