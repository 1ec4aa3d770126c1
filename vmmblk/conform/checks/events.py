"""Event suppression: who wants to be notified of what."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmmblk.client.interrupts import Interrupts
from vmmblk.client.wire import IrqIndex
from vmmblk.conform.bench import bench
from vmmblk.conform.check import check, expect
from vmmblk.conform.function import any_interrupts
from vmmblk.conform.traffic import UNKNOWN_TYPE, treadmill
from vmmblk.spec import Feature

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.request import Pending
    from vmmblk.conform.bench import Bench
    from vmmblk.conform.target import Target

_SHORT, _LONG = 8, 256
_INDICES = 1 << 16
_DOORBELLS = 200
_ROUNDS = 100
_REQUESTS = 8
ENABLE, DISABLE, AT_DESCRIPTOR = 0, 1, 2


# Split rings without the event index.


@check()
def interrupts_with_flags_0(target: Target) -> None:
    """While the available flags are 0, each used buffer interrupts, whatever is in used_event.

    RING-EVENT-001, 003, RING-SPLIT-023.
    """
    with bench(target, features=_without_event_idx(target)) as b:
        for event in (0, 1, 0x7FFF, 0x8000, 0xFFFF, b.split.taken + 5):
            b.split.set_used_event(event)
            _serve(b)
            expect(b.interrupted(), f"no interrupt came with flags 0 and used_event {event:#x}")


@check()
def no_interrupts_with_flags_1(target: Target) -> None:
    """While the available flags are 1, no used buffer interrupts (RING-EVENT-002)."""
    with bench(target, features=_without_event_idx(target)) as b:
        b.split.set_flags(1)
        _expect_silence(b, "with the available flags at 1")


@check()
def used_flags(target: Target) -> None:
    """Without EVENT_IDX the used flags are 0 or 1 (RING-EVENT-010)."""
    with bench(target, features=_without_event_idx(target)) as b:
        for _ in range(_ROUNDS):
            _busy(b)
            flags = b.split.used_flags
            expect(flags in (0, 1), f"the used flags are {flags:#x}")
            _collect(b)


# Split rings with the event index.


@check(Feature.EVENT_IDX)
def used_flags_with_event_idx(target: Target) -> None:
    """With EVENT_IDX the used flags stay 0 (RING-EVENT-012)."""
    with bench(target) as b:
        for _ in range(_ROUNDS):
            _busy(b)
            expect(not b.split.used_flags, f"the used flags are {b.split.used_flags:#x}")
            _collect(b)


@check(Feature.EVENT_IDX)
def interrupts_at_used_event(target: Target) -> None:
    """When the element that used_event names is used, an interrupt comes: alone, or within a batch.

    RING-EVENT-005, 008, 009.
    """
    with bench(target) as b:
        _at_used_event(b)


@check(Feature.EVENT_IDX)
def available_flags_with_event_idx(target: Target) -> None:
    """With EVENT_IDX the available flags are ignored (RING-EVENT-004, HOSTILE-038)."""
    with bench(target) as b:
        b.split.set_flags(1)
        _at_used_event(b)


@check(Feature.EVENT_IDX)
def no_interrupts_elsewhere(target: Target) -> None:
    """Elements that used_event does not name do not interrupt (RING-EVENT-006)."""
    with bench(target) as b:
        b.split.set_used_event(b.split.taken - 1)
        _expect_silence(b, "with used_event behind")
        b.split.set_used_event(b.split.taken + 1000)
        _expect_silence(b, "with used_event far ahead")


@check(Feature.EVENT_IDX)
def used_event_0(target: Target) -> None:
    """With used_event 0 the first used buffer interrupts, and the one after 65535 others (RING-EVENT-007)."""
    with bench(target, size=_LONG) as b:
        for count in treadmill(b):
            if count == b.split.size // 2:
                expect(b.interrupted(), "no interrupt came for the first used buffer")
            if count == _INDICES:
                b.fence()
                b.interrupts()
            if count > _INDICES:
                expect(b.interrupted(), "no interrupt came for used buffer 65536")
                break


# Packed rings.


@check(Feature.RING_PACKED)
def packed_flags_0(target: Target) -> None:
    """While the driver's event flags are 0, each used buffer interrupts (RING-EVENT-019, 020)."""
    for features in (target.mask(), _without_event_idx(target)):
        with bench(target, packed=True, features=features) as b:
            for event in (0, 1, 0x8000, 0xFFFF):
                b.packed.set_event_word(ENABLE, event)
                _serve(b)
                expect(b.interrupted(), f"no interrupt came with event flags 0 and event word {event:#x}")


@check(Feature.RING_PACKED)
def packed_flags_1(target: Target) -> None:
    """While the driver's event flags are 1, no used buffer interrupts (RING-EVENT-019, 020)."""
    for features in (target.mask(), _without_event_idx(target)):
        with bench(target, packed=True, features=features) as b:
            b.packed.set_event_word(DISABLE, 0)
            _expect_silence(b, "with the driver's event flags at 1")
            b.packed.set_event_word(ENABLE, 0)
            _serve(b)
            expect(b.interrupted(), "no interrupt came after the driver's event flags went back to 0")


@check(Feature.RING_PACKED, Feature.EVENT_IDX)
def packed_flags_2(target: Target) -> None:
    """An interrupt comes when the descriptor is used that the event word names, on each lap (RING-EVENT-017, 018)."""
    with bench(target, packed=True, size=_SHORT) as b:
        b.needs(6)
        for turn in range(4 * b.packed.size):
            lists = 1 + turn % 3
            where = (b.packed.position + 2 * (lists - 1)) % (2 * b.packed.size)
            b.packed.set_event(AT_DESCRIPTOR, where)
            b.interrupts()
            for _ in range(lists):
                b.packed.offer(b.parcel(UNKNOWN_TYPE).chain(), publish=False)
            b.packed.publish()
            b.kick()
            for _ in range(lists):
                b.take()
            lap = 1 if where < b.packed.size else 0
            seen = f"slot {where % b.packed.size} was used with wrap counter {lap}, and no interrupt came as asked for"
            expect(b.interrupted(), seen)


@check(Feature.RING_PACKED)
def packed_device_flags(target: Target) -> None:
    """The device's event flags are 0 or 1, or 2 with EVENT_IDX, and the bits above them 0.

    RING-EVENT-017, 021, 022.
    """
    for features in (target.mask(), _without_event_idx(target)):
        with bench(target, packed=True, features=features) as b:
            most = AT_DESCRIPTOR if b.has(Feature.EVENT_IDX) else DISABLE
            for _ in range(_ROUNDS):
                _busy(b)
                flags, _ = b.packed.device_event
                expect(flags <= most, f"the device's event flags are {flags:#x}")
                _collect(b)


# Both.


@check(each_ring=True)
def empty_doorbells(target: Target) -> None:
    """Doorbells that announce nothing new are tolerated (RING-EVENT-014)."""
    with bench(target) as b:
        for _ in range(3):
            for _ in range(_DOORBELLS):
                b.kick()
            expect(b.rings[0].take() is None, "the device used a buffer that was not offered")
            _serve(b)


@check(each_ring=True)
def doorbells_only_when_asked_for(target: Target) -> None:
    """A driver that notifies only when it is asked to is heard each time (RING-EVENT-016, RING-SPLIT-012)."""
    _in_twos(target, _look, packed=target.packed, force=False)


@check()
def split_interrupts_when_asked_for(target: Target) -> None:
    """A driver that sleeps after it has asked for an interrupt is woken each time (RING-EVENT-003, 005)."""
    _in_twos(target, _sleep, packed=False, force=True)


@check(Feature.RING_PACKED)
def packed_interrupts_when_asked_for(target: Target) -> None:
    """A driver that sleeps after it has asked for an interrupt is woken each time (RING-EVENT-024)."""
    _in_twos(target, _sleep, packed=True, force=True)


def _in_twos(target: Target, wait: Callable[[VirtioBlk, Pending], None], *, packed: bool, force: bool) -> None:
    """Two requests at a time, the second while the first is served, with the event index if offered, and without.

    The device is notified always (``force``), or only as it wants to be.
    """
    with target.connection() as connection:
        mode = any_interrupts(connection)
    ring = Feature.RING_PACKED.mask if packed else 0
    for features in (target.mask(), _without_event_idx(target)):
        with target.driver(features=features | ring, interrupts=mode) as driver:
            for _ in range(_ROUNDS):
                pending = []
                for _ in range(2):
                    pending.append(driver.submit(UNKNOWN_TYPE))
                    driver.kick(force=force)
                for each in pending:
                    wait(driver, each)


def _look(driver: VirtioBlk, pending: Pending) -> None:
    """Wait for a request by looking again and again.  Raises TimeoutError."""
    deadline = time.monotonic() + driver.timeout
    while not pending.done:
        if not driver.poll() and time.monotonic() > deadline:
            raise TimeoutError("the device does not see a request, after it was notified as it asked to be")


def _sleep(driver: VirtioBlk, pending: Pending) -> None:
    """Wait for a request as a driver does that trusts the interrupts it asks for.  Raises TimeoutError."""
    while not pending.done:
        if driver.poll() or driver.queues[0].arm():
            continue
        ready, message = driver.lines.wait(driver.connection.fileno(), driver.timeout)
        if not ready and not message:
            driver.poll()
            expect(not pending.done, "a buffer was used, and the interrupt that was asked for did not come")
            raise TimeoutError("the device does not complete the request")
        if message:
            driver.connection.pump()
        for line in ready:
            driver.lines.take(line)
        if ready and driver.lines.mode is Interrupts.INTX:
            driver.pci.isr.read(0, 1)
            driver.connection.unmask_irqs(IrqIndex.INTX)


def _without_event_idx(target: Target) -> int:
    return target.mask(without=(Feature.EVENT_IDX,))


def _at_used_event(b: Bench) -> None:
    ring = b.split
    for ahead in (0, 0, 1, 2, 3, 0):
        ring.set_used_event(ring.taken + ahead)
        b.interrupts()
        count = min(ahead + 2, ring.size // 2)  # the one that is named is not the last
        for _ in range(count):
            ring.offer(b.parcel(UNKNOWN_TYPE).chain(), publish=False)
        ring.publish()
        b.kick()
        for _ in range(count):
            b.take()
        if ahead < count:
            expect(b.interrupted(), f"{count} buffers were used, used_event named number {ahead}, no interrupt came")


def _serve(b: Bench) -> None:
    """Have the smallest of requests served."""
    b.serve(b.parcel(UNKNOWN_TYPE).chain())


def _expect_silence(b: Bench, when: str) -> None:
    """Expect no interrupt while buffers are used; but for the last one, each had until the next was used to come."""
    b.fence()
    b.interrupts()
    for _ in range(_REQUESTS):
        _serve(b)
    b.fence()
    count = b.interrupts()
    expect(not count, f"{count} interrupts came for {_REQUESTS} used buffers {when}")


def _busy(b: Bench) -> None:
    """Offer some reads at once."""
    ring = b.rings[0]
    for _ in range(min(ring.size // 2, _REQUESTS)):
        ring.offer(b.parcel(UNKNOWN_TYPE).chain(), publish=False)
    ring.publish()
    b.kick()


def _collect(b: Bench) -> None:
    """Take what ``_busy`` offered."""
    for _ in range(min(b.rings[0].size // 2, _REQUESTS)):
        b.take()
