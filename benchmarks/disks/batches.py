"""Memory in Python that takes whole batches."""

from collections.abc import Sequence

from vmmblk import Block, BlockInfo, Buffers, Transfer


class Batches(Block):
    """Memory, many requests at a time."""

    def __init__(self, size: int) -> None:
        self.info = BlockInfo(read_write=True, sector_size=512, size_sectors=size // 512)
        self._data = memoryview(bytearray(size))

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """From memory."""
        self._move([Transfer(write=False, cached=False, sector_start=sector_start, buffers=buffers)])

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """To memory."""
        self._move([Transfer(write=True, cached=False, sector_start=sector_start, buffers=buffers)])

    async def submit(self, batch: Sequence[Transfer]) -> None:
        """All of them, one after the other."""
        self._move(batch)

    def _move(self, batch: Sequence[Transfer]) -> None:
        data = self._data
        for transfer in batch:
            at = transfer.sector_start * 512
            for buffer in transfer.buffers:
                if transfer.write:
                    data[at : at + len(buffer)] = buffer
                else:
                    buffer[:] = data[at : at + len(buffer)]
                at += len(buffer)
