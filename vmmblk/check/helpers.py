"""What the checks share: data, and sentences that a disk may break."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from vmmblk.errors import BlockError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vmmblk.filters.checked import Checked

__all__ = ["CheckFailed", "filled", "must_fail", "pattern", "read", "require"]


class CheckFailed(AssertionError):
    """A disk breaks the contract; the message says which sentence."""


def pattern(disk: Checked, sectors: int, seed: int) -> memoryview:
    """Bytes in which every sector, and every seed, is different."""
    size = disk.info.sector_size
    whole = b"".join((seed * 1000 + sector).to_bytes(8, "big") * (size // 8) for sector in range(1, sectors + 1))
    return _aligned(whole)


def filled(disk: Checked, sectors: int, byte: int) -> memoryview:
    """Sectors full of a byte."""
    return _aligned(bytes([byte]) * (sectors * disk.info.sector_size))


def _aligned(data: bytes) -> memoryview:
    """Memory of its own that holds ``data``, aligned to pages as disks with direct I/O want it."""
    view = memoryview(mmap.mmap(-1, max(len(data), 1)))[: len(data)]
    view[:] = data
    return view


async def read(disk: Checked, sector_start: int, sectors: int) -> bytes:
    """Sectors of the disk."""
    target = filled(disk, sectors, 0xEE)
    await disk.read(sector_start, [target])
    return bytes(target)


async def must_fail(call: Awaitable[object], error: type[BlockError] | tuple[type[BlockError], ...], what: str) -> None:
    """Raises CheckFailed unless awaiting ``call`` raises ``error``, or one of several."""
    kinds = error if isinstance(error, tuple) else (error,)
    names = " or ".join(kind.__name__ for kind in kinds)
    try:
        await call
    except kinds:
        return
    except (BlockError, OSError) as exc:
        raise CheckFailed(f"{what} fails with {names}, not with {type(exc).__name__}") from exc
    raise CheckFailed(f"{what} fails with {names}; here it succeeded")


def require(condition: bool, sentence: str) -> None:
    """Raises CheckFailed with the sentence unless the condition holds."""
    if not condition:
        raise CheckFailed(f"broken: {sentence}")
