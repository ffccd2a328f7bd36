"""Read pickles of other projects without running anything in them.

NVlabs/edm saves whole modules, together with the Python source that rebuilds them. The unpickler here has a short list
of names, makes tensors, plain containers and inert records of them, and refuses every other name.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.io.safe_load import first_line

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before its zip files
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
        for part in state if isinstance(state, tuple) else (state,):
            self.attributes.update(part or {})

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

    def __setstate__(self, state: Any) -> None:
        self.update(state or {})


def read_pickle(path: str | Path) -> Any:
    """The contents of a pickle as plain containers, tensors and `Record`s.

    Raises:
        ValueError: if it names anything that is not on the short list, or is damaged.
        OSError: if it cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except _RefusedError as error:
        raise ValueError(f"{path} was not read: {error}; nothing of it was run") from None
    except Exception as error:  # an unpickler fails in every way on damaged input
        raise ValueError(f"{path} is not a readable pickle: {first_line(error)}") from error


class _RefusedError(Exception):
    """Something that is not on the list."""


def _shown(text: Any) -> str:
    """A name from the file in a message: short, on one line, without control characters."""
    return text[:80].encode("unicode_escape").decode()[:80] if isinstance(text, str) else type(text).__name__


class _Unpickler(pickle.Unpickler):
    """Resolves the names of `_ALLOWED` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for `module.name`."""
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"it asks for {_shown(f'{module}.{name}')}, which no file of weights needs")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Only streams inside a stream refer to storages."""
        raise _RefusedError("it refers to an object outside of it")


class _StorageUnpickler(_Unpickler):
    """The inner stream of a tensor's storage, in the old format of torch.save."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, tuple[torch.dtype, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Storage types only."""
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return _STORAGES[name]
        raise _RefusedError(f"a tensor in it asks for {_shown(f'{module}.{name}')}")

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage; its bytes come later in the stream."""
        kind, dtype, key, _, numel = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or (len(pid) > 5 and pid[5] is not None):
            raise _RefusedError("a tensor in it is kept in another way than in the old format of torch.save")
        self.storages[key] = (dtype, int(numel))
        return key


def _load_storage(data: bytes) -> Tensor:
    """`torch.storage._load_from_bytes`, which unpickles again, done by our own unpickler: a 1-D tensor."""
    stream = io.BytesIO(data)
    if _StorageUnpickler(stream).load() != LEGACY_MAGIC:
        raise _RefusedError("a tensor in it is not in the old format of torch.save")
    for _ in range(2):  # protocol version, byte order
        _StorageUnpickler(stream).load()
    reader = _StorageUnpickler(stream)
    wanted = reader.load()
    found = {}
    for key in _StorageUnpickler(stream).load():
        dtype, numel = reader.storages[key]
        stream.seek(8, io.SEEK_CUR)  # the count of elements once more
        size = numel * dtype.itemsize
        raw = stream.read(size)
        if len(raw) != size:
            raise ValueError("a tensor is cut off")
        found[key] = torch.frombuffer(bytearray(raw), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return found[wanted]


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()  # refuses what lies outside of the storage


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
        raise _RefusedError("it asks for builtins.getattr of something else than its own objects")
    return Record()


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in streams of protocol 2."""
    if encoding != "latin1":
        raise _RefusedError(f"it holds bytes as {_shown(encoding)}")
    return text.encode("latin1")


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


def _container(name: str) -> type[Record]:
    return type(name, (Record,), {"class_name": name})


_ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _Call(_encode),
    **{(builtins, "set"): _Call(set) for builtins in ("builtins", "__builtin__")},
    **{(builtins, "getattr"): _Call(_bound_method) for builtins in ("builtins", "__builtin__")},
    ("collections", "OrderedDict"): _Call(OrderedDict),
    ("dnnlib.util", "EasyDict"): _PlainDict,
    ("numpy", "dtype"): _Call(_numpy_dtype),
    ("numpy.core.multiarray", "scalar"): _Call(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): _Call(_numpy_scalar),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): _Call(_load_storage),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Call(_persistent_object),
    **{("torch.nn.modules.container", name): _container(name) for name in ("ModuleDict", "ModuleList", "Sequential")},
}
