"""A device with packed virtqueues behind the socket, as a driver that has negotiated RING_PACKED finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from conftest import on_both_engines
from disks import Disk

from vmmblk.client.driver import SUPPORTED, VirtioBlk, attach
from vmmblk.client.interrupts import Interrupts
from vmmblk.client.queue import Descriptor, PackedQueue
from vmmblk.spec import CommonCfg, DescFlag, DeviceStatus, Feature, RequestType

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Served

    Serve = Callable[..., Served]

PACKED = SUPPORTED | Feature.RING_PACKED.mask
PLAIN = PACKED & ~(Feature.EVENT_IDX.mask | Feature.INDIRECT_DESC.mask)
NEXT, WRITE, INDIRECT = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT


def exercise(v: VirtioBlk) -> None:
    """Several requests in flight, more than the ring has room for; what was written reads back."""
    assert isinstance(v.queues[0], PackedQueue)
    for sector in range(20):
        data = bytes([sector + 1]) * 1536
        v.write(sector, data)
        some = [v.submit(RequestType.IN, sector + n % 3, data_in=512) for n in range(max(1, v.queues[0].room // 3))]
        v.kick()
        v.wait_all(some)
        assert {pending.result() for pending in some} == {data[:512]}


@on_both_engines
@pytest.mark.parametrize("size", [3, 4, 7, 64, 100, 255, 256])
@pytest.mark.parametrize("features", [PACKED, PLAIN], ids=["all", "plain"])
def test_every_queue_size_works(serve: Serve, size: int, features: int) -> None:
    """RING-PACKED-002: powers of two and others, with and without event index and tables."""
    with attach(serve(queue_size=256).path, features=features, queue_size=size) as v:
        assert v.queues[0].size == size
        exercise(v)


@on_both_engines
@pytest.mark.parametrize("mode", Interrupts, ids=lambda mode: mode.name)
@pytest.mark.parametrize("indirect", [False, True])
def test_a_whole_driver_in_every_way(serve: Serve, mode: Interrupts, indirect: bool) -> None:
    """Every kind of interrupt, tables or not; a reset in between; both formats of ring one after the other.

    RSVD-006, RSVD-014.
    """
    served = serve()
    with attach(served.path, features=PACKED, interrupts=mode, indirect=indirect) as v:
        exercise(v)
        v.init()
        exercise(v)
        v.wanted = SUPPORTED
        v.init()
        v.write(3, b"s" * 512)
        assert v.read(3, 512) == b"s" * 512
        v.wanted = PACKED
        v.init()
        exercise(v)


@on_both_engines
def test_a_queue_reset_and_another_size(serve: Serve) -> None:
    """VQRST-007, RING-PACKED-005: the queue comes back at any size and place, from slot 0 and wrap counter 1."""
    with attach(serve(queue_size=256).path, features=PACKED) as v:
        exercise(v)
        for size in (5, 255, 4, 129):
            v._queue_size = size
            v.reset_queue(0)
            assert v.queues[0].size == size
            exercise(v)


@on_both_engines
def test_many_requests_in_flight_complete_out_of_order(serve: Serve) -> None:
    """RING-PACKED-010: thousands of requests, each completed once, over many laps of a ring of odd size."""
    served = serve(Disk(sectors=4096))
    with attach(served.path, features=PACKED, queue_size=101) as v:
        for turn in range(30):
            some = [v.submit(RequestType.OUT, n, bytes([turn ^ n]) * 512) for n in range(33)]
            v.kick()
            v.wait_all(some)
        for n in range(33):
            assert v.read(n, 512) == bytes([29 ^ n]) * 512


def endless(v: VirtioBlk) -> None:
    """Every slot goes on."""
    v.submit_raw([Descriptor(0, 16, NEXT)] * v.queues[0].room)


def table_with_next(v: VirtioBlk) -> None:
    """A table that goes on."""
    v.submit_raw([Descriptor(0, 32, INDIRECT | NEXT), Descriptor(0, 1, WRITE)])


def ragged_table(v: VirtioBlk) -> None:
    """A table of 17 bytes."""
    v.submit_raw([Descriptor(0, 17, INDIRECT)])


@on_both_engines
@pytest.mark.parametrize("corrupt", [endless, table_with_next, ragged_table], ids=lambda corrupt: corrupt.__name__)
def test_a_corrupt_ring_needs_a_reset(serve: Serve, corrupt: Callable[[VirtioBlk], None]) -> None:
    """HOSTILE-049, -053, -055: NEEDS_RESET and a config interrupt, and full service after the reset."""
    with attach(serve().path, features=PACKED) as v:
        exercise(v)
        v.init()
        corrupt(v)
        v.kick(force=True)
        v.wait_config_change()
        assert DeviceStatus.NEEDS_RESET in v.status
        v.init()
        exercise(v)


@on_both_engines
def test_a_misaligned_event_structure_needs_a_reset(serve: Serve) -> None:
    """HOSTILE-060: the queue is not started, and a reset repairs that."""
    with attach(serve().path, features=PACKED) as v:
        v.reset()
        v.device.status |= DeviceStatus.ACKNOWLEDGE
        v.device.status |= DeviceStatus.DRIVER
        assert v.device.accept(PACKED & v.device.features)
        v.device.set(CommonCfg.QUEUE_SELECT, 0)
        for area, address in zip(("DESC", "DRIVER", "DEVICE"), (0x1000, 0x2002, 0x3000), strict=True):
            v.device.set(CommonCfg[f"QUEUE_{area}"], address)
        v.device.set(CommonCfg.QUEUE_ENABLE, 1)
        v.device.status |= DeviceStatus.DRIVER_OK
        assert DeviceStatus.NEEDS_RESET in v.status
        v.init()
        exercise(v)
