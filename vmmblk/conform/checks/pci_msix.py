"""MSI-X: its table, and which event raises which vector."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from vmmblk.client.interrupts import Interrupts
from vmmblk.client.pci import PciDevice
from vmmblk.client.wire import IrqIndex
from vmmblk.conform.check import NotOffered, check, expect
from vmmblk.conform.function import (
    bars,
    bring_up,
    change_config,
    eventfds,
    expect_signal,
    fired,
    msix_ranges,
    negotiate,
    plain,
    queue_count,
    require_msix,
    ring,
    submit,
    vector_fields,
)
from vmmblk.spec import NO_VECTOR, CommonCfg

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_VECTORS_LIMIT = 0x800
_TRIED = 16  # vectors, and events, that are tried at most, beside the last
_QUEUES = 4


@contextlib.contextmanager
def _by_vectors(target: Target) -> Iterator[VirtioBlk]:
    """A driver with MSI-X enabled that uses no vector yet, and is not up.  Raises NotOffered without MSI-X."""
    with target.connection() as connection:
        require_msix(PciDevice(connection))
    with target.driver(start=False, interrupts=Interrupts.POLL) as driver:
        yield driver


def _vectors(driver: VirtioBlk) -> int:
    return require_msix(driver.pci).table_size


# The table.


@check()
def number_of_vectors(target: Target) -> None:
    """There are from 2 to 0x800 vectors (PCI-098)."""
    with _by_vectors(target) as driver:
        count = _vectors(driver)
        expect(2 <= count <= _VECTORS_LIMIT, f"there are {count} vectors")


@check()
def table_size(target: Target) -> None:
    """The table has the size that message control tells, fits into its BAR, and has as many interrupts (PCI-099)."""
    with _by_vectors(target) as driver:
        count = _vectors(driver)
        lines = driver.connection.irq_info(IrqIndex.MSIX).vectors
        expect(lines == count, f"message control tells of {count} vectors, and there are {lines} interrupts")
        exist = bars(driver.pci)
        for (bar, place), name in zip(msix_ranges(driver.pci), ("table", "array of pending bits"), strict=True):
            expect(bar in exist, f"the {name} is in BAR {bar}, which there is not")
            size = exist[bar].size
            expect(place.stop <= size, f"the {name} ends at {place.stop:#x} of BAR {bar}, which has {size:#x} bytes")
        (bar, table), (other, pending) = msix_ranges(driver.pci)
        apart = bar != other or table.stop <= pending.start or pending.stop <= table.start
        expect(apart, "the table and the pending bits share bytes")


@check()
def useful_number_of_vectors(target: Target) -> None:
    """There are no more vectors than events (PCI-100)."""
    with _by_vectors(target) as driver:
        driver.reset()
        count, events = _vectors(driver), len(vector_fields(driver))
        expect(count <= events, f"there are {count} vectors for {events} events")


# Which event has which vector.


@check()
def any_event_any_vector(target: Target) -> None:
    """Each event can be given each vector, several the same one, and reads back as given (PCI-101, PCI-103)."""
    _expect_mappings(target)


@check()
def mapping_does_not_fail(target: Target) -> None:
    """No mapping to a vector that exists is refused (PCI-105)."""
    _expect_mappings(target)


def _expect_mappings(target: Target) -> None:
    with _by_vectors(target) as driver:
        negotiate(driver, target.mask())
        count, fields = _vectors(driver), _some(driver)
        for vector in {0, count - 1, *range(min(count, _TRIED))}:
            for register, queue in fields:
                back = _give(driver, register, queue, vector)
                expect(back == vector, f"{_name(register, queue)} reads {back:#x} after {vector:#x} was written")
        shift = {field: position % count for position, field in enumerate(fields)}
        for (register, queue), vector in shift.items():
            _give(driver, register, queue, vector)
        for (register, queue), vector in shift.items():
            back = _vector(driver, register, queue)
            expect(back == vector, f"{_name(register, queue)} was {vector:#x} and reads {back:#x} after others changed")


@check()
def events_without_vector(target: Target) -> None:
    """NO_VECTOR can be written to each event, and reads back (PCI-102, PCI-103)."""
    with _by_vectors(target) as driver:
        negotiate(driver, target.mask())
        for register, queue in _some(driver):
            _give(driver, register, queue, 0)
            back = _give(driver, register, queue, NO_VECTOR)
            expect(back == NO_VECTOR, f"{_name(register, queue)} reads {back:#x} after NO_VECTOR was written")


@check()
def no_vectors_after_reset(target: Target) -> None:
    """After a reset each event reads NO_VECTOR (PCI-104)."""
    with _by_vectors(target) as driver:
        driver.reset()
        for turn in ("at first", "after a reset"):
            for register, queue in vector_fields(driver):
                vector = _vector(driver, register, queue)
                expect(vector == NO_VECTOR, f"{_name(register, queue)} reads {vector:#x} {turn}")
            negotiate(driver, target.mask())
            for register, queue in vector_fields(driver):
                _give(driver, register, queue, 0)
            driver.reset()


@check()
def impossible_vectors(target: Target) -> None:
    """A vector that is not in the table is not mapped: the field reads NO_VECTOR (PCI-106, PCI-107)."""
    with _by_vectors(target) as driver:
        negotiate(driver, target.mask())
        count = _vectors(driver)
        for register, queue in _some(driver):
            for vector in (count, count + 1, 0x7FF, 0x800, 0x7FFF, 0x8000, 0xFFFE):
                if vector >= count:
                    _give(driver, register, queue, 0)
                    back = _give(driver, register, queue, vector)
                    said = f"there are {count} vectors, and {_name(register, queue)} reads {back:#x}"
                    expect(back == NO_VECTOR, f"{said} after {vector:#x} was written")


def _some(driver: VirtioBlk) -> list[tuple[CommonCfg, int]]:
    fields = vector_fields(driver)
    return fields if len(fields) <= _TRIED else [*fields[:_TRIED], fields[-1]]


def _give(driver: VirtioBlk, register: CommonCfg, queue: int, vector: int) -> int:
    """Write a vector, and return what reads back."""
    driver.device.set(CommonCfg.QUEUE_SELECT, queue)
    driver.device.set(register, vector)
    return driver.device.get(register)


def _vector(driver: VirtioBlk, register: CommonCfg, queue: int) -> int:
    driver.device.set(CommonCfg.QUEUE_SELECT, queue)
    return driver.device.get(register)


def _name(register: CommonCfg, queue: int) -> str:
    return "config_msix_vector" if register is CommonCfg.CONFIG_MSIX_VECTOR else f"queue_msix_vector of queue {queue}"


# Interrupts.


@check()
def used_buffers_raise_their_vector(target: Target) -> None:
    """A used buffer raises the vector of its queue and no other, whichever it is (PCI-108)."""
    with _by_vectors(target) as driver:
        queues = min(queue_count(target), _QUEUES)
        with eventfds(driver.connection) as lines:
            for shift in range(min(len(lines), _QUEUES)):
                vectors = [(queue + shift) % len(lines) for queue in range(queues)]
                bring_up(driver, plain(target), vectors, NO_VECTOR)
                for queue, vector in enumerate(vectors):
                    _use(target, driver, queue)
                    missing = f"vector {vector} of queue {queue} is not raised for a used buffer"
                    expect_signal(lines[vector], target.options.timeout, missing)
                    others = [other for other, line in enumerate(lines) if fired(line)]
                    expect(not others, f"vectors {others} are raised for queue {queue}, which has vector {vector}")


@check()
def one_vector_for_all(target: Target) -> None:
    """Every event on one vector: it is raised for each queue, and for a configuration change (PCI-101)."""
    with _by_vectors(target) as driver, eventfds(driver.connection) as lines:
        bring_up(driver, plain(target), [0] * min(queue_count(target), _QUEUES), 0)
        for queue in range(len(driver.queues)):
            _use(target, driver, queue)
            expect_signal(lines[0], target.options.timeout, f"vector 0 of all is not raised for queue {queue}")
        change_config(target, driver)
        expect_signal(lines[0], target.options.timeout, "vector 0 of all is not raised for a configuration change")


@check()
def used_buffers_without_vector(target: Target) -> None:
    """A queue with NO_VECTOR raises nothing (PCI-109)."""
    with _by_vectors(target) as driver, eventfds(driver.connection) as lines:
        bring_up(driver, plain(target), [NO_VECTOR], 0)
        _use(target, driver)
        driver.device.reset()  # which is over when the device has done whatever it does
        raised = [vector for vector, line in enumerate(lines) if fired(line)]
        expect(not raised, f"vectors {raised} are raised for a queue with NO_VECTOR")


@check()
def configuration_changes_raise_their_vector(target: Target) -> None:
    """A configuration change raises the vector of config_msix_vector (PCI-110)."""
    with _by_vectors(target) as driver, eventfds(driver.connection) as lines:
        vector = len(lines) - 1
        bring_up(driver, plain(target), [0 if vector else NO_VECTOR], vector)
        change_config(target, driver)
        missing = f"vector {vector} is not raised for a configuration change"
        expect_signal(lines[vector], target.options.timeout, missing)


@check()
def configuration_changes_without_vector(target: Target) -> None:
    """With NO_VECTOR in config_msix_vector a configuration change raises nothing (PCI-111)."""
    with _by_vectors(target) as driver, eventfds(driver.connection) as lines:
        bring_up(driver, plain(target), [NO_VECTOR], NO_VECTOR)
        change_config(target, driver)
        driver.device.reset()
        raised = [vector for vector, line in enumerate(lines) if fired(line)]
        expect(not raised, f"vectors {raised} are raised for a configuration change without vector")


@check()
def enable_chooses(target: Target) -> None:
    """MSI-X enable decides whether a used buffer raises a vector or INTx, live or not (PCI-108, PCI-112)."""
    with _by_vectors(target) as driver:
        if not driver.connection.irq_info(IrqIndex.INTX).vectors:
            raise NotOffered("the device has no INTx")
        bring_up(driver, plain(target), [0], NO_VECTOR)
        for enabled in (False, True, False, True):
            kind, name = (IrqIndex.MSIX, "its vector") if enabled else (IrqIndex.INTX, "INTx")
            driver.pci.enable_msix(enabled)
            with eventfds(driver.connection, kind) as lines:  # one kind at a time, as VFIO has it
                _use(target, driver)
                expect_signal(lines[0], target.options.timeout, f"{name} is not raised for a used buffer")
                driver.pci.isr.read(0, 1)
                driver.connection.disable_irqs(kind)


def _use(target: Target, driver: VirtioBlk, queue: int = 0) -> None:
    """Have a request completed, interrupts asked for; completions are found by looking."""
    driver.queues[queue].arm()
    pending = submit(target, driver, queue)
    ring(driver, queue)
    _look(target, driver, queue)
    pending.result()


def _look(target: Target, driver: VirtioBlk, queue: int = 0) -> None:
    deadline = time.monotonic() + target.options.timeout
    while not driver.poll(queue):
        if time.monotonic() > deadline:
            raise TimeoutError("the device does not complete the request")
