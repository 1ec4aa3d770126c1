"""Several queues of a running server, the shape of doorbells, and the order of completions."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import pytest
from conftest import on_both_engines, until
from disks import CachedDisk, Disk, FullDisk

from vmmblk.block import Lifetime
from vmmblk.client.driver import SUPPORTED, VirtioBlk, attach
from vmmblk.client.queue import Descriptor, SplitQueue
from vmmblk.client.wire import IrqIndex
from vmmblk.device import SWITCHES
from vmmblk.ring import ending, endings
from vmmblk.spec import BlkConfig, CommonCfg, DescFlag, DeviceStatus, Feature, RequestType, Status
from vmmblk.worker import InOrder

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Served

    Serve = Callable[..., Served]


class AbleDisk(FullDisk):
    """A disk that can do even more."""

    async def secure_erase(self, sector_start: int, sectors: int) -> None:
        """Only recorded."""
        await self._enter("secure_erase", sector_start, sectors)

    def lifetime(self) -> Lifetime:
        """As new."""
        return Lifetime()


NOTIFY = {"notification_data": True, "notif_config_data": True}
IN, OUT, FLUSH = RequestType.IN, RequestType.OUT, RequestType.FLUSH


# Queues.


@on_both_engines
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_every_queue_serves_and_has_a_vector_of_its_own(serve: Serve, count: int) -> None:
    """All queues do the same work, each interrupts on its own vector (BLK-003, 013, 019, PCI-033, NOTE-002)."""
    with attach(serve(queues=count, features={"mq": True}).path, queues=count) as v:
        assert v.config(BlkConfig.NUM_QUEUES) == v.device.get(CommonCfg.NUM_QUEUES) == count
        assert v.connection.irq_info(IrqIndex.MSIX).vectors == count + 1
        assert v.device.select_queue(count) == 0
        for queue in range(count):
            v.queues[queue].arm()
            pending = v.submit(OUT, queue, bytes([queue + 1]) * 512, queue=queue)
            v.kick(queue)
            until(lambda line=queue: v.take_interrupts(line), "its vector is silent")
            assert v.wait(pending).status == Status.OK
            assert not any(v.take_interrupts(each) for each in range(count))
        for queue in range(count):
            assert v.call(IN, queue, data_in=512, queue=count - 1 - queue) == bytes([queue + 1]) * 512


@on_both_engines
def test_one_queue_has_no_mq(serve: Serve) -> None:
    """With one queue MQ is not offered unless it is asked for, and num_queues is not there (BLK-019, FEAT-008)."""
    with attach(serve().path) as v:
        assert not v.device.features & Feature.BLK_MQ.mask
        assert v.config(BlkConfig.NUM_QUEUES) == 0
        assert v.device.get(CommonCfg.NUM_QUEUES) == 1


@on_both_engines
def test_without_mq_only_the_first_queue_is_there(serve: Serve) -> None:
    """A driver that does not take MQ cannot enable another queue; its doorbell is ignored (HOSTILE-080, 081)."""
    served = serve(queues=4)
    with attach(served.path, queues=2, features=SUPPORTED & ~Feature.BLK_MQ.mask) as v:
        v.device.select_queue(1)
        assert v.device.get(CommonCfg.QUEUE_ENABLE) == 0
        v.pci.notify.write(4, 2, 1)
        v.write(0, b"a" * 512)
        assert v.read(0, 512) == b"a" * 512
        assert DeviceStatus.NEEDS_RESET not in v.status


@on_both_engines
def test_queues_that_are_never_enabled_stay_out_of_it(serve: Serve) -> None:
    """A driver that enables one queue of 64 is served there; no other one is ever started (STAT-010)."""
    served = serve(queues=64)
    with attach(served.path) as v:
        v.write(0, b"a" * 512)
        for queue in range(1, 64):
            v.pci.notify.write(4 * queue, 2, queue)
        assert v.read(0, 512) == b"a" * 512
    assert [queue.starts for queue in served.server._queues] == [1] + [0] * 63


@on_both_engines
def test_a_flush_covers_what_other_queues_have_written(serve: Serve) -> None:
    """Writes that completed on one queue are stable once a flush on another has completed (BLK-072)."""
    disk = CachedDisk()
    with attach(serve(disk, queues=3).path, queues=3) as v:
        for queue in range(2):
            v.call(OUT, queue, bytes([7 + queue]) * 512, queue=queue)
        assert disk.stable[:1024] == bytes(1024)
        v.call(FLUSH, queue=2)
        assert disk.stable[:1024] == b"\7" * 512 + b"\10" * 512


def test_the_reset_of_one_queue_leaves_the_others_running(serve: Serve) -> None:
    """While one queue waits for its last request to end its reset, another one serves (VQRST-001, PCI-055)."""
    disk = Disk()
    with attach(serve(disk, queues=2).path, queues=2) as v:
        disk.held = {"read"}
        held = v.submit(IN, 0, data_in=512)
        v.kick()
        disk.wait_for("read")
        v.device.select_queue(0)
        v.device.set(CommonCfg.QUEUE_RESET, 1)
        assert v.device.get(CommonCfg.QUEUE_RESET) == 1
        v.call(OUT, 3, b"b" * 512, queue=1)
        v.device.select_queue(0)
        assert v.device.get(CommonCfg.QUEUE_RESET) == 1
        disk.release()
        v.reset_queue(0)
        assert not held.done
        assert v.call(IN, 3, data_in=512, queue=0) == b"b" * 512
        assert v.call(IN, 3, data_in=512, queue=1) == b"b" * 512


# Doorbells.


@on_both_engines
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config_data", [False, True])
@pytest.mark.parametrize("position", [False, True])
def test_doorbells_of_every_shape_are_heard(serve: Serve, position: bool, config_data: bool, packed: bool) -> None:
    """16 or 32 bits, with the index or the id of the queue (NOTE-004 to 008, PCI-070 to 072, RSVD-016, 017)."""
    features = {"notification_data": position, "notif_config_data": config_data, "packed": packed}
    with attach(serve(queues=2, features=features).path, queues=2) as v:
        assert v.has(Feature.NOTIFICATION_DATA) == position
        assert v.has(Feature.NOTIF_CONFIG_DATA) == config_data
        for round_ in range(300):  # the available index passes the end of the ring
            queue = round_ % 2
            v.call(OUT, round_ % 8, bytes([round_ & 0xFF]) * 512, queue=queue)
        pending = v.submit(IN, 0, data_in=512)
        v.queues[0].publish()
        for _ in range(3):
            v.ring_doorbell()  # the same again is legal
        assert v.wait(pending).status == Status.OK


@on_both_engines
@pytest.mark.parametrize("value", [0x0000, 0x7FFF, 0x8000, 0xFFFF])
def test_the_position_in_a_doorbell_is_not_believed(serve: Serve, value: int) -> None:
    """Garbage in next_off and next_wrap: the ring decides what is there (HOSTILE-087)."""
    with attach(serve(features={"notification_data": True}).path) as v:
        pending = v.submit(IN, 0, data_in=512)
        v.queues[0].publish()
        v.pci.notify.write(0, 4, value << 16)
        assert v.wait(pending).status == Status.OK
        v.pci.notify.write(0, 4, value << 16)
        assert v.read(0, 512) == bytes(512)
        assert DeviceStatus.NEEDS_RESET not in v.status


@on_both_engines
def test_a_short_doorbell_is_heard_with_notification_data(serve: Serve) -> None:
    """16 bits where 32 were negotiated are a plain kick (HOSTILE-086)."""
    with attach(serve(features={"notification_data": True}).path) as v:
        pending = v.submit(IN, 0, data_in=512)
        v.queues[0].publish()
        v.pci.notify.write(0, 2, 0)
        assert v.wait(pending).status == Status.OK


@on_both_engines
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_an_id_that_was_never_handed_out_is_ignored(serve: Serve, width: int, window: bool) -> None:
    """With NOTIF_CONFIG_DATA only a doorbell that carries the queue's id is heard (HOSTILE-084, 088)."""
    served = serve(queues=2, features=NOTIFY)
    with attach(served.path, queues=2, window=window) as v:
        ids = [v.device.notify_id(queue) for queue in range(2)]
        assert len({0, 1, *ids}) == 4
        served.settle()  # queues are looked at when they start
        pending = v.submit(IN, 0, data_in=512)
        v.queues[0].publish()
        for wrong in (0, 1, ids[1], 0xFFFF):
            v.pci.notify.write(0, width, wrong & (1 << 8 * width) - 1)
        assert v.device.get(CommonCfg.NUM_QUEUES) == 2  # the transport has passed them on, if it does
        served.settle()
        assert v.queues[0].used_idx == 0
        v.ring_doorbell()
        assert v.wait(pending).status == Status.OK


def test_ids_are_there_with_their_feature_only(serve: Serve) -> None:
    """queue_notif_config_data reads 0 until it is negotiated, and cannot be written (PCI-047, HOSTILE-111)."""
    path = serve(queues=2, features=NOTIFY).path
    with attach(path, queues=2, features=SUPPORTED & ~Feature.NOTIF_CONFIG_DATA.mask) as v:
        assert [v.device.notify_id(queue) for queue in range(3)] == [0, 0, 0]
        v.wanted = SUPPORTED
        v.init()
        ids = [v.device.notify_id(queue) for queue in range(3)]
        assert ids[2] == 0
        for queue in range(2):
            v.device.select_queue(queue)
            v.device.set(CommonCfg.QUEUE_NOTIF_CONFIG_DATA, 9)
        assert [v.device.notify_id(queue) for queue in range(3)] == ids
        v.reset()
        assert v.device.notify_id(0) == 0


# Features.


@on_both_engines
@pytest.mark.parametrize("name", SWITCHES)
def test_each_feature_can_be_switched_on_and_off(serve: Serve, name: str) -> None:
    """Switched on it is offered and works, switched off it is not offered (FEAT-002, RSVD-003, 005, 006, 010)."""
    feature = SWITCHES[name].mask
    for on in (True, False):
        with attach(serve(AbleDisk(), features={name: on}).path, features=SUPPORTED | feature) as v:
            assert bool(v.features & feature) == on
            v.write(1, b"c" * 1024)
            assert v.read(1, 1024) == b"c" * 1024
            v.wanted = SUPPORTED & ~feature
            v.init()  # a driver may leave it
            assert v.read(1, 1024) == b"c" * 1024


@on_both_engines
def test_everything_at_once(serve: Serve) -> None:
    """A device with every feature on, and a driver that takes them all (FEAT-002)."""
    switches = dict.fromkeys(SWITCHES, True)
    with attach(serve(AbleDisk(), queues=3, features=switches).path, queues=3, features=(1 << 64) - 1) as v:
        for name in switches:
            assert v.has(SWITCHES[name])
        for queue in range(3):
            v.call(OUT, queue, bytes([queue]) * 512, queue=queue)
            assert v.call(IN, queue, data_in=512, queue=queue) == bytes([queue]) * 512


def test_without_flush_each_write_is_stable(serve: Serve) -> None:
    """flush=off: no write is cached, whatever the cache mode (BLK-065)."""
    disk = CachedDisk()
    with attach(serve(disk, features={"flush": False}).path) as v:
        assert not v.device.features & (Feature.BLK_FLUSH.mask | Feature.BLK_CONFIG_WCE.mask)
        v.write(0, b"d" * 512)
        assert disk.stable[:512] == b"d" * 512


# The order of completions.


def completions(v: VirtioBlk, queue: int, count: int) -> list[int]:
    """The heads of the next ``count`` used chains of a queue, in the order of the used ring."""
    seen: list[int] = []
    while len(seen) < count:
        seen += [head for head, _ in v.queues[queue].get_used()]
    return seen


@on_both_engines
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_in_order_chains_come_back_as_they_went(serve: Serve, indirect: bool, packed: bool) -> None:
    """A read that waits holds back its own queue's writes, not another's (RING-INORDER-001, 007, RSVD-014)."""
    disk = Disk()
    served = serve(disk, queues=2, features={"in_order": True, "packed": packed})
    with attach(served.path, queues=2, features=SUPPORTED | Feature.IN_ORDER.mask, indirect=indirect) as v:
        disk.held = {"read"}
        heads = [v.submit(OUT, 0, bytes(512)).head, v.submit(IN, 0, data_in=512).head]
        heads += [v.submit(OUT, 8, bytes(512)).head for _ in range(5)]
        v.kick()
        disk.wait_for("write", 6)
        v.call(OUT, 9, bytes(512), queue=1)  # overtakes them all, as it may
        served.settle()
        assert v.queues[0].used_idx == 1
        disk.release()
        assert completions(v, 0, 7) == heads


@on_both_engines
@pytest.mark.parametrize("wrong", [False, True])
def test_in_order_descriptors_may_lie_anywhere(serve: Serve, wrong: bool) -> None:
    """The chain is followed, and held against the size of the ring, where IN_ORDER lets one expect it (HOSTILE-045)."""
    features = SUPPORTED & ~Feature.RING_PACKED.mask | Feature.IN_ORDER.mask
    with attach(serve(features={"in_order": True}).path, features=features) as v:
        queue = v.queues[0]
        assert isinstance(queue, SplitQueue)
        page = v.memory.alloc(4096)
        data, head, status = queue.reserve(3)
        queue.write_descriptor(head, Descriptor(page, 16, DescFlag.NEXT, queue.size if wrong else data))
        queue.write_descriptor(data, Descriptor(page + 512, 512, DescFlag.NEXT | DescFlag.WRITE, status))
        queue.write_descriptor(status, Descriptor(page + 2048, 1, DescFlag.WRITE))
        v.memory.write(page + 2048, b"\xff")
        queue.offer(head)
        v.kick(force=True)
        if wrong:
            v.wait_needs_reset()
        else:
            until(lambda: queue.used_idx == 1)
            assert v.memory.read(page + 2048, 1) == bytes([Status.OK])


def test_without_in_order_nobody_waits(serve: Serve) -> None:
    """The same without IN_ORDER: what has ended is told at once (RING-SPLIT-016, BLK-052)."""
    disk = Disk()
    with attach(serve(disk, features={"in_order": True}).path) as v:
        disk.held = {"read"}
        held = v.submit(IN, 0, data_in=512)
        v.write(8, bytes(512))
        assert not held.done
        disk.release()
        assert v.wait(held).status == Status.OK


@on_both_engines
def test_in_order_survives_resets(serve: Serve) -> None:
    """A reset with chains held back: the next life of the queue starts clean."""
    disk = Disk()
    with attach(serve(disk, features={"in_order": True}).path, features=SUPPORTED | Feature.IN_ORDER.mask) as v:
        for reset in (lambda: v.reset_queue(0), v.init):
            disk.held, writes = {"read"}, disk.count("write")
            v.submit(IN, 0, data_in=512)
            v.submit(OUT, 8, bytes(512))
            v.kick()
            disk.wait_for("write", writes + 1)
            disk.release()
            reset()
            v.write(3, b"e" * 512)
            assert v.read(3, 512) == b"e" * 512


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_completions_are_released_in_the_order_of_their_chains(order: tuple[int, ...]) -> None:
    """Whatever order chains end in, they are released in order, each once, none later than needed (RSVD-007)."""
    held = InOrder()
    held.taken.extend(range(4))
    released: list[int] = []
    for position, token in enumerate(order):
        released += [each for each, _, _ in endings(held.end(ending(token, Status.OK, 0)))]
        ended = set(order[: position + 1])
        assert released == [each for each in range(4) if set(range(each + 1)) <= ended]
