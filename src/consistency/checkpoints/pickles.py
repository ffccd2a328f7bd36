"""Read pickles of other projects without running anything in them.

NVlabs/edm saves whole modules, together with the Python source that rebuilds them. The unpickler here knows a short
list of names, makes tensors, plain containers and inert records of them, and refuses every other name.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before its zip files
_MAX_BYTES = 1 << 34  # of a file; NVlabs' largest has 1.2 GB
_MAX_OPERATIONS = 20_000_000  # its opcodes; NVlabs' files have less than a million
_SLACK = 1 << 24  # bytes
_MAX_PREFIX = 500  # letters of a module's name
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class Record:
    """An object of a foreign class: its class's name and its attributes, and no behaviour."""

    class_name = ""
    attributes: dict[str, Any]

    def __new__(cls, *_: Any) -> Record:
        """With or without the arguments that the foreign class took."""
        record = super().__new__(cls)
        record.attributes = {}
        return record

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            self.attributes.update(_checked_state(part))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the parameters and buffers below a module, named as in its state dict."""
        for prefix, module in self.modules():
            hidden = module.attributes.get("_non_persistent_buffers_set", ())
            for group in ("_parameters", "_buffers"):
                for name, value in module.attributes.get(group, {}).items():
                    if isinstance(value, Tensor) and name not in hidden:
                        yield prefix + name, value

    def modules(self) -> Iterator[tuple[str, Record]]:
        """(prefix of its names, module): this one and all below it, each once, however they are nested."""
        waiting, seen = [("", self)], {id(self)}
        while waiting:
            prefix, module = waiting.pop()
            if len(prefix) > _MAX_PREFIX:
                raise ValueError(f"its modules lie in each other too deep (names of more than {_MAX_PREFIX} letters)")
            yield prefix, module
            for name, child in reversed(module.attributes.get("_modules", {}).items()):
                if isinstance(child, Record) and id(child) not in seen:
                    seen.add(id(child))
                    waiting.append((f"{prefix}{name}.", child))


class _PlainDict(dict[str, Any]):
    """Stands for dictionaries with extras, such as NVlabs' EasyDict."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.update(_checked_state(state))


def read_pickle(path: str | Path) -> Any:
    """The contents of a pickle as plain containers, tensors and `Record`s.

    Raises:
        ValueError: if it names anything that is not on the short list, or is damaged.
    """
    with Path(path).open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path} was not read: it is larger than {_MAX_BYTES:,} bytes")
    token = _budget.set(_Budget(len(data)))
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except _RefusedError as error:
        raise ValueError(f"{path} was not read: {error}") from None
    except Exception as error:  # an unpickler fails in every way on damaged input
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable pickle: {reason}") from error
    finally:
        _budget.reset(token)


class _Budget:
    """What reading a file may take. An opcode of two bytes can ask for a copy of all that came before it."""

    def __init__(self, size: int) -> None:
        self.left, self.operations = 4 * size + _SLACK, _MAX_OPERATIONS

    def spend(self, amount: int) -> None:
        """Take so many bytes, roughly, before they are made."""
        self.left -= amount
        if self.left < 0:
            raise _RefusedError("it repeats itself: its contents are several times as large as the file")

    def step(self) -> None:
        """One opcode; most make an object of about 64 bytes."""
        self.operations -= 1
        if self.operations < 0:
            raise _RefusedError(f"it has more than {_MAX_OPERATIONS:,} operations")


_budget: ContextVar[_Budget] = ContextVar("budget")


class _RefusedError(Exception):
    """Something that is not on the list."""


_NOTHING = "nothing of it was run"


def _shown(text: Any) -> str:
    """A name from the file in a message: short, on one line, without control characters."""
    return text[:80].encode("unicode_escape").decode()[:80] if isinstance(text, str) else type(text).__name__


def _checked_state(state: Any) -> dict[Any, Any]:
    """The attributes that an object is given: a dictionary, whose keys were checked when it was made."""
    if not isinstance(state, dict | None):
        raise _RefusedError(f"it gives an object a {type(state).__name__} as its attributes")
    _budget.get().spend(100 * len(state or ()))
    return state or {}


def _check_key(key: Any) -> None:
    if not isinstance(key, str | int | float | bytes | None):
        raise _RefusedError(f"it has a {type(key).__name__} as a key")


_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    """Resolves the names of `_KNOWN` and nothing else.

    The one written in Python: its memo is a dictionary. That of the C one is an array as long as the largest index that
    a stream names.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, encoding="ASCII")
        read, budget = stream.read, _budget.get()

        def counted(count: int) -> bytes:
            if count == 1:  # an opcode; without frames each is read from the file
                budget.step()
            return read(count)

        self._file_read = counted

    def find_class(self, module: str, name: str) -> Any:
        """What stands for `module.name`."""
        known = _KNOWN.get((module, name))
        if known is None:
            raise _RefusedError(f"it asks for {_shown(f'{module}.{name}')}, which no file of weights needs; {_NOTHING}")
        return known

    def persistent_load(self, pid: Any) -> Any:
        """Only streams inside a stream refer to storages."""
        raise _RefusedError("it refers to an object outside of it")

    def _plain_keys(self) -> None:
        """Check the keys that the next opcode hashes: nested tuples can take forever."""
        for key in self.stack[::2]:
            _check_key(key)

    def _load_setitem(self) -> None:
        _check_key(self.stack[-2])
        _PythonUnpickler.load_setitem(self)

    def _load_setitems(self) -> None:
        self._plain_keys()
        _PythonUnpickler.load_setitems(self)

    def _load_dict(self) -> None:
        self._plain_keys()
        _PythonUnpickler.load_dict(self)

    def _load_items(self) -> None:
        for item in self.stack:
            _check_key(item)
        _PythonUnpickler.load_additems(self)

    def _load_frame(self) -> None:
        self.read(8)  # its length: nothing is read ahead

    def _refuse(self) -> None:
        raise _RefusedError("it uses an opcode that no file of weights needs")

    dispatch: dict[int, Any] = {
        **_PythonUnpickler.dispatch,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.DICT[0]: _load_dict,
        pickle.ADDITEMS[0]: _load_items,
        pickle.FROZENSET[0]: _refuse,
        pickle.BYTEARRAY8[0]: _refuse,  # allocates what it announces
        pickle.FRAME[0]: _load_frame,
        pickle.LONG4[0]: _refuse,  # dividing by a number of a million digits takes hours
    }


class _StorageUnpickler(_Unpickler):
    """The inner stream of a tensor's storage, in the old format of torch.save."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, tuple[torch.dtype, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Storage types only."""
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return _STORAGES[name]
        raise _RefusedError(f"a tensor in it asks for {_shown(f'{module}.{name}')}; {_NOTHING}")

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage; its bytes come later in the stream."""
        kind, dtype, key, _, numel = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or (len(pid) > 5 and pid[5] is not None):
            raise _RefusedError("a tensor in it is kept in another way than in the old format of torch.save")
        _check_key(key)
        self.storages[key] = (dtype, int(numel))
        return key


def _load_storage(data: bytes) -> Tensor:
    """`torch.storage._load_from_bytes`, which unpickles again, done by our own unpickler: a 1-D tensor."""
    _budget.get().spend(2 * len(data))
    stream = io.BytesIO(data)
    if _StorageUnpickler(stream).load() != LEGACY_MAGIC:
        raise _RefusedError("a tensor in it is not in the old format of torch.save")
    for _ in range(2):  # protocol version, byte order
        _StorageUnpickler(stream).load()
    reader = _StorageUnpickler(stream)
    wanted = reader.load()
    keys = _StorageUnpickler(stream).load()
    found = {}
    for key in keys:
        dtype, numel = reader.storages[key]
        size = numel * torch.empty(0, dtype=dtype).element_size()
        if size < 0:
            raise ValueError("a tensor has less than no numbers")
        stream.seek(8, io.SEEK_CUR)  # the count of elements once more
        raw = stream.read(size)
        if len(raw) != size:
            raise ValueError("a tensor is cut off")
        found[key] = torch.frombuffer(bytearray(raw), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return found[wanted]


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():
        raise ValueError("a tensor is larger than its storage")
    _budget.get().spend(storage.element_size() * math.prod(size))
    return storage.as_strided(size, stride, offset).clone()


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _persistent_object(meta: dict[str, Any]) -> Record:
    """NVlabs' `_reconstruct_persistent_obj` without its source: the name and the attributes."""
    record = Record()
    record.class_name = _shown(meta["class_name"])
    record.__setstate__(meta["state"])
    return record


def _bound_method(owner: Any, name: Any) -> Record:
    """`getattr(record, "method")`, which ECT's snapshots keep in their loss: a record that does nothing."""
    if not isinstance(owner, Record) or not isinstance(name, str):
        raise _RefusedError(
            "it asks for builtins.getattr of something else than its own objects; nothing of it was run"
        )
    return Record()


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in streams of protocol 2."""
    if encoding != "latin1":
        raise _RefusedError(f"it holds bytes as {_shown(encoding)}")
    _budget.get().spend(len(text))
    return text.encode("latin1")


def _set(items: Any = ()) -> set[Any]:
    _budget.get().spend(100 * len(items))
    for item in items:
        _check_key(item)
    return set(items)


def _ordered_dict() -> OrderedDict[Any, Any]:
    """Items follow one by one."""
    return OrderedDict()


class _NumpyType(Record):
    """A little-endian numpy dtype."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or ">" in state[:3]:
            raise _RefusedError("it holds a numpy scalar of another byte order")


def _numpy_dtype(code: str, *_: Any) -> Record:
    dtype = _NumpyType()
    dtype.class_name = _shown(code)
    return dtype


def _numpy_scalar(dtype: Record, data: bytes) -> Any:
    if dtype.class_name not in ("f8", "f4", "i8", "i4", "b1"):
        raise _RefusedError(f"it holds a numpy scalar of type {dtype.class_name}")
    return np.frombuffer(data, dtype=dtype.class_name)[0].item()


class _Call:
    """A function that a stream may call, but not change: BUILD sets attributes on whatever it is given."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it tries to change a function of its reader")


_KNOWN: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _Call(_encode),
    **{(builtins, "set"): _Call(_set) for builtins in ("builtins", "__builtin__")},
    **{(builtins, "getattr"): _Call(_bound_method) for builtins in ("builtins", "__builtin__")},
    ("collections", "OrderedDict"): _Call(_ordered_dict),
    ("dnnlib.util", "EasyDict"): _PlainDict,
    ("numpy", "dtype"): _Call(_numpy_dtype),
    ("numpy.core.multiarray", "scalar"): _Call(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): _Call(_numpy_scalar),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): _Call(_load_storage),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Call(_persistent_object),
    **{
        ("torch.nn.modules.container", name): type(name, (Record,), {"class_name": name})
        for name in ("ModuleDict", "ModuleList", "Sequential")
    },
}
