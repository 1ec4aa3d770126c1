"""What every filter shares: it is a block on top of a block and forwards what it does not change.

A filter's methods are asynchronous: calling one gives something to await.  The block below is asynchronous too (see
:func:`vmmblk.filters.threaded.asynchronous`).  A filter changes a call by overriding the method and awaiting
``super()``'s with other arguments.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from vmmblk.block import (
    Block,
    BlockInfo,
    Buffers,
    Lifetime,
    Native,
    Operation,
    SupportsNative,
    Topology,
    Zone,
    Zoning,
    operations,
)
from vmmblk.errors import Unimplemented

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import Any

__all__ = ["OFFSET_METHODS", "Filter"]

OFFSET_METHODS = (
    "read",
    "write",
    "write_cached",
    "discard",
    "write_zeroes",
    "secure_erase",
    "report_zones",
    "open_zone",
    "close_zone",
    "finish_zone",
    "reset_zone",
    "append",
)
"""Every method that takes a sector number."""


class Filter(Block):
    """Forwards every call to ``block`` and takes its characteristics from there.

    A subclass that overrides one of :data:`OFFSET_METHODS` must override all of them, or defining it raises
    ``TypeError``: one that moves or refuses sectors in ``write`` but lets ``discard`` through corrupts data.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        forwarded = [name for name in OFFSET_METHODS if getattr(cls, name) is getattr(Filter, name)]
        if 0 < len(forwarded) < len(OFFSET_METHODS):
            raise TypeError(f"{cls.__name__} overrides some methods that take a sector, but not {', '.join(forwarded)}")

    def __init__(self, block: Block, /) -> None:
        self.block = block
        """The block below, asynchronous."""

    @property
    def info(self) -> BlockInfo:  # type: ignore[override]
        """Characteristics of the block below, as they are now."""
        return self.block.info

    @property
    def topology(self) -> Topology:  # type: ignore[override]
        """Advice of the block below."""
        return self.block.topology

    @property
    def buffer_alignment(self) -> int:  # type: ignore[override]
        """What the block below needs."""
        return self.block.buffer_alignment

    @property
    def pins_memory(self) -> bool:  # type: ignore[override]
        """What the block below does."""
        return self.block.pins_memory

    @property
    def bounce(self) -> bool:  # type: ignore[override]
        """What the block below wants."""
        return self.block.bounce

    @property
    def operations(self) -> Operation:
        """The optional operations of the block below (a filter has every method, because it forwards them).

        Not ``submit``: a filter that changes single reads and writes must see them.
        """
        return operations(self.block) & ~Operation.SUBMIT

    def read(self, sector_start: int, buffers: Buffers) -> Awaitable[None]:
        """Forward ``read``."""
        return self._forward("read", sector_start, buffers)

    def write(self, sector_start: int, buffers: Buffers) -> Awaitable[None]:
        """Forward ``write``."""
        return self._forward("write", sector_start, buffers)

    def write_cached(self, sector_start: int, buffers: Buffers) -> Awaitable[None]:
        """Forward ``write_cached``."""
        return self._forward("write_cached", sector_start, buffers)

    def flush(self) -> Awaitable[None]:
        """Forward ``flush``."""
        return self._forward("flush")

    def discard(self, sector_start: int, sectors: int) -> Awaitable[None]:
        """Forward ``discard``."""
        return self._forward("discard", sector_start, sectors)

    def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> Awaitable[None]:
        """Forward ``write_zeroes``."""
        return self._forward("write_zeroes", sector_start, sectors, unmap)

    def secure_erase(self, sector_start: int, sectors: int) -> Awaitable[None]:
        """Forward ``secure_erase``."""
        return self._forward("secure_erase", sector_start, sectors)

    def zoning(self) -> Zoning:
        """That of the block below.  Raises: Unimplemented."""
        zoning: Zoning = self._method("zoning")()
        return zoning

    def report_zones(self, sector_start: int, count: int) -> Awaitable[Sequence[Zone]]:
        """Forward ``report_zones``."""
        return self._forward("report_zones", sector_start, count)

    def open_zone(self, sector_start: int) -> Awaitable[None]:
        """Forward ``open_zone``."""
        return self._forward("open_zone", sector_start)

    def close_zone(self, sector_start: int) -> Awaitable[None]:
        """Forward ``close_zone``."""
        return self._forward("close_zone", sector_start)

    def finish_zone(self, sector_start: int) -> Awaitable[None]:
        """Forward ``finish_zone``."""
        return self._forward("finish_zone", sector_start)

    def reset_zone(self, sector_start: int) -> Awaitable[None]:
        """Forward ``reset_zone``."""
        return self._forward("reset_zone", sector_start)

    def reset_all_zones(self) -> Awaitable[None]:
        """Forward ``reset_all_zones``."""
        return self._forward("reset_all_zones")

    def append(self, sector_start: int, buffers: Buffers) -> Awaitable[int]:
        """Forward ``append``."""
        return self._forward("append", sector_start, buffers)

    def lifetime(self) -> Awaitable[Lifetime]:
        """Forward ``lifetime``."""
        return self._forward("lifetime")

    def identify(self) -> str:
        """The serial of the block below.  Raises: Unimplemented."""
        return str(self._method("identify")())

    def native(self) -> Native | None:
        """None: what changes a disk must be called.  A filter that changes no read or write gives the disk's own."""
        return None

    def _native_below(self) -> Native | None:
        return self.block.native() if isinstance(self.block, SupportsNative) else None

    def on_resize(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called when the block below grows.  Raises: Unimplemented."""
        self._method("on_resize")(changed)

    def disconnect(self) -> Awaitable[None]:
        """Forward ``disconnect``."""
        return self._forward("disconnect")

    def _method(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] | None = getattr(self.block, name, None)
        if method is None:
            raise Unimplemented(f"this disk has no {name}()")
        return method

    async def _forward(self, name: str, *arguments: object) -> Any:
        result = self._method(name)(*arguments)
        return await result if inspect.isawaitable(result) else result
