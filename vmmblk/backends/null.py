"""A disk that keeps nothing: reads give zeroes, writes vanish.  For measuring everything but the disk."""

from __future__ import annotations

from vmmblk.block import Block, BlockInfo, Buffers, Native, Operation, Substance

__all__ = ["Null"]


class Null(Block):
    """``size_sectors`` sectors of ``sector_size`` bytes that are always zero."""

    def __init__(self, size_sectors: int, *, sector_size: int = 512) -> None:
        self.info = BlockInfo(read_write=True, sector_size=sector_size, size_sectors=size_sectors)

    async def read(self, sector_start: int, buffers: Buffers) -> None:  # noqa: ARG002
        """Zero the buffers."""
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Do nothing."""

    def native(self) -> Native | None:
        """Nothing; a subclass must be called."""
        if type(self) is not Null:
            return None
        return Native(Substance.NOTHING, operations=Operation.DISCARD | Operation.WRITE_ZEROES)

    async def discard(self, sector_start: int, sectors: int) -> None:
        """Do nothing."""

    async def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
        """Do nothing."""
