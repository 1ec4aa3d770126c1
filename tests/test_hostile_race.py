"""A guest with a second processor that rewrites requests and rings while the device is at work on them.

The second processor is another process, over the same memory, so nothing holds it back while the device runs.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest
from conftest import on_both_engines
from disks import FullDisk

from vmmblk.client.driver import SUPPORTED, VirtioBlk, attach
from vmmblk.client.errors import NeedsReset, ProtocolError, QueueFull
from vmmblk.client.memory import PAGE, GuestMemory
from vmmblk.client.queue import Descriptor
from vmmblk.spec import DISCARD_SEGMENT, REQUEST_HEADER, DescFlag, DeviceStatus, Feature, RequestType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Logs, Served

    Serve = Callable[..., Served]
    Field = tuple[int, int, list[int]]

SECTORS = 2048
QUEUES = 4
PAGES = 8
ROUNDS = 150
NEXT, WRITE = DescFlag.NEXT, DescFlag.WRITE
PATTERN = b"\xc7"
NOWHERE = 1 << 50
both = pytest.mark.parametrize("features", [SUPPORTED, SUPPORTED | Feature.RING_PACKED.mask], ids=["split", "packed"])

RACER = textwrap.dedent("""
    import json, mmap, random, sys
    fd, size, seed = map(int, sys.argv[1:])
    memory = mmap.mmap(fd, size)
    fields = [(at, [value.to_bytes(width, "little") for value in values]) for at, width, values in json.load(sys.stdin)]
    print("ready", flush=True)
    choice = random.Random(seed).choice
    while True:
        at, values = choice(fields)
        value = choice(values)
        memory[at : at + len(value)] = value
""")


@contextlib.contextmanager
def racing(memory: GuestMemory, fields: list[Field]) -> Iterator[None]:
    """Somebody stores one of the values of one of the ``fields`` (offset, width, values), again and again."""
    command = [sys.executable, "-c", RACER, str(memory.fd), str(memory.size), "1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[memory.fd]
    ) as racer:
        assert racer.stdin is not None
        assert racer.stdout is not None
        json.dump(fields, racer.stdin)
        racer.stdin.close()
        assert racer.stdout.readline() == "ready\n"
        try:
            yield
            assert racer.poll() is None
        finally:
            racer.kill()


def bodies(page: int) -> list[Field]:
    """Type, reserved field and sector of the header in ``page``, and a payload of segments in the page behind it."""
    sectors = [0, 5, 8, SECTORS - 1, SECTORS, 1 << 55, (1 << 64) - 1]
    fields: list[Field] = [(page, 4, [0, 1, 4, 8, 11, 13, 14, 99]), (page + 4, 4, [0, 7]), (page + 8, 8, sectors)]
    for at in range(page + PAGE, page + PAGE + 64, DISCARD_SEGMENT.size):
        fields += [(at, 8, sectors), (at + 8, 4, [0, 1, 8, SECTORS, 1 << 23, 0xFFFFFFFF]), (at + 12, 4, [0, 1, 2])]
    return fields


def request(page: int) -> list[Descriptor]:
    """A header, 512 bytes to write or to take segments from, 512 bytes to read into, a status."""
    return [
        Descriptor(page, REQUEST_HEADER.size, NEXT),
        Descriptor(page + PAGE, 512, NEXT),
        Descriptor(page + PAGE + 1024, 512, NEXT | WRITE),
        Descriptor(page + 64, 1, WRITE),
    ]


@on_both_engines
@both
def test_requests_that_change_while_they_are_served(serve: Serve, features: int) -> None:
    """HOSTILE-028, -029: whatever is found is done or refused as a whole, within the disk; each is told of, once."""
    disk = FullDisk(SECTORS)
    served = serve(disk, queues=QUEUES)
    with attach(served.path, features=features, queues=QUEUES) as v:
        pages = [v.memory.alloc(2 * PAGE) for _ in range(PAGES)]
        with racing(v.memory, [field for page in pages for field in bodies(page)]):
            for turn in range(ROUNDS):
                for page in pages:
                    v.memory.write(page + 64, b"\xff")
                pendings = [v.submit_raw(request(page), queue=index % QUEUES) for index, page in enumerate(pages)]
                for queue in range(QUEUES):
                    v.kick(queue)
                v.wait_all(pendings)
                assert {v.memory.read(page + 64, 1)[0] for page in pages} <= {0, 1, 2}, turn
        assert v.status & DeviceStatus.NEEDS_RESET == 0
        assert len(disk.data) == SECTORS * 512
        for name, *where in disk.calls:
            assert name == "flush" or where[0] + where[1] <= SECTORS
        v.write(3, b"w" * 512)
        assert v.read(3, 512) == b"w" * 512


def cells(v: VirtioBlk, targets: list[int], tables: int) -> list[Field]:
    """Every field of every descriptor of the rings and of a page of ``tables``, and what the driver says else."""
    fields: list[Field] = []
    addresses = [*targets, targets[0] + 100, tables, NOWHERE, v.memory.size - 8, (1 << 64) - 8]
    rings = [queue.desc for queue in v.queues] + [tables]
    for ring in rings:
        for at in range(ring, ring + 16 * 16, 16):
            fields += [(at, 8, addresses), (at + 8, 4, [0, 1, 16, 17, 32, 512, 0xFFFFFFFF])]
            fields += [(at + 12, 2, [0, 1, 2, 3, 4, 5, 15, 0x80, 0x8000]), (at + 14, 2, [0, 1, 3, 0x83, 0x8001, 0x84])]
    for queue in v.queues:
        fields += [(queue.avail, 2, [0, 1, 0xFFFF]), (queue.avail + 2, 2, [0, 1, 2, 3, 0x8000])]
    return fields


def offer(v: VirtioBlk, page: int, noise: random.Random) -> None:
    """Some requests in some queue, which may be full of what never comes back."""
    queue = noise.randrange(QUEUES)
    with contextlib.suppress(QueueFull):
        for _ in range(3):
            v.submit_raw(request(page), queue=queue)
    v.kick(queue, force=True)
    v.poll(queue)


@on_both_engines
@both
def test_rings_that_change_while_they_are_served(serve: Serve, logs: Logs, features: int) -> None:
    """HOSTILE-026, -027, -059: nothing is written but what may have been named, and after a reset all is well."""
    logs.allow("guest memory is not shared")  # a doorbell for a ring whose index is 0 again looks like that
    noise = random.Random(4)  # noqa: S311
    served = serve(FullDisk(SECTORS), queues=QUEUES, queue_size=16)
    broken = 0
    with GuestMemory(1 << 20) as memory, attach(served.path, memory=memory, features=features, queues=QUEUES) as v:
        targets = [memory.alloc(2 * PAGE) for _ in range(4)]
        tables = memory.alloc(PAGE)
        canary = memory.alloc(32 * PAGE)
        memory.write(canary, PATTERN * 32 * PAGE)
        deadline = time.monotonic() + 200
        while broken < 20:
            with racing(memory, cells(v, targets, tables)):
                with contextlib.suppress(ProtocolError, NeedsReset, KeyError):
                    while v.status & DeviceStatus.NEEDS_RESET == 0:
                        offer(v, targets[0], noise)
                        assert time.monotonic() < deadline, f"only {broken} rings were found to be broken"
                broken += 1
                for _ in range(3):
                    v.init()
            v.init()
            for queue in range(QUEUES):
                v.call(RequestType.OUT, queue, bytes([broken]) * 512, queue=queue)
                assert v.call(RequestType.IN, queue, data_in=512, queue=queue) == bytes([broken]) * 512
        assert memory.read(canary, 32 * PAGE) == PATTERN * 32 * PAGE
        assert v.status == 15
