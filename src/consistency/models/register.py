"""Names of networks and parametrizations: what a model file stores in place of a path to import.

A class of one's own joins by a decorator, and is brought to a command with `imports=[my_package.my_module]`:

    @register_network("my_net")
    class MyNet(nn.Module): ...
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

Class = TypeVar("Class", bound=type)

_CLASSES: dict[str, dict[str, type]] = {"network": {}, "parametrization": {}}


@runtime_checkable
class Network(Protocol):
    """What a denoiser asks of a network: an `nn.Module` with these attributes and this call.

    `config` (the arguments of its constructor) is set by `register_network`.
    """

    image_size: int  # height and width of an image
    in_channels: int  # of the images, in and out
    num_classes: int  # 0 for an unconditional network
    config: dict[str, Any]

    def __call__(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """F: [B, C, H, W] of unit variance, [B], [B] int64 (-1: no label) -> [B, C, H, W].

        Networks that take more have keywords for it: `augment_labels` [B, n] (what was done to the image),
        `c_noise_end` [B] (the second time of a flow map).
        """


def register_network(name: str) -> Callable[[Class], Class]:
    """Class decorator: an `nn.Module` by this name in model files and checkpoints; see `Network`.

    It notes the arguments of each new network in its `config`, from which it is built again. They must be plain values.

    Raises:
        ValueError: if another class has the name, or none is given.
    """
    _check_name("network", name)

    def register(cls: Class) -> Class:
        construct: Any = cls.__init__  # type: ignore[misc]
        signature = inspect.signature(construct)
        parameters = list(signature.parameters.values())[1:]
        if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY) for parameter in parameters):
            raise ValueError(f"network {name!r}: its constructor takes arguments without names; files hold names")
        if isinstance(getattr(cls, "config", None), property):
            raise ValueError(f"network {name!r} has a property config, which register_network sets; rename it")

        @wraps(construct)
        def noting_arguments(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            named = dict(list(bound.arguments.items())[1:])
            further = [key for key, value in signature.parameters.items() if value.kind is value.VAR_KEYWORD]
            named |= {k: v for key in further for k, v in named[key].items()}
            given = copy.deepcopy({k: _plain(v) for k, v in named.items() if k not in further})
            construct(self, *args, **kwargs)
            if type(self) is cls:  # of a subclass its own constructor's arguments count
                self.config = given  # type: ignore[attr-defined]

        cls.__init__ = noting_arguments  # type: ignore[misc]
        return _register("network", name, cls)

    return register


def register_parametrization(name: str) -> Callable[[Class], Class]:
    """Class decorator: a frozen dataclass, `(sigma) -> Coefficients`, by this name in model files and checkpoints.

    Raises:
        ValueError: if another class has the name, or it is no dataclass.
    """

    _check_name("parametrization", name)

    def register(cls: Class) -> Class:
        if not is_dataclass(cls):
            raise ValueError(f"parametrization {name!r} is no dataclass; write @dataclass(frozen=True) below its name")
        return _register("parametrization", name, cls)

    return register


def _check_name(kind: str, name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"register_{kind} needs a name: @register_{kind}('my_name')")


def describe_network(network: nn.Module) -> dict[str, Any]:
    """`{"name": ..., "arguments": {...}}`, from which `build` makes the network again, with fresh weights.

    Raises:
        ValueError: if its class has no registered name, or was given what no file can hold.
    """
    name, arguments = _name_of("network", network), dict(network.config)  # type: ignore[arg-type]
    return _described("network", name, arguments)


def describe_parametrization(parametrization: Any) -> dict[str, Any]:
    """`{"name": ..., "arguments": {...}}` of a parametrization, as `describe_network`."""
    arguments = {key: _plain(value) for key, value in asdict(parametrization).items()}
    return _described("parametrization", _name_of("parametrization", parametrization), arguments)


def _described(kind: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    for key, value in arguments.items():
        if not _is_plain(value):
            raise ValueError(
                f"{kind} {name!r} cannot be saved: its argument {key} is a {type(value).__name__}; allowed: numbers, "
                "strings, true, false, None, and lists and dictionaries of them"
            )
    return {"name": name, "arguments": arguments}


def build(kind: str, description: Mapping[str, Any]) -> Any:
    """A network or a parametrization from its description.

    Args:
        kind: `network` or `parametrization`.
        description: As `describe_network` gives it.

    Raises:
        ValueError: if nothing is registered by that name, or it does not take these arguments.
    """
    cls = find(kind, description["name"])
    try:
        inspect.signature(cls).bind(**description["arguments"])
    except TypeError as error:
        raise ValueError(f"{kind} {description['name']!r} does not take these arguments: {error}") from None
    return cls(**description["arguments"])


def rebuilt(network: nn.Module, **arguments: Any) -> nn.Module:
    """A network with the weights of `network` and some other arguments, e.g. another dropout."""
    description = describe_network(network)
    other = build("network", {**description, "arguments": {**description["arguments"], **arguments}})
    other.load_state_dict(network.state_dict())
    return other


class UnknownNameError(ValueError):
    """A file or an option names a network or parametrization that nobody registered here."""


def find(kind: str, name: str) -> type:
    """The class that is registered by this name.

    Raises:
        UnknownNameError: with the names that there are.
    """
    if name not in _CLASSES[kind]:
        _import_own()
    if name not in _CLASSES[kind]:
        raise UnknownNameError(
            f"{kind} {str(name)[:80]!r} is not registered here; known: {', '.join(sorted(_CLASSES[kind]))}. If it is "
            "of your own code, bring that with imports=[MODULE]"
        )
    return _CLASSES[kind][name]


def import_modules(modules: Any) -> None:
    """Import modules by name, so that they register what they define; an error in one of them is shown as it is.

    Raises:
        ValueError: if `modules` is not a list of names, or there is no such module.
    """
    if not isinstance(modules, list | tuple) or not all(isinstance(name, str) and name for name in modules):
        raise ValueError(f"imports is {modules!r}; allowed: a list of modules, as imports=[my_package.my_module]")
    for name in modules:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there and misses something itself
            raise ValueError(
                f"imports has {name!r}, and there is no such module; it is looked for in the current folder and where "
                "Python looks (PYTHONPATH, installed packages)"
            ) from error
        except (ValueError, OSError) as error:  # which commands cut to one line: here the place matters
            raise RuntimeError(f"imports: {name} failed") from error


def _import_own() -> None:
    """The modules of this package, which register what they define."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"consistency.models.{module.name}")


def _register(kind: str, name: str, cls: Any) -> Any:
    """Of one name the newest definition counts, so that a cell of a notebook can be run again."""
    if not cls.__module__.startswith("consistency."):
        _import_own()  # their names are taken
    before = _CLASSES[kind].get(name)
    if before is not None and (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{kind} {name!r} is registered already, by {before.__module__}.{before.__qualname__}")
    _CLASSES[kind][name] = cls
    return cls


def _name_of(kind: str, thing: Any) -> str:
    for name, cls in _CLASSES[kind].items():
        if type(thing) is cls:
            return name
    raise ValueError(
        f"the {kind} {type(thing).__name__} has no name to be saved by; write @register_{kind}('my_name') above it"
    )


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what comes back from a file."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)
