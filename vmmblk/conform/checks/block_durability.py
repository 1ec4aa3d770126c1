"""Block device: what must still be there after the power was cut, by --power-cut-command."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from vmmblk.conform.check import NotTestable, check, expect
from vmmblk.conform.ranges import WRITE_ZEROES, erasers, segments
from vmmblk.conform.requests import ask, expect_answer, expect_data, pattern
from vmmblk.spec import SECTOR_SIZE, BlkConfig, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_FLUSH, _WCE, _MQ = Feature.BLK_FLUSH, Feature.BLK_CONFIG_WCE, Feature.BLK_MQ
_BLOCKS = 8


@check(_FLUSH)
def writes_without_flush_are_durable(target: Target) -> None:
    """With neither FLUSH nor CONFIG_WCE negotiated a completed write is durable (BLK-065)."""
    _expect_durable(target, _write, target.mask(without=(_FLUSH, _WCE)))


@check(_WCE)
def writes_through_are_durable(target: Target) -> None:
    """With writeback 0 a completed write is durable (BLK-066)."""

    def write_through(driver: VirtioBlk) -> bytes:
        _switch(driver, writeback=False)
        return _write(driver)

    _expect_durable(target, write_through)


@check(_WCE)
def writeback_tells_the_truth(target: Target) -> None:
    """Where the driver leaves writeback as it is, and it reads 0, a completed write is durable (BLK-027)."""

    def write(driver: VirtioBlk) -> bytes:
        if driver.config(BlkConfig.WRITEBACK):
            raise NotTestable("writeback starts as 1")
        return _write(driver)

    _expect_durable(target, write, target.mask(without=(_FLUSH,)))


@check(_FLUSH)
def flush_makes_durable(target: Target) -> None:
    """When a FLUSH completes, every write that had completed before it is durable (BLK-067)."""

    def write_and_flush(driver: VirtioBlk) -> bytes:
        data = _write(driver)
        driver.flush()
        return data

    _expect_durable(target, write_and_flush)


@check(_FLUSH, _WCE)
def flush_makes_durable_after_a_switch(target: Target) -> None:
    """With writeback switched to 1 a FLUSH makes durable every write that had completed before it (BLK-067, 028)."""

    def switch_write_and_flush(driver: VirtioBlk) -> bytes:
        _switch(driver, writeback=True)
        data = _write(driver)
        driver.flush()
        return data

    _expect_durable(target, switch_write_and_flush)


@check(_FLUSH, _MQ)
def flush_covers_every_queue(target: Target) -> None:
    """A FLUSH on one queue makes durable what others wrote before (BLK-072)."""

    def write_and_flush(driver: VirtioBlk) -> bytes:
        data = _write(driver, queue=1)
        driver.call(RequestType.FLUSH, queue=0)
        return data

    target.require_queues(2)
    _expect_durable(target, write_and_flush, queues=2)


@check(Feature.BLK_WRITE_ZEROES, _FLUSH)
def zeroes_are_as_durable_as_writes(target: Target) -> None:
    """With neither FLUSH nor CONFIG_WCE negotiated completed WRITE_ZEROES is durable (BLK-096)."""
    _expect_durable(target, lambda driver: _zero(target, driver), target.mask(without=(_FLUSH, _WCE)))


@check(Feature.BLK_WRITE_ZEROES, _FLUSH)
def flush_makes_zeroes_durable(target: Target) -> None:
    """When a FLUSH completes, WRITE_ZEROES that had completed before it is durable (BLK-096)."""

    def zero_and_flush(driver: VirtioBlk) -> bytes:
        data = _zero(target, driver)
        driver.flush()
        return data

    _expect_durable(target, zero_and_flush)


@check(_WCE)
def flush_that_was_not_negotiated(target: Target) -> None:
    """FLUSH without FLUSH negotiated is never a false OK, with writeback 1 either (HOSTILE-165)."""

    def write_and_flush(driver: VirtioBlk) -> bytes:
        _switch(driver, writeback=True)
        data = _write(driver)
        answer = ask(driver, RequestType.FLUSH)
        if answer.outcome == Status.UNSUPP:
            raise NotTestable("the device does not flush then: UNSUPP, as it may")
        expect_answer(answer, "FLUSH, not negotiated", Status.OK)
        return data

    _expect_durable(target, write_and_flush, target.mask(without=(_FLUSH,)))


@check(_WCE)
def writes_across_a_switch_complete(target: Target) -> None:
    """A write in flight while writeback is switched completes, durable or not (BLK-068)."""
    size = target.facts.block_size
    target.room(target.block_sectors)
    with target.driver() as driver:
        first = driver.config(BlkConfig.WRITEBACK)
        for value in (1, 0, 1, 0, first):
            data = pattern(size, f"across a switch to {value}")
            pending = driver.submit(RequestType.OUT, 0, data)
            driver.kick()
            driver.device.set_config(BlkConfig.WRITEBACK, value)
            expect(driver.wait(pending).status == Status.OK, f"a write across a switch to {value}: {pending.status}")
            expect_data(driver, 0, data, f"written across a switch to {value}")


def _switch(driver: VirtioBlk, *, writeback: bool) -> None:
    if not driver.has(_WCE):
        raise NotTestable("CONFIG_WCE was not negotiated")
    driver.writeback = writeback
    expect(driver.writeback is writeback, f"writeback reads {driver.writeback}, {writeback} was written")


def _write(driver: VirtioBlk, queue: int = 0) -> bytes:
    """Write each of the first blocks by itself, with what was never there before; what they hold afterwards."""
    size, stamp = driver.block_size, secrets.token_hex(8)
    datas = [pattern(size, f"{stamp} {number}") for number in range(_BLOCKS)]
    for number, data in enumerate(datas):
        driver.call(RequestType.OUT, number * size // SECTOR_SIZE, data, queue=queue)
    return b"".join(datas)


def _zero(target: Target, driver: VirtioBlk) -> bytes:
    """Write the first blocks, and zero one half of them; what they hold afterwards."""
    (eraser,) = erasers(target, driver, WRITE_ZEROES, units=_BLOCKS)
    data = _write(driver)
    half = len(data) // 2
    driver.call(RequestType.WRITE_ZEROES, 0, segments((0, _BLOCKS // 2 * eraser.unit)))
    return bytes(half) + data[half:]


def _expect_durable(
    target: Target, act: Callable[[VirtioBlk], bytes], features: int | None = None, queues: int = 1
) -> None:
    """What ``act`` says that the disk holds from sector 0 on must be there after a power cut."""
    target.room(target.block_sectors * _BLOCKS)
    with target.driver(features=target.mask() if features is None else features, queues=queues) as driver:
        data = act(driver)
        target.cut_power()
    with target.driver() as driver:
        expect_data(driver, 0, data, "after the power was cut")
