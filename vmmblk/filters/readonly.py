"""A disk that cannot be written, whatever is below."""

# ruff: noqa: ARG002 - a refusal looks at nothing it is given

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vmmblk.block import BlockInfo, Buffers, Native, Operation, Zone
from vmmblk.errors import IsReadOnly
from vmmblk.filters.base import Filter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

__all__ = ["ReadOnly"]

_CHANGES = Operation.FLUSH | Operation.DISCARD | Operation.WRITE_ZEROES | Operation.SECURE_ERASE


class ReadOnly(Filter):
    """Refuses everything that would change the block below with IsReadOnly, and says so in ``info``."""

    @property
    def info(self) -> BlockInfo:  # type: ignore[override]
        """That of the block below, but read-only."""
        return replace(self.block.info, read_write=False)

    @property
    def operations(self) -> Operation:
        """Those of the block below that change nothing."""
        return super().operations & ~_CHANGES

    def read(self, sector_start: int, buffers: Buffers) -> Awaitable[None]:
        """Forward ``read``: nothing about it changes."""
        return super().read(sector_start, buffers)

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    async def write_cached(self, sector_start: int, buffers: Buffers) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    def native(self) -> Native | None:
        """That of the block below: an engine is told not to write it, in ``info``."""
        return self._native_below()

    async def discard(self, sector_start: int, sectors: int) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    async def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    async def secure_erase(self, sector_start: int, sectors: int) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    def report_zones(self, sector_start: int, count: int) -> Awaitable[Sequence[Zone]]:
        """Forward ``report_zones``: nothing about it changes."""
        return super().report_zones(sector_start, count)

    async def open_zone(self, sector_start: int) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    async def close_zone(self, sector_start: int) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    async def finish_zone(self, sector_start: int) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    async def reset_zone(self, sector_start: int) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    async def reset_all_zones(self) -> None:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()

    async def append(self, sector_start: int, buffers: Buffers) -> int:
        """Refuse.  Raises: IsReadOnly."""
        raise _refusal()


def _refusal() -> IsReadOnly:
    return IsReadOnly("this disk is read-only")
