"""Requests as checks make them, right or wrong, with an eye on what the device touches besides.

Every request made here is held against one thing whatever it is about: the device writes no byte of memory that the
chain does not give it to write.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vmmblk.client.device import CONFIG_WIDTHS
from vmmblk.client.errors import NeedsReset, QueueFull
from vmmblk.client.memory import PAGE
from vmmblk.client.queue import Descriptor, PackedQueue, Segment
from vmmblk.client.request import UNSET_STATUS, Framing
from vmmblk.conform.check import Broken, Harm, NotTestable, expect
from vmmblk.spec import SECTOR_SIZE, BlkConfig, DescFlag, Feature, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.request import Pending
    from vmmblk.conform.target import Target

__all__ = [
    "NEEDS_RESET",
    "USED0",
    "Answer",
    "ask",
    "ask_chain",
    "expect_answer",
    "expect_data",
    "expect_intact",
    "field",
    "pattern",
    "reach",
]

NEEDS_RESET = -1
"""The outcome of a request that the device does not complete: it asks for a reset instead."""
USED0 = -2
"""The outcome of a request that comes back with a used length of 0 and no status."""

_DESCRIPTOR = struct.Struct("<QIHH")


@dataclass(frozen=True, slots=True)
class Answer:
    """How a request ended: what its status byte holds, its used length, its device-writable data, and that before."""

    status: int
    written: int = 0
    data: bytes = b""
    before: bytes = b""

    @property
    def outcome(self) -> int:
        """The status, or NEEDS_RESET, or USED0."""
        return USED0 if self.status == UNSET_STATUS and self.written == 0 else self.status

    def __str__(self) -> str:
        if self.outcome == NEEDS_RESET:
            return "DEVICE_NEEDS_RESET is set"
        if self.outcome == USED0:
            return "it comes back unused"
        if self.status == UNSET_STATUS:
            return f"it comes back without a status, used length {self.written}"
        names = {status.value: status.name for status in Status}
        return f"the status is {names.get(self.status, f'{self.status:#x}')}"


def expect_answer(answer: Answer, case: str, *outcomes: int) -> None:
    """Raise Broken unless the answer to a request, told in ``case``, is one of ``outcomes``."""
    expect(answer.outcome in outcomes, f"{case}: {answer}")


def ask(
    driver: VirtioBlk,
    kind: int,
    sector: int = 0,
    data_out: bytes = b"",
    data_in: int = 0,
    *,
    framing: Framing | None = None,
    queue: int = 0,
    reserved: int = 0,
) -> Answer:
    """Make a request and wait for its end, whatever that is; the parameters are those of ``submit``.

    Raises NotTestable if it does not fit into the queue.
    """
    try:
        pending = driver.submit(kind, sector, data_out, data_in, framing=framing, queue=queue, reserved=reserved)
    except QueueFull as error:
        raise NotTestable(str(error)) from None
    memory = driver.memory
    # both runs lie in one piece of memory, which ends with a page: all of it but the writable run must stay
    start, end = pending.readable // PAGE * PAGE, pending.writable + data_in + 1
    end += -end % PAGE
    before = memory.read(start, end - start)
    driver.kick(queue)
    answer = _await(driver, pending)
    after = memory.read(start, end - start)
    given = pending.writable - start
    if after[:given] != before[:given] or after[given + data_in + 1 :] != before[given + data_in + 1 :]:
        raise Harm("the device wrote to memory that the request did not give it to write")
    return replace(answer, data=after[given : given + data_in], before=before[given : given + data_in])


def ask_chain(driver: VirtioBlk, chain: Sequence[Segment], status: int | None, *, unset: bool = True) -> Answer:
    """Offer a chain of any elements and wait for its end; ``status`` is the address of its status byte, if it has one.

    With ``unset`` false that byte is left as it is before.  Raises NotTestable if the chain does not fit the queue.
    """
    if status is not None and unset:
        driver.memory.write(status, bytes([UNSET_STATUS]))
    pending = _offer(driver, chain)
    driver.kick()
    answer = _await(driver, pending)
    if status is None or answer.outcome == NEEDS_RESET:
        return answer
    return Answer(driver.memory.read(status, 1)[0], pending.written)


def _await(driver: VirtioBlk, pending: Pending) -> Answer:
    try:
        driver.wait(pending)
    except NeedsReset:
        return Answer(NEEDS_RESET)
    return Answer(UNSET_STATUS if pending.status is None else pending.status, pending.written)


def _offer(driver: VirtioBlk, chain: Sequence[Segment]) -> Pending:
    queue = driver.queues[0]
    packed = isinstance(queue, PackedQueue)
    table = queue.room < len(chain)
    if table and not driver.has(Feature.INDIRECT_DESC):
        raise NotTestable(f"takes a queue of {len(chain)} descriptors, this one has {queue.room} of {queue.size}")
    descriptors = []
    for position, (iova, length, writable) in enumerate(chain, 1):
        flags = DescFlag.WRITE if writable else DescFlag(0)
        linked = position < len(chain) and not (table and packed)
        following = position if table else None
        descriptors.append(Descriptor(iova, length, flags | DescFlag.NEXT if linked else flags, following))
    if not table:
        return driver.submit_raw(descriptors)
    # where a split ring has flags and next, a packed one has a buffer id and flags
    raw = b"".join(
        _DESCRIPTOR.pack(address, length, *((0, flags) if packed else (flags, following or 0)))
        for address, length, flags, following in descriptors
    )
    iova = driver.memory.alloc(len(raw), _DESCRIPTOR.size)
    driver.memory.write(iova, raw)
    return driver.submit_raw([Descriptor(iova, len(raw), DescFlag.INDIRECT)])


# The disk.


def pattern(length: int, seed: str) -> bytes:
    """``length`` bytes, other ones for each ``seed``, no two sectors of them alike."""
    return hashlib.shake_128(seed.encode()).digest(length)


def reach(target: Target, sectors: int = 8) -> None:
    """Raise NotTestable unless the disk can be read anywhere and has so many sectors."""
    if target.offers(Feature.BLK_ZONED):
        raise NotTestable("the disk is zoned; point it at one that is not, too")
    if target.facts.capacity < sectors:
        raise NotTestable(f"the disk has {target.facts.capacity} sectors, this takes {sectors}")


def expect_data(driver: VirtioBlk, sector: int, data: bytes, what: str) -> None:
    """Raise Broken, with ``what`` was to be there, unless the disk holds ``data`` from ``sector`` on."""
    if found := _difference(driver, sector, data):
        raise Broken(f"{what}: {found}")


def expect_intact(driver: VirtioBlk, sector: int, data: bytes, case: str) -> None:
    """Raise Harm unless the disk still holds ``data`` from ``sector`` on, whatever the request told in ``case`` did."""
    if found := _difference(driver, sector, data):
        raise Harm(f"{case}: {found}")


def _difference(driver: VirtioBlk, sector: int, data: bytes) -> str:
    now = driver.read(sector, len(data))
    changed = [sector + i for i in range(len(data) // SECTOR_SIZE) if now[i * 512 :][:512] != data[i * 512 :][:512]]
    return f"sector {changed[0]:#x} and {len(changed) - 1} others hold something else" if changed else ""


def field(driver: VirtioBlk, which: BlkConfig) -> int:
    """A field of the configuration.  Raises NotTestable if the structure ends before it."""
    length = driver.pci.device.length
    if which + CONFIG_WIDTHS.get(which, 4) > length:
        raise NotTestable(f"the device configuration has {length} bytes, {which.name} lies beyond")
    return driver.config(which)
