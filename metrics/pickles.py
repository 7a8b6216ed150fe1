"""Opens a pickle of NumPy arrays as data, such as EDM2's reference statistics: no code of the file
and no function that it names is run."""

import io
import math
import pickle
import pickletools
import re

import numpy as np

from engine.errors import BadValue

LIMIT = 2**30  # bytes of a file: EDM2's have 42 million
SIZED = {"PUT", "BINPUT", "LONG_BINPUT", "FRAME"}  # the unpickler would make a table so long
SETS = {"DICT", "EMPTY_SET", "FROZENSET", "ADDITEMS"}  # hash anything; DICT is of protocol 0
REPLACED = {"EMPTY_DICT": (1, b"cour\ndict\n)R"), "FRAME": (9, b"")}  # bytes, and those instead


class _Stub:
    """What stands in the unpickler for something of NumPy's, and takes its arguments."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a state where none belongs")


class _Dict(dict):
    """Stands in for each dict. Its keys are text: the hash of nested tuples takes a deep stack, or
    as many steps as 2 to the power of the file's length."""

    def __init__(self):  # takes no pairs
        super().__init__()

    def __setitem__(self, key, value):
        if not isinstance(key, str):
            raise pickle.UnpicklingError("a key that is no text")
        super().__setitem__(key, value)


class _Dtype(_Stub):
    """numpy.dtype(name, align, copy), then its state: version, byte order, ..."""

    order = "|"

    def __setstate__(self, state):
        self.order = state[1]

    def value(self):
        """The dtype, of numbers only. Raises UnpicklingError."""
        name = self.arguments[0]
        if (not re.fullmatch("[fiu][1248]", name) or self.order not in ("<", ">", "|", "=")):
            raise pickle.UnpicklingError(f"an array of {name!r:.40}")
        return np.dtype(name).newbyteorder(self.order)


class _Array(_Stub):
    """_reconstruct(ndarray, (0,), b"b"), then its state: version, shape, dtype, order, bytes."""

    def __setstate__(self, state):
        self.content = state[1:]

    def value(self):
        """The array. Raises UnpicklingError where it claims more or less than the file has."""
        shape, dtype, fortran, data = self.content
        dtype, data = dtype.value(), _bytes(data)
        if len(shape) > 64 or any(type(n) is not int or abs(n) >= 2**63 for n in shape):
            raise pickle.UnpicklingError("an array without a shape")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"an array of {shape!s:.40} with {len(data)} bytes")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


class _FromBuffer(_Array):
    """_frombuffer(bytes, dtype, shape, "C" or "F"), which protocol 5 has."""

    def __init__(self, data, dtype, shape, order):
        self.content = shape, dtype, order == "F", data


class _Scalar(_Array):
    """scalar(dtype, bytes)."""

    def __init__(self, dtype, data):
        self.content = (), dtype, False, data

    def value(self):
        """The plain number."""
        return super().value().item()


class _Encoded(_Stub):
    """_codecs.encode(text, "latin1"), the bytes of protocols 0 to 2."""


def _bytes(data):
    if isinstance(data, _Encoded):
        data = data.arguments[0]
    if not isinstance(data, str | bytes | bytearray):  # bytes(number) takes that much memory
        raise pickle.UnpicklingError("an array without bytes")
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


KNOWN = {("numpy", "ndarray"): None, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): _Encoded,
         ("our", "dict"): _Dict,
         **{(f"numpy.{core}.{name}", function): stub for core in ("core", "_core")
            for name, function, stub in (("multiarray", "_reconstruct", _Array),
                                         ("multiarray", "scalar", _Scalar),
                                         ("numeric", "_frombuffer", _FromBuffer))}}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        """Raises UnpicklingError for all that is not KNOWN."""
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return KNOWN[module, name]


def _with_our_dicts(data):
    """The pickle with a _Dict for each dict. Raises ValueError where it claims what it has not, or
    has a set."""
    parts, start = [], 0
    for code, value, place in pickletools.genops(data):  # which compares sizes with what there is
        if code.name in SIZED and value > len(data):
            raise ValueError(f"{code.name} {value}")
        if code.name in SETS:
            raise ValueError(f"{code.name}, which such a file does not need")
        if code.name in REPLACED:
            length, instead = REPLACED[code.name]
            parts += [memoryview(data)[start:place], instead]
            start = place + length
    return b"".join([*parts, memoryview(data)[start:]])


def read_pickle(path, *places):
    """Yields what a pickle file of nested dicts holds at these places, such as ("fid", "mu"): an
    array of numbers, or a plain value; None where there is nothing. Raises BadValue."""
    try:
        with open(path, "rb") as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise ValueError(f"more than {LIMIT} bytes")
        loaded = _Unpickler(io.BytesIO(_with_our_dicts(data)), encoding="latin1").load()
        for place in places:
            value = loaded
            for key in place:
                value = value.get(key) if isinstance(value, dict) else None
            yield value.value() if isinstance(value, _Array) else value
    except OSError as error:
        raise BadValue(f"must be a file that can be read, got {path} ({error.strerror}); name "
                       f"another") from error
    except Exception as error:  # the unpickler raises errors of many kinds
        raise BadValue(f"must be a whole pickle file of NumPy arrays and plain values, got {path} "
                       f"({type(error).__name__}: {error!s:.100}); get it again or name "
                       f"another") from error
