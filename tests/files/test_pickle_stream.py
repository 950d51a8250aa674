"""Serialised objects read as data."""

import collections
import os
import pickle
import random

import pytest

from mugv_ds.files.pickle_stream import Described, Name, read_pickle

VALUES = {
    "text": ["a", "ä" * 300, ""],
    "numbers": [0, 255, 70_000, -1, 2**31, 2**80, 0.5, True, False, None],
    "bytes": (b"", b"x" * 300),
    "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "set": {1, 2},
    3: {},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_out_as_they_are(protocol):
    shared = [1]
    if protocol == 2:  # which has sets and bytes as calls
        values = {key: value for key, value in VALUES.items() if key not in ("set", "bytes")}
    elif protocol == 3:
        values = {key: value for key, value in VALUES.items() if key != "set"}
    else:
        values = VALUES
    read = read_pickle(pickle.dumps({"values": values, "one": shared, "same": shared}, protocol=protocol)).value
    assert read == {"values": values, "one": shared, "same": shared}
    assert read["one"] is read["same"]


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_are_described_and_never_made(protocol, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'sentinel'}",), {"a": 1}

    read = read_pickle(pickle.dumps([Payload(), len, collections.Counter("a")], protocol=protocol)).value
    assert isinstance(read[0], Described) and read[0].callee == "posix.system" and read[0].state == {"a": 1}
    assert isinstance(read[1], Name) and read[1].endswith(".len")
    assert isinstance(read[2], Described) and read[2].callee == "collections.Counter"
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize(
    "data", [b"", b"garbage", b"\x80\x04.", b"\x80\x04P1\n.", b"\x80\x04h\x07.", b"\x80\x04K\x01b."]
)
def test_broken_streams_are_refused(data):
    with pytest.raises(ValueError):
        read_pickle(data)


def test_a_damaged_stream_is_read_or_refused_and_nothing_else():
    data = pickle.dumps({**VALUES, "more": [collections.Counter("a"), complex(1, 2)]})
    draw = random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            read_pickle(bytes(damaged[: draw.randint(1, len(damaged))]))
        except ValueError:
            refused += 1
    assert refused > 1000
