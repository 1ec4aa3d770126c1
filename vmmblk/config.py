"""From what the user typed to a disk that can be served.

DISK is a path, ``memory:SIZE``, ``null:SIZE`` or ``./mydisk.py``, each with parameters of its own as ``k=v``.  The
parameters of a disk are the keyword parameters of what makes it, and their annotations say what values may be: there is
no second list of them.  The same goes for filters, ``NAME`` or ``NAME:k=v,...``.  Everything that can be wrong ends in
a ConfigError of one line.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
import sys
import typing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmmblk.backends.file import File
from vmmblk.backends.memory import Memory
from vmmblk.backends.null import Null
from vmmblk.backends.zoned_device import ZonedDevice, zone_model
from vmmblk.block import Block, BlockInfo
from vmmblk.errors import ConfigError
from vmmblk.filters import prepare
from vmmblk.filters.readonly import ReadOnly
from vmmblk.filters.threaded import asynchronous
from vmmblk.filters.zoned import Zoned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

__all__ = ["open_disk", "parse_size"]

log = logging.getLogger(__name__)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGTPE]?)(?:I?B)?", re.ASCII | re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+-]*):(.*)", re.ASCII | re.DOTALL)
_FILTERS: dict[str, Callable[..., Block]] = {"readonly": ReadOnly, "zoned": Zoned}
_SWITCH = {"on": True, "yes": True, "true": True, "1": True, "off": False, "no": False, "false": False, "0": False}


def parse_size(text: str, *, unit: str = "") -> int:
    """Bytes from "1G", "512M", "64KiB", "1.5GiB"; powers of 1024; ``unit`` is that of a bare number ("M").

    Raises: ConfigError.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write it like 512M or 1G")
    exponent = " KMGTPE".index((match[2] or unit or " ").upper())
    return int(Fraction(match[1]) * 1024**exponent)


def open_disk(
    spec: str,
    params: Sequence[str] = (),
    *,
    read_only: bool = False,
    block_size: int | None = None,
    lock: bool = True,
    filters: Sequence[str] = (),
) -> Block:
    """Open the disk that ``spec`` names with its ``k=v`` ``params``, ready for the server.

    ``block_size`` is that of sectors, in bytes; without it 512, or what the disk itself says.  ``lock`` is for files.
    ``filters`` go on top of the disk, each as ``NAME`` or ``NAME:k=v,...``; the first is nearest to the guest.
    Raises: ConfigError.
    """
    request = _Request(spec, _split(params), read_only, block_size, lock)
    block = _opener(spec)(request)
    try:
        _check(spec, block, block_size)
        if read_only and block.info.read_write:
            block = ReadOnly(asynchronous(block))
        for text in reversed(filters):
            block = _add_filter(text, block, spec)
        return prepare(block)
    except ConfigError:
        raise
    except Exception as exc:
        raise _blame(spec, "the disk", exc) from exc


@dataclass(frozen=True, slots=True)
class _Request:
    """What the user asked for."""

    spec: str
    params: dict[str, str]
    read_only: bool
    block_size: int | None
    lock: bool

    @property
    def sector_size(self) -> int:
        return self.block_size or 512


def _opener(spec: str) -> Callable[[_Request], Block]:
    schemes = {"memory": _open_memory, "null": _open_null}
    match = _SCHEME.fullmatch(spec)
    if match is not None and match[1] in schemes:
        return schemes[match[1]]
    if match is not None and not Path(spec).exists():
        raise ConfigError(f"there is no disk {match[1]}:...; use a path, memory:SIZE, null:SIZE or ./mydisk.py")
    return _open_python if spec.endswith(".py") else _open_file


def _open_memory(request: _Request) -> Block:
    def memory(*, max: int = 0, hugepages: bool = False) -> Block:  # noqa: A002 - the name the user types
        sectors = _whole_sectors(request)
        most = max // request.sector_size
        try:
            return Memory(sectors, sector_size=request.sector_size, max_sectors=most, hugepages=hugepages)
        except (OSError, OverflowError, ValueError) as exc:
            raise ConfigError(f"{request.spec}: cannot reserve that much memory ({exc}); make it smaller") from None

    return memory(**_arguments(request, memory))


def _open_null(request: _Request) -> Block:
    def null() -> Block:
        return Null(_whole_sectors(request), sector_size=request.sector_size)

    return null(**_arguments(request, null))


def _whole_sectors(request: _Request) -> int:
    size = parse_size(request.spec.partition(":")[2])
    if size < request.sector_size or size % request.sector_size:
        raise ConfigError(f"{request.spec}: the size must be a multiple of {request.sector_size} bytes and not 0")
    return size // request.sector_size


def _open_file(request: _Request) -> Block:
    path = Path(request.spec)

    def zoned_device(*, direct: bool = True, bounce: bool = False, lock: bool = request.lock) -> Block:
        if not direct:
            raise ConfigError(f"{path} is zoned: what a page cache writes comes in any order; leave direct=off out")
        return ZonedDevice.open(path, read_only=request.read_only, bounce=bounce, lock=lock)

    def file(*, direct: bool = False, bounce: bool = False, lock: bool = request.lock) -> Block:
        return File(
            path,
            sector_size=request.sector_size,
            read_only=request.read_only,
            direct=direct,
            bounce=bounce,
            lock=lock,
        )

    open_it = zoned_device if zone_model(path) else file
    return open_it(**_arguments(request, open_it))


def _open_python(request: _Request) -> Block:
    disk_class = _find_class(request.spec, _load(request.spec))
    arguments = _arguments(request, disk_class)
    try:
        return disk_class(**arguments)
    except ConfigError as exc:
        raise ConfigError(f"{request.spec}: {exc}") from exc
    except Exception as exc:
        raise _blame(request.spec, f"{disk_class.__name__}()", exc) from exc


def _add_filter(text: str, block: Block, disk: str) -> Block:
    """The filter that ``text`` names, on top of ``block``.  Raises: ConfigError."""
    name, _, params = text.partition(":")
    if name not in _FILTERS:
        raise ConfigError(f"there is no filter {name}; there are {', '.join(_FILTERS)}")
    add = _FILTERS[name]
    request = _Request(
        f"--filter {name}", _split(params.split(",") if params else []), read_only=False, block_size=None, lock=False
    )
    try:
        arguments = _arguments(request, add)
        if add is Zoned and "state" not in arguments:
            arguments["state"] = _beside(disk)
        return add(asynchronous(block), **arguments)
    except ConfigError as exc:
        message = str(exc)
        raise ConfigError(message if message.startswith("--filter") else f"--filter {name}: {message}") from None


def _beside(disk: str) -> Path | None:
    """Where the zones of a disk are remembered if the user does not say: beside an image, else nowhere."""
    path = Path(disk)
    if path.is_block_device():
        raise ConfigError(f"say with state=FILE where the write pointers of {disk} are to be kept")
    return path.with_name(path.name + ".zones") if path.is_file() and path.suffix != ".py" else None


def _load(spec: str) -> ModuleType:
    path = Path(spec)
    if not path.is_file():
        raise ConfigError(f"{spec} does not exist; give the path of a Python file with a disk in it")
    name = f"vmmblk_disk_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # noqa: S101 - a name that ends in .py always has a loader
    assert found.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where get_type_hints and dataclasses look
    sys.path.append(str(path.parent.resolve()))  # modules beside it
    try:
        found.loader.exec_module(module)
    except Exception as exc:
        raise _blame(spec, "the file", exc) from exc
    return module


def _find_class(spec: str, module: ModuleType) -> type[Block]:
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Block) and value.__module__ == module.__name__
    }
    if not classes:
        raise ConfigError(f"{spec} defines no disk; write: class Disk(vmmblk.Block)")
    if len(classes) > 1 and "Disk" not in classes:
        raise ConfigError(f"{spec} defines {', '.join(classes)}; name the one to serve Disk")
    chosen = classes["Disk"] if "Disk" in classes else next(iter(classes.values()))
    missing: frozenset[str] = getattr(chosen, "__abstractmethods__", frozenset())
    if missing:
        raise ConfigError(f"{spec}: {chosen.__name__} has no {', '.join(sorted(missing))}(); write it")
    return chosen


def _split(params: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for param in params:
        key, equals, value = param.partition("=")
        if not equals:
            raise ConfigError(f"{param!r} is not a parameter; write it as k=v")
        if key in pairs:
            raise ConfigError(f"{key} is given twice; leave one out")
        pairs[key] = value
    return pairs


def _arguments(request: _Request, target: Callable[..., Block]) -> dict[str, Any]:
    """The user's parameters converted to what ``target`` takes.  Raises: ConfigError."""
    try:
        hints = typing.get_type_hints(typing.cast("Any", target).__init__ if isinstance(target, type) else target)
    except Exception as exc:
        raise _blame(request.spec, "reading the annotations", exc) from exc
    parameters = inspect.signature(target).parameters.values()
    accepted = {each.name: each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    for name in request.params:
        if name not in accepted:
            known = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
            raise ConfigError(f"{request.spec} has no parameter {name}; {known}")
    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and name not in request.params:
            raise ConfigError(f"{request.spec} needs the parameter {name}; add {name}=...")
    return {name: _convert(request.spec, name, value, hints.get(name, str)) for name, value in request.params.items()}


def _convert(spec: str, name: str, value: str, hint: Any) -> Any:
    wrong = f"{spec}: {name}={value} is wrong"
    if hint is bool:
        if value.lower() not in _SWITCH:
            raise ConfigError(f"{wrong}; say {name}=on or {name}=off")
        return _SWITCH[value.lower()]
    if hint is int and not value.lstrip("-").isdigit():
        return parse_size(value)
    try:
        return msgspec.convert(value, hint, strict=False, dec_hook=lambda kind, text: kind(text))
    except (msgspec.ValidationError, TypeError, ValueError) as exc:
        raise ConfigError(f"{wrong}: {_one_line(exc)}") from exc


def _check(spec: str, block: Block, block_size: int | None) -> None:
    """Hold a disk against what the device relies on, and the user asked for.  Raises: ConfigError."""
    for problem in _problems(block):
        raise ConfigError(f"{spec}: {problem}")
    if block_size not in (None, block.info.sector_size):
        raise ConfigError(f"{spec}: its sectors have {block.info.sector_size} bytes; leave --block-size out")


def _problems(block: Block) -> Iterator[str]:
    info = getattr(block, "info", None)
    if not isinstance(info, BlockInfo):
        yield f"{type(block).__name__} has no info; set self.info = BlockInfo(...) in its constructor"
        return
    if not _is_power_of_two(info.sector_size) or info.sector_size < 512:
        yield f"sector_size is {info.sector_size}; it must be a power of two from 512 up"
    elif not isinstance(info.size_sectors, int) or not 0 < info.size_bytes < 1 << 63:
        yield f"size_sectors is {info.size_sectors}; it must be a number from 1 up, and the disk smaller than 8 EiB"
    if not _is_power_of_two(block.buffer_alignment):
        yield f"buffer_alignment is {block.buffer_alignment}; it must be a power of two"


def _is_power_of_two(value: object) -> bool:
    return isinstance(value, int) and value > 0 and value & (value - 1) == 0


def _blame(spec: str, what: str, exc: Exception) -> ConfigError:
    """One line for an exception of the user's own code; its traceback goes to the log at debug level."""
    log.debug("%s: %s failed", spec, what, exc_info=exc)
    return ConfigError(
        f"{spec}: {what} failed with {type(exc).__name__}: {_one_line(exc)}; --log-level debug shows where"
    )


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())
