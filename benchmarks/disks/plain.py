"""Memory in Python, as a user would write it."""

from vmmblk import Block, BlockInfo, Buffers


class Plain(Block):
    """Memory, one request at a time."""

    def __init__(self, size: int) -> None:
        self.info = BlockInfo(read_write=True, sector_size=512, size_sectors=size // 512)
        self._data = memoryview(bytearray(size))

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """From memory."""
        at = sector_start * 512
        for buffer in buffers:
            buffer[:] = self._data[at : at + len(buffer)]
            at += len(buffer)

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """To memory."""
        at = sector_start * 512
        for buffer in buffers:
            self._data[at : at + len(buffer)] = buffer
            at += len(buffer)
