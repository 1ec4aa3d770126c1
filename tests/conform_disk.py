"""A disk that can do all that a disk without zones can, and loses what is not durable when its power is cut.

``vmmblk serve ./tests/conform_disk.py size=8M control=DIR`` serves it.  What is to happen to it is told by files in the
folder DIR, which the disk removes once it has happened.  So these are the commands of ``vmmblk conform`` for it:

* ``--power-cut-command 'touch DIR/power-cut; while [ -e DIR/power-cut ]; do sleep 0.01; done'``: the cache is lost;
* ``--resize-command 'touch DIR/grow; while [ -e DIR/grow ]; do sleep 0.01; done'``: 64 blocks are added.

Neither ends if nothing serves the disk.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path  # noqa: TC003 - vmmblk serve looks at the annotations
from typing import TYPE_CHECKING

from vmmblk.block import Block, BlockInfo, Buffers, Lifetime, Topology

if TYPE_CHECKING:
    from collections.abc import Callable

_GROWTH = 64
_PAUSE = 0.002


class Disk(Block):
    """``size`` bytes in sectors of ``sector_size``, with a volatile cache; it serves as well without ``control``.

    With ``read_write=off`` it says that it is read-only, and would be written all the same.
    """

    def __init__(
        self,
        size: int = 8 << 20,
        sector_size: int = 512,
        control: Path | None = None,
        serial: str = "conform-disk",
        read_write: bool = True,
    ) -> None:
        self.info = BlockInfo(read_write=read_write, sector_size=sector_size, size_sectors=size // sector_size)
        self.topology = Topology(physical_block_size=max(4096, sector_size), discard_granularity=2 * sector_size)
        self._serial = serial
        self._lock = threading.Lock()
        self._stable = bytearray(size)
        self._data = bytearray(size)
        self._changed: Callable[[], None] | None = None
        self._ended = threading.Event()
        if control is not None:
            threading.Thread(target=self._obey, args=(control,), daemon=True).start()

    def read(self, sector_start: int, buffers: Buffers) -> None:
        """What was written last."""
        at = sector_start * self.info.sector_size
        with self._lock:
            for buffer in buffers:
                buffer[:] = self._data[at : at + len(buffer)]
                at += len(buffer)

    def write(self, sector_start: int, buffers: Buffers) -> None:
        """Durable at once."""
        start = sector_start * self.info.sector_size
        with self._lock:
            end = self._store(start, buffers)
            self._stable[start:end] = self._data[start:end]

    def write_cached(self, sector_start: int, buffers: Buffers) -> None:
        """Durable after the next flush."""
        with self._lock:
            self._store(sector_start * self.info.sector_size, buffers)

    def flush(self) -> None:
        """Make durable what is not."""
        with self._lock:
            self._stable[:] = self._data

    def discard(self, sector_start: int, sectors: int) -> None:
        """Fill with something that nobody has written."""
        self._fill(sector_start, sectors, 0xDD)

    def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:  # noqa: ARG002
        """Zero, durably."""
        self._fill(sector_start, sectors, 0)

    def secure_erase(self, sector_start: int, sectors: int) -> None:
        """Fill with something that nobody has written."""
        self._fill(sector_start, sectors, 0xEE)

    def lifetime(self) -> Lifetime:
        """Half worn."""
        return Lifetime(1, 5, 6)

    def identify(self) -> str:
        """The serial that was given."""
        return self._serial

    def on_resize(self, changed: Callable[[], None]) -> None:
        """Keep whom to tell."""
        self._changed = changed

    def disconnect(self) -> None:
        """No longer look at the control files."""
        self._ended.set()

    # The inside.

    def _store(self, at: int, buffers: Buffers) -> int:
        for buffer in buffers:
            self._data[at : at + len(buffer)] = buffer
            at += len(buffer)
        return at

    def _fill(self, sector_start: int, sectors: int, byte: int) -> None:
        size = self.info.sector_size
        start, length = sector_start * size, sectors * size
        with self._lock:
            for each in (self._data, self._stable):
                each[start : start + length] = bytes([byte]) * length

    def _obey(self, control: Path) -> None:
        orders = {control / "power-cut": self._lose, control / "grow": self._grow}
        while not self._ended.wait(_PAUSE):
            for file, order in orders.items():
                if file.exists():
                    order()
                    file.unlink()

    def _lose(self) -> None:
        with self._lock:
            self._data[:] = self._stable

    def _grow(self) -> None:
        more = bytes(_GROWTH * self.info.sector_size)
        with self._lock:
            self._data += more
            self._stable += more
        sectors = self.info.size_sectors + _GROWTH
        self.info = dataclasses.replace(self.info, size_sectors=sectors)
        if self._changed is not None:
            self._changed()
