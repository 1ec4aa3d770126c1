"""Requests with ranges - DISCARD, WRITE_ZEROES, SECURE_ERASE - as far as a device has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk.conform.check import NotOffered, NotTestable
from vmmblk.conform.requests import field
from vmmblk.conform.target import SCRATCH_SECTORS
from vmmblk.spec import DISCARD_SEGMENT, BlkConfig, Feature, RequestType

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

__all__ = ["DISCARD", "KINDS", "SECURE_ERASE", "WRITE_ZEROES", "Eraser", "Kind", "erasers", "segments"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A request with ranges: its type and feature, and where its limits are told."""

    type: RequestType
    feature: Feature
    max_sectors: BlkConfig
    max_seg: BlkConfig
    alignment: BlkConfig | None


DISCARD = Kind(
    RequestType.DISCARD,
    Feature.BLK_DISCARD,
    BlkConfig.MAX_DISCARD_SECTORS,
    BlkConfig.MAX_DISCARD_SEG,
    BlkConfig.DISCARD_SECTOR_ALIGNMENT,
)
WRITE_ZEROES = Kind(
    RequestType.WRITE_ZEROES,
    Feature.BLK_WRITE_ZEROES,
    BlkConfig.MAX_WRITE_ZEROES_SECTORS,
    BlkConfig.MAX_WRITE_ZEROES_SEG,
    None,
)
SECURE_ERASE = Kind(
    RequestType.SECURE_ERASE,
    Feature.BLK_SECURE_ERASE,
    BlkConfig.MAX_SECURE_ERASE_SECTORS,
    BlkConfig.MAX_SECURE_ERASE_SEG,
    BlkConfig.SECURE_ERASE_SECTOR_ALIGNMENT,
)
KINDS = (DISCARD, WRITE_ZEROES, SECURE_ERASE)


@dataclass(frozen=True, slots=True)
class Eraser:
    """What a device allows of one request with ranges; sectors are of 512 bytes."""

    type: RequestType
    unit: int
    """Sectors: ranges of whole units are whole blocks, and as aligned as the device wants them."""
    max_sectors: int
    max_seg: int
    last: int
    """The sector where the last whole unit of the disk begins."""

    @property
    def name(self) -> str:
        """The name of the request."""
        return self.type.name


def erasers(target: Target, driver: VirtioBlk, *kinds: Kind, units: int = 4) -> list[Eraser]:
    """Which of ``kinds`` (default: all) the driver can use on ``units`` units of the disk, from sector 0 on.

    Raises NotOffered, NotTestable if none.
    """
    target.room(target.block_sectors)
    offered = [kind for kind in kinds or KINDS if driver.has(kind.feature)]
    if not offered:
        raise NotOffered(f"{', '.join(kind.feature.name for kind in kinds or KINDS)}: none is offered")
    found = []
    for kind in offered:
        alignment = 1 if kind.alignment is None else max(1, field(driver, kind.alignment))
        unit = math.lcm(target.block_sectors, alignment)
        max_sectors, max_seg = field(driver, kind.max_sectors), field(driver, kind.max_seg)
        found.append(Eraser(kind.type, unit, max_sectors, max_seg, driver.capacity // unit * unit - unit))
    room = min(target.facts.capacity, SCRATCH_SECTORS)
    usable = [each for each in found if each.unit * units <= room and each.max_sectors >= each.unit and each.max_seg]
    if not usable:
        raise NotTestable(f"ranges of {found[0].unit} sectors, of which {units} are needed, on {room} that may be used")
    return usable


def segments(*each: tuple[int, int], flags: int = 0) -> bytes:
    """The data of a request with ranges, each (sector, number of sectors), all with the same ``flags``."""
    return b"".join(DISCARD_SEGMENT.pack(sector, sectors, flags) for sector, sectors in each)
