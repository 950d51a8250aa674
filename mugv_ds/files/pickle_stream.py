"""Reads a pickle stream as plain data. Nothing it names is looked up, imported or called.

torch.save and torch.distributed.checkpoint describe their files in such a stream, and Megatron puts classes of its own
into it. Here an object is only what was written of it: the name of its class, its arguments and its state.

A small stream can stand for a structure without end: objects are written once and referred to many times. So what is
read is bounded, and once it is whole its depth and its size written out are too; before that, nothing walks into it.
"""

import io
import pickletools  # reads the arguments of opcodes, never executes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

MAX_BYTES = 1 << 26
MAX_OPCODES = 3_000_000  # .metadata takes 72 for each chunk; 3 M are read in about 3 s and 0.4 GB
MAX_DEPTH = 100
MAX_OBJECTS = 10_000_000  # with those that are referred to counted every time
_MAX_SETS = 10_000  # an empty one takes 216 bytes, three times what any other opcode of one byte does
_MAX_NUMBER_KEYS = 10_000  # their hashes can be chosen to be equal; then n of them take n²/2 comparisons
_MAX_KEY_LENGTH = 16  # of a tuple, which is hashed again each time


class Name(str):
    """The name of a class, function or constant, as "module.name"."""


@dataclass(eq=False, slots=True)
class Persistent:
    """Something kept outside of the stream, by the key it is kept under; in torch.save's files a tensor's storage."""

    key: Any


@dataclass(eq=False, slots=True)
class Described:
    """An object that was not made: what would have been called, with which arguments, and what was put in after it.

    Two are equal only if they are the same object, which costs nothing to find out; so they may be keys.

    Attributes:
        callee, arguments: of the call; where it has keywords too, `arguments` is (arguments, keywords).
        state: None if none was given.
        items, elements: what was put in as into a dict and as into a list or set; None if nothing was.
    """

    callee: Any
    arguments: Any
    state: Any = None
    items: dict[Any, Any] | None = None
    elements: list[Any] | None = None


class Content(NamedTuple):
    """A stream's object, and every `Name` in the stream."""

    value: Any
    names: frozenset[Name]


def read_pickle(data: bytes) -> Content:
    """The object in a stream of protocol 2 to 5: values, containers, `Name`s, `Persistent` and `Described` objects.

    Keys of dicts and members of sets are numbers, strings, flat tuples of these, or objects compared by identity.

    Raises:
        ValueError: the stream is broken, uses what plain data does not need, or exceeds a bound above.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"a pickle of {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    try:
        return _run(io.BytesIO(data))
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"not a stream of objects: {type(error).__name__}") from None


def _run(stream: io.BytesIO) -> Content:
    machine = _Machine()
    for _ in range(MAX_OPCODES):
        code = stream.read(1)
        if code == b".":
            value = machine.stack.pop()
            _refuse_endless(value, machine.shared)
            return Content(value, frozenset(machine.names))
        if code not in _OPCODES:
            known = pickletools.code2op.get(code.decode("latin-1"))
            raise ValueError(f"holds {known.name}, which plain data does not need" if known else "ends too early")
        read_argument, act = _OPCODES[code]
        act(machine, read_argument(stream) if read_argument else None)
    raise ValueError(f"more than {MAX_OPCODES:,} opcodes")


class _Machine:
    """The stack and the memo that opcodes work on. Each method is one or several opcodes, given their argument."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}
        self.names: set[Name] = set()
        self.shared: set[int] = set()  # ids of the containers that were taken out of the memo
        self.number_keys = 0
        self.sets = 0

    def ignore(self, _: Any) -> None:
        pass

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_none(self, _: None) -> None:
        self.stack.append(None)

    def push_true(self, _: None) -> None:
        self.stack.append(True)

    def push_false(self, _: None) -> None:
        self.stack.append(False)

    def empty_dict(self, _: None) -> None:
        self.stack.append({})

    def empty_list(self, _: None) -> None:
        self.stack.append([])

    def empty_tuple(self, _: None) -> None:
        self.stack.append(())

    def empty_set(self, _: None) -> None:
        self.sets += 1
        if self.sets > _MAX_SETS:
            raise ValueError(f"more than {_MAX_SETS:,} sets")
        self.stack.append(set())

    def mark(self, _: None) -> None:
        if len(self.marked) >= MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        self.marked.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def tuple_to_mark(self, _: None) -> None:
        items = self.to_mark()
        self.stack.append(tuple(items))

    def append(self, _: None) -> None:
        self.extend_with([self.stack.pop()])

    def appends(self, _: None) -> None:
        self.extend_with(self.to_mark())

    def extend_with(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Described:
            if target.elements is None:
                target.elements = []
            target = target.elements
        target.extend(items)

    def add_items(self, _: None) -> None:
        items = self.to_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise TypeError
        target.update(map(self.key, items))

    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put([key, value])

    def set_items(self, _: None) -> None:
        self.put(self.to_mark())

    def put(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Described:
            if target.items is None:
                target.items = {}
            target = target.items
        if type(target) is not dict:
            raise TypeError
        target.update(zip(map(self.key, items[::2]), items[1::2], strict=True))

    def key(self, key: Any) -> Any:
        """`key` if it may be one: hashing and comparing it takes little time, whoever chose it."""
        if type(key) in _KEYS:
            return key
        is_flat = type(key) is tuple and len(key) <= _MAX_KEY_LENGTH and all(type(part) in _PARTS for part in key)
        if not (is_flat or type(key) in _NUMBERS):
            raise ValueError("a key that is neither a number, a string nor a flat tuple of these")
        self.number_keys += 1
        if self.number_keys > _MAX_NUMBER_KEYS:
            raise ValueError(f"more than {_MAX_NUMBER_KEYS:,} keys that are numbers or tuples")
        return key

    def memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def memoize_at(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        value = self.memo[index]
        if type(value) in _CONTAINERS:
            self.shared.add(id(value))
        self.stack.append(value)

    def name(self, module_and_name: str) -> None:
        name = Name(module_and_name.replace(" ", ".", 1))
        self.names.add(name)
        self.stack.append(name)

    def name_from_stack(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not type(name) is type(module) is str:
            raise TypeError
        self.name(f"{module}.{name}")

    def persistent(self, _: None) -> None:
        self.stack.append(Persistent(self.stack.pop()))

    def call(self, _: None) -> None:
        arguments, callee = self.stack.pop(), self.stack.pop()
        self.stack.append(Described(callee, arguments))

    def call_with_keywords(self, _: None) -> None:
        keywords, arguments, callee = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(Described(callee, (arguments, keywords)))

    def build(self, _: None) -> None:
        state = self.stack.pop()
        self.stack[-1].state = state


_CONTAINERS = {list, tuple, dict, set, Described, Persistent}
_KEYS = {str, bytes, bool, type(None), Name, Described}  # strings have hashes that the file cannot choose
_NUMBERS = {int, float}
_PARTS = {str, bytes, bool, type(None), Name, int, float}
_BY_NAME: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), _Machine.ignore),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _Machine.push),
    "NONE": _Machine.push_none,
    "NEWTRUE": _Machine.push_true,
    "NEWFALSE": _Machine.push_false,
    "EMPTY_DICT": _Machine.empty_dict,
    "EMPTY_LIST": _Machine.empty_list,
    "EMPTY_TUPLE": _Machine.empty_tuple,
    "EMPTY_SET": _Machine.empty_set,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.memoize_at),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "BINPERSID": _Machine.persistent,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "NEWOBJ_EX": _Machine.call_with_keywords,
    "BUILD": _Machine.build,
}
_OPCODES = {
    opcode.code.encode("latin-1"): (opcode.arg.reader if opcode.arg else None, _BY_NAME[opcode.name])
    for opcode in pickletools.opcodes
    if opcode.name in _BY_NAME
}


def _refuse_endless(root: Any, shared: set[int]) -> None:
    """Raises ValueError if an object holds itself, is nested too deep, or is too large with its references written out.

    Args:
        root: the object.
        shared: ids of the containers that are referred to; they are measured once.
    """
    measured: dict[int, tuple[int, int]] = {}

    def measure(container: Any, room: int) -> tuple[int, int]:
        """How deep a container is nested, and the objects in it; it may be `room` deep, so the recursion ends."""
        if room == 0:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        deepest, objects = 0, 0
        for part in _parts(container):
            objects += 1
            if type(part) in _CONTAINERS:
                below, inside = measured.get(id(part)) or measure(part, room - 1)
                deepest = below if below > deepest else deepest
                objects += inside
        if deepest >= room:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if objects > MAX_OBJECTS:
            raise ValueError(f"more than {MAX_OBJECTS:,} objects, with those that are referred to")
        if id(container) in shared:
            measured[id(container)] = deepest + 1, objects
        return deepest + 1, objects

    measure([root], MAX_DEPTH)


def _parts(container: Any) -> Iterable[Any]:
    """What a container holds directly."""
    kind = type(container)
    if kind is dict:
        return chain.from_iterable(container.items())
    if kind is Described:
        return (container.callee, container.arguments, container.state, container.items, container.elements)
    if kind is Persistent:
        return (container.key,)
    return container
