"""What a pickle may name, and what it gets instead: nothing that can do anything.

A pickle calls what it names, and sets attributes of what it has made. So the few names that files
of weights need stand for objects that cannot be changed, and those that are called make only
numbers, arrays and containers.
"""

import builtins
import pickle
import sys
from collections import OrderedDict
from typing import Any

import numpy as np


class Inert:
    """Something that a pickle may name; it cannot be changed, and calls `run` if it is called."""

    __slots__ = ("run",)

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        if not callable(self.run):
            raise pickle.UnpicklingError(f"it calls {self.run}, which is no function")
        return self.run(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function that it names")


class _PickledDtype:
    """`numpy.dtype` in a pickle: its name and byte order, and nothing else that it may set."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, *_: Any) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.hasobject or self.dtype.names or self.dtype.subdtype:
            raise pickle.UnpicklingError(f"an array of {name}")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray(np.ndarray):
    """A NumPy array in a pickle, of numbers only."""

    def __new__(cls, *_: Any) -> "_PickledArray":
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array that is not of numbers")
        super().__setstate__((1, shape, dtype.dtype, fortran, raw))


def _scalar(dtype: Any, raw: Any) -> Any:
    return np.frombuffer(raw, dtype.dtype, count=1)[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`: how protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


def may_stand_for(module: str, name: str) -> bool:
    """Whether an `Unknown` may stand for a global: of Python's own library for plain types only.

    A checkpoint holds objects of the program that wrote it; one that names `os.system` is hostile.
    """
    if module in ("builtins", "__builtin__"):
        # Protocol 2 writes some names as Python 2 had them.
        old = name in ("long", "unicode", "xrange")
        return old or isinstance(getattr(builtins, name, None), type)
    root = module.partition(".")[0]
    return root in _DATA_MODULES or root not in sys.stdlib_module_names


_DATA_MODULES = (
    *("argparse", "collections", "copyreg", "datetime", "decimal", "enum"),
    *("fractions", "functools", "pathlib", "random", "types", "uuid"),
)
"""Of Python's library, those whose classes hold settings and the like."""


class Unknown:
    """What stands in for an object of a class that is not known: never the class itself.

    The subclass made for each global carries its name. state: what the object was to be restored
    from, most often its attributes.
    """

    global_name = ""

    def __new__(cls, *args: Any, **keywords: Any) -> "Unknown":
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self.args: tuple
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """A pickle may fill what it takes for a dict, a list or a set; nothing is kept."""

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...

    def __repr__(self) -> str:
        return f"<unknown {self.global_name}>"


def _plain_globals() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): Inert(tuple),
        ("torch", "device"): Inert(lambda *place: ":".join(map(str, place))),
        ("_codecs", "encode"): Inert(_encode),
        ("numpy", "dtype"): Inert(_PickledDtype),
        ("numpy", "ndarray"): Inert("ndarray"),
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known[module, "_reconstruct"] = Inert(_PickledArray)
        known[module, "scalar"] = Inert(_scalar)
    for module in ("builtins", "__builtin__"):
        for kind in (set, frozenset, bytearray, complex, slice):
            known[module, kind.__name__] = kind
    return known


PLAIN_GLOBALS = _plain_globals()
"""Containers, numbers and NumPy arrays: module and name → what stands for it."""
