"""Pickles are opened as data: what they name is not run, what they claim is not allocated."""

import os
import pickle
import resource
import struct

import numpy as np
import pytest
from conftest import refused

from metrics.pickles import read_pickle

SIGMA = np.arange(9.0).reshape(3, 3)
FILE = {"num_images": 7, "fid": {
    "mu": np.arange(3, dtype=">f4"), "sigma": np.asfortranarray(SIGMA), "n": np.float64(2.5)}}
PLACES = [("fid", "mu"), ("fid", "sigma"), ("fid", "n"), ("num_images",), ("fid", "x"), ("a", "b")]


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_of_every_protocol_and_numpy_are_read(protocol, core, tmp_path):
    """NumPy 1 wrote its modules as numpy.core, 2 writes numpy._core."""
    data = pickle.dumps(FILE, protocol)
    ours = b"numpy._core." if np.__version__ >= "2" else b"numpy.core."
    other = f"numpy.{core}.".encode()
    assert ours in data
    if other != ours:  # the names of protocol 2 and 3 end in a newline, later ones have a length
        for module in (b"multiarray", b"numeric"):
            old, new = ours + module, other + module
            data = data.replace(bytes([0x8c, len(old)]) + old, bytes([0x8c, len(new)]) + new)
            data = data.replace(b"c" + old + b"\n", b"c" + new + b"\n")
        data = b"".join(_without_frames(data))
        assert ours not in data
    (tmp_path / "a.pkl").write_bytes(data)
    mu, sigma, number, count, *nothing = read_pickle(tmp_path / "a.pkl", *PLACES)
    assert mu.dtype == ">f4" and np.array_equal(mu, [0, 1, 2])
    assert sigma.flags.f_contiguous and np.array_equal(sigma, SIGMA)
    assert float(number) == 2.5 and count == 7 and nothing == [None, None]


def _without_frames(data):
    """The pickle, whose length was changed, without the frames of protocol 4."""
    at = data.find(b"\x95", 0, 3)
    yield data if at < 0 else data[:at] + data[at + 9:]


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, np.load, np.zeros])
def test_code_that_a_file_names_is_not_run(function, protocol, tmp_path):
    mark = tmp_path / "mark"
    argument = {os.system: f"touch {mark}", eval: f"open({str(mark)!r}, 'w')"}.get(function, "9")
    call = Call(function, argument)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fid": {"mu": call}}, protocol))
    module = {os.system: "posix", eval: "builtin", np.load: "numpy", np.zeros: "numpy"}[function]
    with refused(*([module, f".{function.__name__}, which is not run"] if protocol else ["DICT"])):
        [*read_pickle(tmp_path / "a.pkl", ("fid", "mu"))]
    assert not mark.exists()


DTYPE = (b"cnumpy\ndtype\n(X\2\0\0\0f8K\0K\1tR(K\3X\1\0\0\0<NNN"
         b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb")
START = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\1btR"
HOSTILE = {  # what is in the file, and the word for it
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "only 2 remain"),
    "bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", "only 2 remain"),
    "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "only 2 remain"),
    "frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"K\1.", "FRAME 1099511627776"),
    "memo": (b"\x80\x02K\1r\0\0\0\2.", "LONG_BINPUT 33554432"),
    "shape": (b"\x80\x03" + START + b"(K\1(J\xff\xff\xff\x7ft" + DTYPE + b"I00\nC\1xtb.",
              "(2147483647,) with 1 bytes"),
    "negative": (b"\x80\x03" + START + b"(K\1(J\xff\xff\xff\xffJ\xf8\xff\xff\xfft" + DTYPE
                 + b"I00\nC\x40" + bytes(64) + b"tb.", "(-1, -8)"),
    "objects": (b"\x80\x03" + START + b"(K\1(K\1t" + DTYPE.replace(b"f8", b"O8")
                + b"I00\nC\x08" + bytes(8) + b"tb.", "an array of 'O8'"),
    "state of a class": (b"\x80\x03cnumpy\ndtype\n}X\1\0\0\0aK\1sb.", "missing"),
    "state of a call": (b"\x80\x03c_codecs\nencode\n(tR}b.", "where none belongs"),
    "no state": (b"\x80\x03" + START + b".", "content"),
    "a number for bytes": (b"\x80\x03" + START + b"(K\1(K\1t" + DTYPE
                           + b"I00\nJ\0\0\0\x7ftb.", "without bytes"),
    "tuples as a shape": (b"\x80\x03" + START + b"(K\1(" + (b")" + b"2\x86" * 99) * 2 + b"t"
                          + DTYPE + b"I00\nC\1xtb.", "without a shape"),
    "deep key": (b"\x80\x02})" + b"\x85" * 300000 + b"K\1s.", "a key that is no text"),
    "wide key": (b"\x80\x02})" + b"2\x86" * 99 + b"K\1s.", "a key that is no text"),
    "wide key of pairs": (b"\x80\x02cour\ndict\n)" + b"2\x86" * 99 + b"K\1\x86\x85\x85R.",
                          "TypeError"),
    **{name: (b"\x80\x04" + start + b")" + b"2\x86" * 99 + end, name) for name, start, end in (
        ("DICT", b"(", b"K\1d."), ("FROZENSET", b"(", b"\x91."),
        ("EMPTY_SET", b"\x8f(", b"\x90."))}}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_file_claims_is_not_allocated(name, tmp_path):
    """Some of these end the process where memory is not bounded."""
    data, word = HOSTILE[name]
    (tmp_path / "a.pkl").write_bytes(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused("must be a whole pickle file", "a.pkl", word, "name another"):
        [*read_pickle(tmp_path / "a.pkl", ())]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 2**18  # KiB


def test_a_torn_file_is_refused_at_every_length(tmp_path):
    data = pickle.dumps(FILE, 4)
    for length in range(len(data)):
        (tmp_path / "a.pkl").write_bytes(data[:length])
        with refused("must be a whole pickle file"):
            [*read_pickle(tmp_path / "a.pkl", *PLACES)]
