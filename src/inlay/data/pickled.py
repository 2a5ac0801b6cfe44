"""Read the plain data in a pickle without unpickling it.

`pickletools` lists a pickle's instructions; only those that build lists, dicts, tuples, strings and numbers are
followed here. Classes are never looked up and nothing is called: an object becomes a dict of its attributes.
"""

from __future__ import annotations

import pickletools
from typing import Any

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def plain(content: bytes) -> Any:
    """The value of a pickle as lists, dicts, tuples, strings and numbers.

    Raises:
        ValueError: an instruction that is not about plain data, or a damaged pickle.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, position in pickletools.genops(content):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in _TUPLES:
            size = _TUPLES[name]
            items = tuple(stack[len(stack) - size :])
            del stack[len(stack) - size :]
            stack.append(items)
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name == "APPENDS":
            values, stack = stack, marks.pop()
            stack[-1].extend(values)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name == "SETITEMS":
            pairs, stack = stack, marks.pop()
            stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(None)  # the class, whatever it is
        elif name in ("NEWOBJ", "REDUCE"):  # class and arguments make an object
            del stack[-2:]
            stack.append({})
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].update(state if isinstance(state, dict) else {"state": state})
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"instruction {name} at byte {position} is not about plain data")
    raise ValueError("the pickle ends early")
