"""What a QEMU command line needs to have the disk: pure functions on lists of arguments.

QEMU has to share guest memory with the server by file descriptor: RAM must come from a memory backend with
``share=on``, whose size must equal ``-m``.  QEMU merges several ``-machine`` options, so one more does no harm.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk.config import parse_size
from vmmblk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["added_arguments", "device_argument", "memory_arguments"]

MEMORY_ID = "vmmblk-mem"
DEFAULT_MEMORY = 128 << 20  # bytes; what QEMU gives a machine without -m

_TRUE = ("on", "yes", "true", "y")
_SHARED_BY_DEFAULT = ("memory-backend-memfd", "memory-backend-shm")


def added_arguments(command: Sequence[str], socket: Path, *, bootindex: int | None = None) -> list[str]:
    """What to append to the QEMU ``command`` so that it uses the disk served at ``socket``.

    Memory that the command already brings is checked instead.  Raises: ConfigError naming the argument at fault.
    """
    return [*_missing_memory(command[1:]), *device_argument(socket, bootindex=bootindex)]


def device_argument(socket: Path, *, bootindex: int | None = None) -> list[str]:
    """The ``-device`` option; QEMU takes the socket of this device in JSON only."""
    device: dict[str, object] = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(socket)}}
    if bootindex is not None:
        device["bootindex"] = bootindex
    return ["-device", json.dumps(device, separators=(",", ":"))]


def memory_arguments(size: int) -> list[str]:
    """The options that make ``size`` bytes of shared guest memory."""
    backend = f"memory-backend-memfd,id={MEMORY_ID},size={size},share=on"
    return ["-object", backend, "-machine", f"memory-backend={MEMORY_ID}"]


@dataclass(frozen=True, slots=True)
class _Backend:
    """A memory backend on the command line."""

    argument: str
    kind: str
    share: str

    def check(self) -> None:
        """Raise ConfigError unless another process can map this memory."""
        if self.kind == "memory-backend-ram":
            raise ConfigError(f"-object {self.argument}: this memory cannot be shared; use memory-backend-memfd")
        if self.share.lower() not in _TRUE:
            raise ConfigError(f"-object {self.argument}: this memory is not shared; add share=on to it")


def _missing_memory(arguments: Sequence[str]) -> list[str]:
    size, used, backends = DEFAULT_MEMORY, [], {}
    for option, value in _options(arguments):
        if option == "m":
            size = _memory_size(value, size)
        elif option == "mem-path":
            raise ConfigError(
                f"-mem-path {value}: this memory is not shared; use -object memory-backend-file,mem-path={value},"
                "id=mem,size=...,share=on -machine memory-backend=mem"
            )
        elif option == "object":
            backends.update(_backend(value))
        elif option in ("machine", "M"):
            used += _named(value, "memory-backend")
        elif option == "numa":
            used += _named(value, "memdev")
    for name in used:
        if name not in backends:
            raise ConfigError(f"there is no -object with id={name} for the machine's memory; add it")
        backends[name].check()
    return [] if used else memory_arguments(size)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option that takes a value, with it; QEMU allows one or two dashes."""
    for name, value in itertools.pairwise(arguments):
        if name.startswith("-"):
            yield name.removeprefix("-").removeprefix("-"), value


def _memory_size(value: str, before: int) -> int:
    """Bytes of guest memory after ``-m value``; a bare number counts MiB."""
    keys = _keys(value, first="size")
    if "size" not in keys:
        return before
    try:
        return parse_size(keys["size"], unit="M")
    except ConfigError:
        raise ConfigError(f"-m {value}: cannot tell the size of the memory; write it like -m 1G") from None


def _named(value: str, key: str) -> list[str]:
    keys = _keys(value, first="type")
    return [keys[key]] if key in keys else []


def _backend(value: str) -> dict[str, _Backend]:
    if value.startswith("{"):
        keys = _json_keys(value)
        kind = keys.get("qom-type", "")
    else:
        keys = _keys(value, first="qom-type")
        kind = keys["qom-type"]
    if not kind.startswith("memory-backend-"):
        return {}
    share = keys.get("share", "on" if kind in _SHARED_BY_DEFAULT else "off")
    return {keys.get("id", ""): _Backend(value, kind, share)}


def _json_keys(value: str) -> dict[str, str]:
    try:
        found = json.loads(value)
    except ValueError as exc:
        raise ConfigError(f"-object {value}: this is not JSON ({exc}); mend it") from None
    return {key: str(item) for key, item in found.items()}


def _keys(value: str, *, first: str) -> dict[str, str]:
    """The parts of ``a,k=v,...``: a leading part without ``=`` belongs to the key ``first``; ``,,`` is a comma."""
    keys = {}
    for index, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, item = part.partition("=")
        if not equals:
            key, item = (first, part) if index == 0 else (part, "on")
        keys[key] = item.replace("\0", ",")
    return keys
