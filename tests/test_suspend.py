"""Suspending the device ("Device Suspend"): the registers by themselves, and a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from conftest import on_both_engines, until
from disks import Disk, FullDisk
from registers import ACKNOWLEDGED, LIVE, NEGOTIATED, Driver, a_config

from vmmblk.client.driver import attach
from vmmblk.client.memory import GuestMemory
from vmmblk.device import ConfigInterrupt, Notify, Reset, Resume, StopQueues, Suspend
from vmmblk.spec import (
    BLK_CONFIG_SIZE,
    COMMON_CFG_SIZE,
    BlkConfig,
    CommonCfg,
    DeviceStatus,
    Feature,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Served

    from vmmblk.client.driver import VirtioBlk

    Serve = Callable[..., Served]

SUSPEND = DeviceStatus.SUSPEND
SUSPENDED = LIVE & ~DeviceStatus.DRIVER_OK | SUSPEND
ON = {"suspend": True}


def a_driver() -> Driver:
    """A driver of a device that offers SUSPEND."""
    return Driver(a_config(features=a_config().features | Feature.SUSPEND.mask))


def live() -> Driver:
    """A driver whose device runs."""
    driver = a_driver()
    driver.go_live()
    return driver


def suspended() -> Driver:
    """A driver whose device is suspended."""
    driver = live()
    driver.write_status(LIVE | SUSPEND)
    driver.device.suspend_done()
    return driver


# Registers.


def test_suspending_takes_until_everything_is_drained() -> None:
    """SUSPEND-001, 003..006: asked for by status bit 16, which is shown, without DRIVER_OK, once it is done."""
    driver = live()
    assert driver.write_status(LIVE | SUSPEND) == [Suspend()]
    assert driver.status == LIVE
    assert driver.write_status(LIVE | SUSPEND) == []
    driver.device.suspend_done()
    assert driver.status == SUSPENDED
    assert driver.write_status(SUSPENDED) == []
    assert driver.device.doorbell(0) == []


def test_suspend_without_its_feature_is_ignored() -> None:
    """HOSTILE-098, RSVD-020: not negotiated, the bit is not there."""
    driver = a_driver()
    driver.go_live(driver.device.config.features & ~Feature.SUSPEND.mask)
    assert driver.write_status(LIVE | SUSPEND) == []
    driver.device.suspend_done()
    assert driver.status == LIVE
    assert driver.device.doorbell(0) == [Notify(0)]


@pytest.mark.parametrize("before", [1, ACKNOWLEDGED, NEGOTIATED])
def test_suspend_before_driver_ok_is_ignored(before: int) -> None:
    """SUSPEND-002, HOSTILE-099: also in the very write that sets DRIVER_OK."""
    driver = a_driver()
    if before == NEGOTIATED:
        driver.negotiate()
    else:
        driver.status = 1
        driver.status = before
    assert Suspend() not in driver.write_status(before | SUSPEND)
    driver.device.suspend_done()
    assert driver.status == before
    assert Suspend() not in driver.write_status(LIVE | SUSPEND)
    assert not driver.status & SUSPEND


def test_a_broken_device_is_not_suspended() -> None:
    """SUSPEND-003: what needs a reset says so and shows no SUSPEND, also when that is found while draining."""
    driver = live()
    driver.write_status(LIVE | SUSPEND)
    assert driver.device.needs_reset() == [StopQueues(), ConfigInterrupt()]
    driver.device.suspend_done()
    assert driver.status == LIVE | DeviceStatus.NEEDS_RESET
    assert driver.write_status(LIVE | SUSPEND) == []


def test_a_suspended_device_ignores_writes() -> None:
    """SUSPEND-010, 011, HOSTILE-138: no byte of the registers changes, device_status excepted."""
    driver = suspended()
    driver.device.common_read(0, COMMON_CFG_SIZE)
    before = driver.device.common_read(0, COMMON_CFG_SIZE), driver.device.config_read(0, BLK_CONFIG_SIZE)
    for offset in range(COMMON_CFG_SIZE):
        for width in (1, 2, 4, 8):
            if not offset <= CommonCfg.DEVICE_STATUS < offset + width:
                assert driver.device.common_write(offset, b"\1" * width) == []
    for value in (0, 1):
        assert driver.device.config_write(BlkConfig.WRITEBACK, bytes([value])) == []
    assert (driver.device.common_read(0, COMMON_CFG_SIZE), driver.device.config_read(0, BLK_CONFIG_SIZE)) == before


def test_growing_while_suspended_is_told_on_resume() -> None:
    """SUSPEND-010, 012, 013: neither configuration nor generation changes, nobody is told, until DRIVER_OK."""
    driver = suspended()
    generation = driver.read(CommonCfg.CONFIG_GENERATION)
    assert driver.device.set_capacity(4096) == []
    assert driver.config(BlkConfig.CAPACITY, 8) == 2048
    assert driver.read(CommonCfg.CONFIG_GENERATION) == generation
    assert driver.write_status(LIVE) == [Resume(), ConfigInterrupt()]
    assert driver.config(BlkConfig.CAPACITY, 8) == 4096
    assert driver.read(CommonCfg.CONFIG_GENERATION) != generation


@pytest.mark.parametrize("value", [LIVE, LIVE | SUSPEND])
def test_driver_ok_resumes(value: int) -> None:
    """SUSPEND-014, 015: SUSPEND is gone, DRIVER_OK is back, queues and features are what they were."""
    driver = suspended()
    negotiated = driver.device.negotiated
    assert driver.write_status(value) == [Resume()]
    assert driver.status == LIVE
    assert driver.device.negotiated == negotiated
    assert driver.device.doorbell(0) == [Notify(0)]
    assert driver.write_status(LIVE | SUSPEND) == [Suspend()]


@pytest.mark.parametrize("done", [False, True])
def test_reset_while_suspending_or_suspended(done: bool) -> None:
    """HOSTILE-139: an ordinary reset, after which everything works; a capacity that grew meanwhile is shown."""
    driver = suspended() if done else live()
    driver.write_status(LIVE | SUSPEND if not done else SUSPENDED)
    driver.device.set_capacity(4096)
    assert driver.write_status(0) == [Reset()]
    driver.device.suspend_done()
    driver.device.reset_done()
    assert driver.status == 0
    assert driver.config(BlkConfig.CAPACITY, 8) == 4096
    driver.go_live()
    assert driver.status == LIVE


def test_failed_is_shown_while_suspended() -> None:
    """STAT-012: FAILED stays visible, and is no reason to resume."""
    driver = suspended()
    assert driver.write_status(SUSPENDED | DeviceStatus.FAILED) == []
    assert driver.status == SUSPENDED | DeviceStatus.FAILED


# A running server.


def rings(v: VirtioBlk) -> list[bytes]:
    """The device's part of each ring, as it is in memory."""
    return [v.memory.read(queue.used, 6 + 8 * queue.size) for queue in v.queues]


def test_requests_in_progress_are_used_before_suspend_is_shown(serve: Serve) -> None:
    """SUSPEND-005 to 007: no more is taken, what was taken ends and is told, and only then status says so."""
    disk = Disk()
    served = serve(disk, queues=2, features=ON)
    with attach(served.path, queues=2) as v:
        disk.held = {"read"}
        held = [v.submit(RequestType.IN, 0, data_in=512, queue=queue) for queue in range(2)]
        for queue in range(2):
            v.queues[queue].arm()
            v.kick(queue)
        disk.wait_for("read", 2)
        v.device.status |= DeviceStatus.SUSPEND
        assert v.status == LIVE  # the write has arrived
        late = v.submit(RequestType.OUT, 8, b"x" * 512)
        v.kick(force=True)
        served.settle()
        assert v.status == LIVE
        disk.release()
        until(lambda: v.device.suspended)
        for queue in range(2):
            assert v.queues[queue].used_idx == 1
            assert v.take_interrupts(queue) == 1
        assert disk.count("write") == 0
        v.device.resume()
        v.wait_all([*held, late])
        assert [each.status for each in (*held, late)] == [Status.OK] * 3


@on_both_engines
def test_a_suspended_device_touches_and_tells_nothing(serve: Serve) -> None:
    """SUSPEND-008, 009, HOSTILE-137: rings stay as they are, no interrupt, until it is resumed, without a doorbell."""
    disk = FullDisk()
    served = serve(disk, queues=2, features=ON)
    with attach(served.path, queues=2) as v:
        v.write(0, b"a" * 512)
        v.device.suspend()
        assert v.status == SUSPENDED
        before = rings(v)
        for queue in range(2):
            v.take_interrupts(queue)
            v.queues[queue].arm()
        v.lines.take(v.lines.config_line)
        waiting = [v.submit(RequestType.OUT, 8 + queue, b"b" * 512, queue=queue) for queue in range(2)]
        for queue in range(2):
            v.kick(queue, force=True)
        disk.grow(4096)
        assert v.status == SUSPENDED
        served.settle()
        assert v.capacity == 2048
        assert rings(v) == before
        assert [v.take_interrupts(queue) for queue in range(2)] == [0, 0]
        assert v.lines.take(v.lines.config_line) == 0
        assert disk.data[8 * 512 : 10 * 512] == bytes(1024)
        v.device.resume()
        assert v.status == LIVE
        v.wait_all(waiting)
        v.wait_config_change()
        assert v.capacity == 4096


@on_both_engines
def test_memory_may_move_while_suspended(serve: Serve) -> None:
    """Guest memory is taken away and given back meanwhile: the device stays suspended, then goes on."""
    with GuestMemory() as memory, attach(serve(features=ON).path, memory=memory) as v:
        v.write(0, b"a" * 512)
        v.device.suspend()
        memory.unmap_all(v.connection)
        assert v.status == SUSPENDED
        memory.map_all(v.connection)
        assert v.status == SUSPENDED
        v.device.resume()
        assert v.read(0, 512) == b"a" * 512


@pytest.mark.parametrize("how", ["status", "function"])
def test_resets_end_a_suspension(serve: Serve, how: str) -> None:
    """HOSTILE-139, SUSPEND-003: a reset of either kind while suspended, or suspending, and the device serves again."""
    disk = Disk()
    with attach(serve(disk, features=ON).path) as v:
        for suspending in (False, True):
            if suspending:
                disk.held, reads = {"read"}, disk.count("read")
                v.submit(RequestType.IN, 0, data_in=512)
                v.kick()
                disk.wait_for("read", reads + 1)
                v.device.status |= DeviceStatus.SUSPEND
                assert v.status == LIVE
                disk.release()
            else:
                v.device.suspend()
            if how == "function":
                v.connection.device_reset()
                v.forget()
            v.init()
            v.write(0, b"a" * 512)
            assert v.read(0, 512) == b"a" * 512


@on_both_engines
def test_suspended_again_and_again(serve: Serve) -> None:
    """A hundred rounds with traffic on two queues lose nothing."""
    with attach(serve(queues=2, features=ON).path, queues=2) as v:
        for round_ in range(100):
            pendings = [v.submit(RequestType.OUT, round_, bytes([round_]) * 512, queue=queue) for queue in range(2)]
            for queue in range(2):
                v.kick(queue)
            v.device.suspend()
            v.device.resume()
            v.wait_all(pendings)
            assert v.read(round_, 512) == bytes([round_]) * 512
