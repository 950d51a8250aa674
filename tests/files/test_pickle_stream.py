"""Serialised objects read as data."""

import collections
import io
import os
import pickle
import random

import pytest

from mugv_ds.files.pickle_stream import MAX_BYTES, Described, Name, Persistent, read_pickle

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


class Wrapped:
    """Pickles as something that torch.save keeps outside of the stream."""


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", 3) if isinstance(value, Wrapped) else None


def test_what_is_kept_outside_and_what_is_put_into_an_object(tmp_path):
    stream = io.BytesIO()
    ordered = collections.OrderedDict(a=1, b=[2])
    Pickler(stream, protocol=2).dump([Wrapped(), ordered, collections.deque([1, 2])])
    (kept, described, queue), names = read_pickle(stream.getvalue())
    assert isinstance(kept, Persistent) and kept.key == ("storage", 3)
    assert described.items == {"a": 1, "b": [2]} and queue.elements == [1, 2]
    assert names == {"collections.OrderedDict", "collections.deque"}


# Opcodes: } ] ) N are {}, [], (), None; \x85 \x86 tuples of one and two; q and h put into and get from the memo.
HOSTILE = {
    "a key that refers to itself twice": (b"})q\0" + b"h\0\x86q\0" * 60 + b"Ns.", "a key that is neither"),
    "a key nested deep": (b"})" + b"\x85" * 200 + b"Ns.", "a key that is neither"),
    "a list as key": (b"}]Ns.", "a key that is neither"),
    "a tuple of tuples in a set": (b"\x8f()\x85\x85\x90.", "a key that is neither"),
    "a long tuple as key": (b"}(" + b"N" * 17 + b"tNs.", "a key that is neither"),
    "a tuple nested deep": (b")" + b"\x85" * 100 + b".", "nested more than 100 deep"),
    "marks nested deep": (b"(" * 101 + b".", "nested more than 100 deep"),
    "a value that refers to itself twice": (b")q\0" + b"h\0\x86q\0" * 60 + b".", "more than 10,000,000 objects"),
    "a list in itself": (b"]q\0h\0a.", "nested more than 100 deep"),
    "a list put into after it was referred to": (b"]q\0]q\1h\0ah\0h\1a\x86.", "nested more than 100 deep"),
    "many sets": (b"](" + b"\x8f" * 10_001 + b"e.", "more than 10,000 sets"),
    "too large": (bytes(MAX_BYTES + 1), "at most"),
}


@pytest.mark.parametrize(("data", "complaint"), HOSTILE.values(), ids=HOSTILE)
def test_what_stands_for_too_much_is_refused(data, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_pickle(b"\x80\x04" + data)


def test_the_deepest_and_what_is_shared_is_read():
    assert read_pickle(b"\x80\x04)" + b"\x85" * 98 + b".").names == frozenset()
    shared = [(1, "a")] * 10_000
    assert read_pickle(pickle.dumps([shared] * 100)).value[99] == shared
    keys = {1: 0, 2.5: 0, "a": 0, b"b": 0, None: 0, (1, "a", None): 0}
    assert read_pickle(pickle.dumps(keys)).value == keys
