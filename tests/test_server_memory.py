"""Guest memory that moves, is missing, or is not shared, under a running server."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from typing import TYPE_CHECKING

import pytest
from conftest import on_both_engines
from disks import Disk

from vmmblk.client import wire
from vmmblk.client.connection import Connection
from vmmblk.client.driver import VirtioBlk, attach
from vmmblk.client.errors import NeedsReset, RemoteError
from vmmblk.client.memory import PAGE, GuestMemory, Range, Sharing
from vmmblk.client.queue import Descriptor
from vmmblk.client.wire import Command
from vmmblk.server import MEMORY_ADVICE, MEMORY_GONE
from vmmblk.spec import REQUEST_HEADER, CommonCfg, DescFlag, DeviceStatus, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Logs, Served

    Serve = Callable[..., Served]

ADVICE = "guest memory is not shared with vmmblk"
NEXT, WRITE = DescFlag.NEXT, DescFlag.WRITE
MIB = 1 << 20
PATTERN = bytes(range(256)) * 4096  # 1 MiB


@contextlib.contextmanager
def driven(served: Served, memory: GuestMemory) -> Iterator[VirtioBlk]:
    """A driver whose device is not started, on a connection that has been given nothing."""
    with Connection(served.path) as connection:
        connection.dma_target = memory
        driver = VirtioBlk(connection, memory, start=False)
        yield driver
        driver.close()


def pieces(memory: GuestMemory, *cuts: int) -> list[Range]:
    """The memory, one range at 0, cut at these addresses."""
    edges = sorted({0, memory.size, *cuts})
    return [Range(start, end - start) for start, end in itertools.pairwise(edges)]


def transfer(v: VirtioBlk, kind: RequestType, data: int, length: int, block: int) -> int:
    """One request over data anywhere; ``block`` is a page for header and status.  Returns the status byte."""
    v.memory.write(block, REQUEST_HEADER.pack(kind, 0, 0) + bytes(48) + b"\xff")
    flags = NEXT | WRITE if kind == RequestType.IN else NEXT
    pending = v.submit_raw(
        [Descriptor(block, 16, NEXT), Descriptor(data, length, flags), Descriptor(block + 64, 1, WRITE)]
    )
    v.kick()
    v.wait(pending)
    return v.memory.read(block + 64, 1)[0]


# Memory that is not shared.


@on_both_engines
def test_memory_without_descriptors_is_told_at_driver_ok(serve: Serve, logs: Logs) -> None:
    """Plain -m: one error that names the arguments, NEEDS_RESET; registers answer; the next client is served."""
    logs.expect(ADVICE)
    served = serve()
    with GuestMemory(sharing=Sharing.NO_FD) as memory, driven(served, memory) as v:
        memory.map_all(v.connection)
        v.init()
        v.wait_needs_reset()
        assert v.capacity == 2048
        v.ring_doorbell()
        v.init()  # a driver that tries again hears nothing new
        v.wait_needs_reset()
    assert len(logs.matching(ADVICE)) == 1
    assert logs.matching(ADVICE)[0].getMessage() == MEMORY_ADVICE
    assert "memory-backend-memfd" in MEMORY_ADVICE
    assert "share=on" in MEMORY_ADVICE
    with attach(served.path) as v:
        v.write(0, b"x" * 512)


def test_each_client_is_told(serve: Serve, logs: Logs) -> None:
    """The advice comes once for every client, and a hundred clients do not fill the log with it."""
    logs.expect(ADVICE)
    served = serve()
    with GuestMemory(4 * MIB, sharing=Sharing.NO_FD) as memory:
        for count in range(1, 4):
            with driven(served, memory) as v:
                memory.map_all(v.connection)
                v.init()
                v.wait_needs_reset()
            assert len(logs.matching(ADVICE)) == count
        for _ in range(60):
            with driven(served, memory) as v:
                memory.map_all(v.connection)
                v.init()
                v.wait_needs_reset()
    assert len(logs.records) < 60


@on_both_engines
@pytest.mark.parametrize("kind", [RequestType.IN, RequestType.OUT])
def test_only_the_data_is_not_shared(serve: Serve, logs: Logs, kind: RequestType) -> None:
    """A buffer in memory without a descriptor fails that request; the ring and other requests go on."""
    logs.expect(ADVICE)
    served = serve()
    layout = [Range(0, 16 * MIB), Range(1 << 32, 16 * MIB)]
    with GuestMemory(32 * MIB, layout) as memory, driven(served, memory) as v:
        memory.map(v.connection, *layout[0])
        memory.map(v.connection, *layout[1], sharing=Sharing.NO_FD)
        v.init()
        block = memory.alloc(PAGE)
        for _ in range(3):
            assert transfer(v, kind, 1 << 32, 512, block) == Status.IOERR
        assert DeviceStatus.NEEDS_RESET not in v.status
        v.write(0, b"x" * 512)
        assert v.read(0, 512) == b"x" * 512
    assert len(logs.matching(ADVICE)) == 1
    assert served.disk.data[:512] == b"x" * 512
    assert served.disk.count("read") <= 1


@on_both_engines
@pytest.mark.parametrize("area", [CommonCfg.QUEUE_DESC, CommonCfg.QUEUE_DRIVER, CommonCfg.QUEUE_DEVICE])
def test_one_area_of_the_ring_is_not_shared(serve: Serve, logs: Logs, area: CommonCfg) -> None:
    """Any of the three areas in memory without a descriptor is the memory-backend error."""
    logs.expect(ADVICE)
    served = serve()
    layout = [Range(0, 16 * MIB), Range(1 << 32, MIB)]
    with GuestMemory(17 * MIB, layout) as memory, driven(served, memory) as v:
        memory.map(v.connection, *layout[0])
        memory.map(v.connection, *layout[1], sharing=Sharing.NO_FD)
        v.init()
        v.device.reset_queue(0)
        queue = v.queues[0]
        v.device.set(CommonCfg.QUEUE_DESC, queue.desc)
        v.device.set(CommonCfg.QUEUE_DRIVER, queue.avail)
        v.device.set(CommonCfg.QUEUE_DEVICE, queue.used)
        v.device.set(area, 1 << 32)
        v.device.set(CommonCfg.QUEUE_ENABLE, 1)
        v.wait_needs_reset()
        v.init()
        v.write(0, bytes(512))


@on_both_engines
def test_private_memory_is_told_at_the_first_doorbell(serve: Serve, logs: Logs) -> None:
    """share=off: the ring reads as never used, so the same words are logged when a doorbell comes, and only then."""
    logs.expect(ADVICE)
    served = serve()
    with GuestMemory(sharing=Sharing.PRIVATE) as memory, driven(served, memory) as v:
        memory.map_all(v.connection)
        v.init()
        served.settle()
        assert not logs.matching(ADVICE)
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick(force=True)
        logs.wait(ADVICE)
        v.ring_doorbell()
        v.device.get(CommonCfg.DEVICE_STATUS)
        served.settle()
    assert len(logs.matching(ADVICE)) == 1
    with attach(served.path) as v:
        v.write(0, b"x" * 512)


@on_both_engines
def test_a_shared_ring_is_never_taken_for_a_private_one(serve: Serve, logs: Logs) -> None:
    """An ordinary driver, through resets and remaps, is told nothing."""
    served = serve()
    with GuestMemory(8 * MIB) as memory, driven(served, memory) as v:
        memory.map_all(v.connection)
        for _ in range(10):
            v.init()
            v.write(0, bytes(512))
            memory.unmap_all(v.connection)
            memory.map_all(v.connection)
            v.read(0, 512)
    assert not logs.matching(ADVICE)


# Remaps with a live ring.


@on_both_engines
def test_all_of_memory_is_remapped_under_a_live_ring(serve: Serve) -> None:
    """RAM is taken away and given back in other pieces, again and again, as firmware does; nothing is lost."""
    served = serve(Disk(sectors=8192), queue_size=1024)
    with GuestMemory(16 * MIB) as memory, driven(served, memory) as v:
        memory.map_all(v.connection)
        v.init()
        queue = v.queues[0]
        data, block = memory.alloc(MIB), memory.alloc(PAGE)
        mapped = [Range(0, memory.size)]
        cuts = [
            (queue.desc + PAGE, data + 512 * PAGE // 8),
            (queue.desc + 2 * PAGE, queue.used + PAGE, data + PAGE, data + 2 * PAGE, data + 17 * PAGE),
            (queue.desc, queue.avail, queue.used, data, block),
            (),
            (0xC0000, 0xD0000, 0xE0000, 0xF0000, 0x100000),
        ]
        for turn, cut in enumerate(cuts * 2):
            for piece in mapped:
                memory.unmap(v.connection, *piece)
            v.ring_doorbell()  # with nothing mapped at all
            mapped = pieces(memory, *cut)
            for piece in mapped:
                memory.map(v.connection, *piece)
            memory.write(data, PATTERN[turn:] + PATTERN[:turn])
            assert transfer(v, RequestType.OUT, data, MIB, block) == Status.OK
            memory.write(data, bytes(MIB))
            assert transfer(v, RequestType.IN, data, MIB, block) == Status.OK
            assert memory.read(data, MIB) == PATTERN[turn:] + PATTERN[:turn]
            for sector in range(20):
                v.write(sector, bytes([turn]) * 512)
        assert DeviceStatus.NEEDS_RESET not in v.status


@on_both_engines
def test_a_burst_of_maps_can_be_pipelined(serve: Serve) -> None:
    """Unmaps and maps sent without waiting, with requests in between, are all answered in order."""
    served = serve()
    with GuestMemory(8 * MIB) as memory, driven(served, memory) as v:
        memory.map_all(v.connection)
        v.init()
        for _ in range(20):
            requests = [v.submit(RequestType.IN, i, data_in=512) for i in range(40)]
            v.kick()
            ids = [
                v.connection.send(Command.DMA_UNMAP, wire.encode_dma_unmap(0, memory.size)),
                *(
                    v.connection.send(Command.DMA_MAP, wire.encode_dma_map(*piece, piece.iova, 3), [memory.fd])
                    for piece in pieces(memory, MIB, 2 * MIB, 4 * MIB)
                ),
            ]
            for message in ids:
                v.connection.wait(message)
            v.wait_all(requests)
            assert {request.status for request in requests} == {Status.OK}
            for piece in pieces(memory, MIB, 2 * MIB, 4 * MIB):
                memory.unmap(v.connection, *piece)
            memory.map_all(v.connection)


@on_both_engines
def test_a_doorbell_while_the_ring_is_unmapped_is_not_lost(serve: Serve) -> None:
    """A queue whose memory is away is parked, not corrupt; the request is served after the next map (HOSTILE-048)."""
    served = serve()
    with GuestMemory(8 * MIB) as memory, driven(served, memory) as v:
        memory.map_all(v.connection)
        v.init()
        v.read(0, 512)
        for gone in pieces(memory, v.queues[0].used)[::-1]:
            memory.unmap_all(v.connection)
            for piece in pieces(memory, v.queues[0].used):
                memory.map(v.connection, *piece)
            memory.unmap(v.connection, *gone)
            pending = v.submit(RequestType.IN, 0, data_in=512)
            v.kick(force=True)
            v.device.get(CommonCfg.DEVICE_STATUS)
            served.settle()
            assert DeviceStatus.NEEDS_RESET not in v.status
            assert v.poll() == 0
            memory.map(v.connection, *gone)
            assert v.wait(pending).status == Status.OK
            for piece in pieces(memory, v.queues[0].used):
                memory.unmap(v.connection, *piece)
            memory.map_all(v.connection)


@on_both_engines
def test_a_reset_with_no_memory_mapped(serve: Serve) -> None:
    """Everything unmapped, then a reset and a new start once memory is back."""
    served = serve()
    with GuestMemory(8 * MIB) as memory, driven(served, memory) as v:
        memory.map_all(v.connection)
        v.init()
        memory.unmap_all(v.connection)
        v.connection.device_reset()
        v.connection.device_reset()
        v.forget()
        memory.map_all(v.connection)
        v.init()
        v.write(0, bytes(512))


@on_both_engines
def test_driver_ok_with_no_memory_mapped_needs_a_reset(serve: Serve) -> None:
    """A ring at an address that is not mapped at DRIVER_OK refuses to start; mapped, a new init works (HOSTILE-041)."""
    served = serve()
    with GuestMemory(8 * MIB) as memory, driven(served, memory) as v:
        v.init()
        v.wait_needs_reset()
        memory.map_all(v.connection)
        v.init()
        v.write(0, bytes(512))


def test_an_unmap_waits_for_what_is_in_flight(serve: Serve) -> None:
    """A request that the disk holds for a moment is completed before the unmap is answered (RST-004, HOSTILE-048)."""
    disk = Disk()
    served = serve(disk)
    with GuestMemory(8 * MIB) as memory, driven(served, memory) as v:
        memory.map_all(v.connection)
        v.init()
        disk.held.add("read")
        pending = v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        disk.wait_for("read")
        message = v.connection.send(Command.DMA_UNMAP, wire.encode_dma_unmap(0, memory.size))
        served.settle()
        disk.release()
        v.connection.wait(message)
        assert v.poll() == 1
        assert pending.status == Status.OK
        memory.map_all(v.connection)
        v.read(0, 512)


# Odd memory.


@on_both_engines
def test_a_device_may_not_write_read_only_memory(serve: Serve) -> None:
    """A writable element in memory mapped for reading: IOERR, the memory stays (HOSTILE-025); reading it works."""
    served = serve()
    served.disk.data[:512] = b"\x66" * 512
    layout = [Range(0, 4 * MIB), Range(1 << 32, MIB)]
    with GuestMemory(5 * MIB, layout) as memory, driven(served, memory) as v:
        memory.map(v.connection, *layout[0])
        memory.map(v.connection, *layout[1], flags=1)
        memory.write(1 << 32, b"r" * 512)
        v.init()
        block = memory.alloc(PAGE)
        assert transfer(v, RequestType.IN, 1 << 32, 512, block) == Status.IOERR
        assert memory.read(1 << 32, 512) == b"r" * 512
        assert transfer(v, RequestType.OUT, 1 << 32, 512, block) == Status.OK
        assert served.disk.data[:512] == b"r" * 512


@on_both_engines
def test_an_element_over_two_regions_and_over_a_hole(serve: Serve) -> None:
    """Neighbouring regions are one memory, a hole is an error that writes nothing behind it (HOSTILE-023, RSVD-005)."""
    served = serve(Disk(sectors=256))
    served.disk.data[:] = PATTERN[: len(served.disk.data)]
    with GuestMemory(8 * MIB) as memory, driven(served, memory) as v:
        for piece in (Range(4 * MIB, MIB), Range(0, 4 * MIB), Range(6 * MIB, 2 * MIB)):  # in no order
            memory.map(v.connection, *piece)
        v.init()
        block = memory.alloc(PAGE)
        assert transfer(v, RequestType.IN, 4 * MIB - 700, 4096, block) == Status.OK
        assert memory.read(4 * MIB - 700, 4096) == PATTERN[:4096]
        for start in (5 * MIB - 512, 5 * MIB, 6 * MIB - 512):
            before = memory.read(start, 1024)
            assert transfer(v, RequestType.IN, start, 1024, block) == Status.IOERR
            assert memory.read(start, 1024) == before


@on_both_engines
def test_memory_beyond_what_the_library_takes(serve: Serve, logs: Logs) -> None:
    """Forty regions, overlaps and impossible ones: each is answered, and the device works with what it got."""
    logs.allow("libvfio-user|cannot be reached")
    served = serve()
    with GuestMemory(8 * MIB) as memory, driven(served, memory) as v:
        memory.map(v.connection, 0, 4 * MIB)
        refused = 0
        for index in range(40):
            try:
                memory.map(v.connection, 4 * MIB + index * PAGE, PAGE)
            except RemoteError:
                refused += 1
        for iova, size, offset in ((0, 4 * MIB, 0), (PAGE, PAGE, 0), (2 * MIB, 4 * MIB, 0), (1 << 40, 0, 0)):
            with contextlib.suppress(RemoteError):
                v.connection.dma_map(iova, size, memory.fd, offset)
        v.init()
        block = memory.alloc(PAGE)
        outcomes = {transfer(v, RequestType.OUT, 4 * MIB + index * PAGE, PAGE, block) for index in range(40)}
        assert outcomes <= {Status.OK, Status.IOERR}
        assert (Status.IOERR in outcomes) == bool(refused)
        v.write(0, bytes(512))
    assert len(logs.records) < 60
    with attach(served.path) as v:
        v.write(0, bytes(512))


@on_both_engines
@pytest.mark.parametrize("kind", [RequestType.IN, RequestType.OUT])
def test_memory_that_is_cut_short_under_the_device(kind: RequestType, serve: Serve, logs: Logs) -> None:
    """A request whose memory is gone fails, and the device needs a reset; new memory makes all well again."""
    logs.expect(re.escape(MEMORY_GONE))
    served = serve()
    with GuestMemory(8 * MIB) as memory, driven(served, memory) as v:
        memory.map(v.connection, 0, 4 * MIB)
        fd = os.memfd_create("short")
        os.ftruncate(fd, 4 * MIB)
        v.connection.dma_map(4 * MIB, 4 * MIB, fd)
        v.init()
        os.ftruncate(fd, 0)
        os.close(fd)
        block = memory.alloc(PAGE)
        with contextlib.suppress(NeedsReset):  # it may be told of both at once
            transfer(v, kind, 5 * MIB, 4096, block)
        assert memory.read(block + 64, 1)[0] == Status.IOERR
        v.wait_needs_reset()
        v.connection.dma_unmap(4 * MIB, 4 * MIB)
        v.init()
        v.write(0, bytes(512))
    with attach(served.path) as v:
        v.write(0, bytes(512))
