"""Reads a serialised object stream as plain data. Nothing it names is looked up, imported or called.

torch.distributed.checkpoint describes its files in such a stream. Its protocol is one that
`torch.load(weights_only=True)` does not know, and Megatron puts classes of its own into it. Here an object is only what
was written of it: the name of its class, its arguments and its state.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Name(str):
    """The name of a class, function or constant, as "module.name"."""


@dataclass(eq=False)
class Described:
    """An object that was not made: what would have been called, with which arguments, and the state put in after it."""

    callee: Any
    arguments: Any
    state: Any = None


_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_inert(data: bytes) -> Any:
    """The object in a stream of protocol 2 to 5: values, containers, `Name`s and `Described` objects.

    Raises:
        ValueError: the stream is broken or uses what plain data does not need.
    """
    try:
        return _read(data)
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"not a stream of objects: {error!r}") from None


def _read(data: bytes) -> Any:
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stacks below each open mark
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, marked.pop()
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name if name in _LITERALS:
                stack.append(_LITERALS[name])
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case "MARK":
                marked.append(stack)
                stack = []
            case "TUPLE":
                items = to_mark()
                stack.append(tuple(items))
            case name if name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = to_mark()
                stack[-1].extend(items)
            case "ADDITEMS":
                items = to_mark()
                stack[-1].update(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = to_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(Name(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Name(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                arguments, callee = stack.pop(), stack.pop()
                stack.append(Described(callee, arguments))
            case "NEWOBJ_EX":
                keywords, arguments, callee = stack.pop(), stack.pop(), stack.pop()
                stack.append(Described(callee, (arguments, keywords)))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case name:
                raise ValueError(f"holds {name}, which plain data does not need")
    raise ValueError("ends too early")
