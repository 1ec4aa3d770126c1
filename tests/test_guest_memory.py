"""Guest memory: mapping, parking, taking memory back from requests in flight (orphans), truncated files."""

from __future__ import annotations

import errno
import gc
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rings import HEADER, PAGE, Life, Range, Rig, Segment, mapping_at, rang

from vmmblk.memory import Alias, Core, Pause, Region
from vmmblk.ring import ending

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.ring import Chain

RING = Range(0, 64 * PAGE)
DATA = Range(64 * PAGE, 64 * PAGE)
IOERR = 1
OK = 0


@pytest.fixture(params=[Life(), Life(packed=True)], ids=["split", "packed"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Rings and headers in one region, data in another."""
    with Rig(pieces=(RING, DATA), layout=(Range(0, 128 * PAGE),), life=request.param) as made:
        yield made


def at_data(rig: Rig, data: bytes, offset: int = 0) -> Segment:
    """A readable element in the data region."""
    rig.memory.write(DATA.iova + offset, data)
    return Segment(DATA.iova + offset, len(data), writable=False)


def room(length: int, offset: int = 0) -> Segment:
    """A writable element in the data region."""
    return Segment(DATA.iova + offset, length, writable=True)


# ---- mapping


@pytest.mark.parametrize(
    ("piece", "error"),
    [
        (Range(0x100000, 0), errno.EINVAL),
        (Range((1 << 64) - PAGE, 2 * PAGE), errno.EINVAL),
        (Range(RING.iova, PAGE), errno.EEXIST),
        (Range(RING.iova + PAGE, PAGE), errno.EEXIST),
        (Range(DATA.iova + DATA.size - 1, 2), errno.EEXIST),
        (Range(0, 1 << 40), errno.EEXIST),
    ],
)
def test_impossible_regions_are_refused(rig: Rig, piece: Range, error: int) -> None:
    """Empty, wrapping and overlapping regions change nothing."""
    with pytest.raises(OSError, match="guest memory") as caught:
        rig.core.map(Region(piece.iova, piece.size, 0, 0, 0, 0, 3))
    assert caught.value.errno == error
    rig.request()
    assert len(rig.serve()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"vaddr": -PAGE},
        {"map_len": -1},
        {"vaddr": PAGE},
        {"page_size": -PAGE},
        {"page_size": 1},
    ],
)
def test_a_region_outside_its_mapping_is_refused(rig: Rig, change: dict[str, int]) -> None:
    """The transport's numbers come from the client: a region that its mapping does not hold, or no page size."""
    host = rig.memory.address(DATA.iova, PAGE)
    numbers = {"vaddr": host, "map_base": host, "map_len": PAGE, "page_size": PAGE}
    for name, by in change.items():
        numbers[name] += by
    with pytest.raises(OSError, match="Invalid argument"):
        rig.core.map(Region(1 << 40, PAGE, prot=3, **numbers))


def test_private_memory_is_refused(rig: Rig) -> None:
    """There is no second mapping of private pages."""
    import mmap

    from vmmblk._core import ffi

    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        buffer = ffi.from_buffer(private)
        host = int(ffi.cast("uintptr_t", buffer))
        with pytest.raises(OSError, match="Invalid argument"):
            rig.core.map(Region(1 << 40, PAGE, host, host, PAGE, PAGE, 3))
        ffi.release(buffer)


def test_there_are_at_most_256_regions() -> None:
    """One more is refused; the map holds whatever the order, and any region can go."""
    with Rig(layout=(Range(0, 300 * PAGE),), pieces=(Range(0, 44 * PAGE),), start=False) as rig:
        order = [n * 97 % 255 for n in range(255)]
        for n in order:
            rig.map(Range((44 + n) * PAGE, PAGE))
        with pytest.raises(OSError, match="No space"):
            rig.map(Range(299 * PAGE, PAGE))
        rig.unmap(Range(50 * PAGE, PAGE))
        rig.map(Range(299 * PAGE, PAGE))
        rig.start()
        rig.offer(
            rig.readable(HEADER),
            Segment(44 * PAGE, 6 * PAGE, writable=True),
            Segment(51 * PAGE, 249 * PAGE, writable=True),
            rig.writable(1),
        )
        rig.offer(rig.readable(HEADER), Segment(49 * PAGE, 2 * PAGE, writable=True), rig.writable(1))
        first, second = rig.queue.pop()
        assert (first.reachable, len(first.views_out), second.reachable) == (True, 255, False)


@pytest.mark.parametrize("piece", [Range(DATA.iova, PAGE), Range(DATA.iova + PAGE, PAGE), Range(1 << 40, PAGE)])
def test_only_a_whole_region_can_be_unmapped(rig: Rig, piece: Range) -> None:
    """Anything else is not found."""
    with pytest.raises(FileNotFoundError):
        rig.core.unmap(*piece)


# ---- a ring whose memory comes and goes


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_queue_without_its_memory_is_parked(event_idx: bool, packed: bool) -> None:
    """SeaBIOS remaps all of RAM with a live ring: nothing is popped meanwhile, nothing is lost, nothing is corrupt."""
    whole = Range(0, 1 << 20)
    with Rig(life=Life(event_idx=event_idx, packed=packed)) as rig:
        for _ in range(5):
            rig.request()
            with rig.quiesced():
                rig.unmap(whole)
            assert rig.queue.pop() == []
            with rig.quiesced():
                rig.map(whole)
            assert rig.kicked()
            assert len(rig.serve()) == 1


def test_memory_may_come_back_in_other_pieces(rig: Rig) -> None:
    """No translation outlives a change of the map: neither the ring's nor a chain's."""
    rig.offer(rig.readable(HEADER), room(4 * PAGE), rig.writable(1))
    rig.queue.clear_kick()
    with rig.quiesced():
        rig.unmap(RING)
        rig.unmap(DATA)
        for n in range(128):
            rig.map(Range(n * PAGE, PAGE))
    (chain,) = rig.queue.pop()
    assert [len(view) for view in chain.views_out] == [PAGE] * 4
    rig.complete(chain, written=4 * PAGE)
    assert len(rig.ring.get_used()) == 1


def test_a_request_whose_memory_is_gone_ends_without_touching_it(rig: Rig) -> None:
    """HOSTILE-048: the data goes nowhere, the view stays, and the driver is still told."""
    head = rig.offer(rig.readable(HEADER), room(PAGE), rig.writable(1))
    chain = rig.pop_one()
    rig.memory.write(DATA.iova, b"\xee" * PAGE)
    with rig.quiesced():
        rig.unmap(DATA)
    chain.views_out[0][:] = b"x" * PAGE
    assert rig.memory.read(DATA.iova, PAGE) == b"\xee" * PAGE
    rig.complete(chain, written=PAGE)
    assert rig.ring.get_used() == [(head, PAGE + 1)]


def test_a_completion_without_a_ring_is_forgotten(rig: Rig) -> None:
    """HOSTILE-048: rings lost with a chain in flight; a later map finds a queue that goes on."""
    rig.request()
    chain = rig.pop_one()
    with rig.quiesced():
        rig.unmap(RING)
    rig.complete(chain)
    assert rig.vectors == []
    with rig.quiesced():
        rig.map(RING)
    assert rig.ring.get_used() == []
    other = rig.request()
    rig.complete(rig.pop_one())
    assert rig.ring.get_used() == [(other, 1)]


# ---- views


def test_a_view_keeps_its_addresses_and_only_them(rig: Rig) -> None:
    """A retired range is anonymous memory until the last view is gone, and then it is nothing."""
    rig.offer(rig.readable(HEADER), room(PAGE, 3 * PAGE), rig.writable(1))
    chain = rig.pop_one()
    kept = chain.views_out[0][100:200]
    address = chain.addresses
    rig.complete(chain)
    del chain
    assert "guest" in mapping_at(address)
    rig.unmap(DATA)
    gc.collect()
    assert mapping_at(address).endswith("0 ")
    assert kept.tobytes() == bytes(100)
    kept[:] = b"y" * 100
    del kept
    gc.collect()
    assert mapping_at(address) == ""
    rig.map(DATA)


def test_every_view_of_a_mapping_must_go_before_its_addresses_do(rig: Rig) -> None:
    """Slices, read-only views and casts count alike."""
    rig.offer(rig.readable(HEADER), at_data(rig, b"x" * PAGE), rig.writable(1))
    chain = rig.pop_one()
    address = chain.addresses
    kept = [chain.views_in[0].cast("I")[4:5], chain.views_in[0][7:8]]
    rig.complete(chain)
    del chain
    rig.unmap(DATA)
    while kept:
        assert mapping_at(address)
        kept.pop()
        gc.collect()
    assert mapping_at(address) == ""
    rig.map(DATA)


def test_mapping_and_unmapping_leaves_nothing_behind(rig: Rig) -> None:
    """A client that remaps for ever: neither addresses nor places in the SIGBUS table run out."""
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(5000):
        rig.core.unmap(*DATA)
        rig.core.map(rig.region(DATA))
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 10


def test_regions_unlike_the_memory_they_came_from_are_not_dumped(rig: Rig) -> None:
    """The core's mappings stay out of core dumps."""
    rig.offer(rig.readable(HEADER), room(PAGE), rig.writable(1))
    address = rig.pop_one().addresses
    flags = ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            flags = line
    assert " dd" in flags


# ---- orphans


def orphaned(rig: Rig) -> None:
    """Pause, take memory back, resume: what a drain that takes too long comes to."""
    with rig.quiesced():
        rig.core.orphan()
        assert rig.core.busy == 0


def test_a_read_that_ends_late_lands_nowhere(rig: Rig) -> None:
    """Guest memory is out of its reach, although its views stay; the driver gets IOERR when it ends."""
    status = rig.writable(1)
    head = rig.offer(rig.readable(HEADER), room(PAGE), status)
    chain = rig.pop_one()
    rig.memory.write(DATA.iova, b"\xee" * PAGE)
    orphaned(rig)
    chain.views_out[0][:] = b"x" * PAGE
    assert rig.memory.read(DATA.iova, PAGE) == b"\xee" * PAGE
    assert rig.core.orphans == 1
    assert rig.memory.read(status.iova, 1) == b"\xee"
    rig.complete(chain, status=OK, written=PAGE)
    assert rig.ring.get_used() == [(head, 0)]
    assert rig.memory.read(status.iova, 1) == b"\1"
    assert rig.vectors == [0]
    assert rig.core.orphans == 0


def test_a_write_that_ends_late_sends_what_it_was_given(rig: Rig) -> None:
    """The stand-in holds every byte in flight: overlapping, nested, repeated and odd; and nothing else."""
    rig.memory.write(DATA.iova, bytes(range(256)) * (4 * PAGE // 256))
    spans = [(5, 100), (50, 100), (60, 10), (5, 100), (4095, 2), (3 * PAGE - 1, PAGE), (0, 1)]
    segments = [Segment(DATA.iova + start, length, writable=False) for start, length in spans]
    rig.offer(rig.readable(HEADER), *segments[:4], rig.writable(1))
    rig.offer(rig.readable(HEADER), *segments[4:], room(64, 8 * PAGE), rig.writable(1))
    rig.memory.write(DATA.iova + 8 * PAGE, b"\xee" * 64)
    chains = rig.queue.pop()
    expected = [b"".join(chain.views_in) for chain in chains]
    unrelated = rig.core.aliases[2].readable
    orphaned(rig)
    rig.memory.write(DATA.iova, b"\xee" * 4 * PAGE)
    assert [b"".join(chain.views_in) for chain in chains] == expected
    assert bytes(unrelated[2000:2100]) == bytes(100)
    assert bytes(unrelated[8 * PAGE : 8 * PAGE + 64]) == bytes(64)
    del unrelated
    rig.complete(*chains)
    assert [length for _, length in rig.ring.get_used()] == [1, 0]


def test_nothing_is_popped_while_an_orphan_lives(rig: Rig) -> None:
    """An old write must not overtake a new one: requests of all queues wait, and are kicked when the last has ended."""
    with Rig(queues=3) as three:
        for ring in three.rings[:2]:
            ring.add((three.writable(1),))
            ring.publish()
        orphans = [three.queues[0].pop()[0], three.queues[1].pop()[0]]
        orphaned(three)
        three.rings[2].add((three.writable(1),))
        three.rings[2].publish()
        for index in range(3):
            three.kicked(index)
        assert [queue.pop() for queue in three.queues] == [[], [], []]
        three.queues[0].complete(ending(orphans[0].token, 0, 0))
        assert [queue.pop() for queue in three.queues] == [[], [], []]
        assert not any(three.kicked(index) for index in range(3))
        three.queues[1].complete(ending(orphans[1].token, 0, 0))
        assert all(three.kicked(index) for index in range(3))
        assert len(three.queues[2].pop()) == 1


def test_a_queue_goes_on_over_fresh_memory_after_its_orphans(rig: Rig) -> None:
    """New requests use the fresh mapping; the old one goes with the last view of it."""
    rig.offer(rig.readable(HEADER), room(PAGE), rig.writable(1))
    chain = rig.pop_one()
    old = chain.addresses
    orphaned(rig)
    rig.complete(chain)
    rig.offer(rig.readable(HEADER), room(PAGE), rig.writable(1))
    rig.ring.get_used()
    (fresh,) = rig.queue.pop()
    fresh.views_out[0][:] = b"z" * PAGE
    rig.complete(fresh, written=PAGE)
    assert rig.memory.read(DATA.iova, PAGE) == b"z" * PAGE
    assert rig.ring.get_used()[-1][1] == PAGE + 1
    assert fresh.addresses != old
    rig.remap(DATA)
    assert mapping_at(old)
    del chain
    gc.collect()
    assert mapping_at(old) == ""


def test_a_ring_in_memory_that_was_taken_back_is_followed() -> None:
    """Ring and data in one region: the ring is found again in the fresh mapping, before the orphan's end and after."""
    with Rig() as rig:
        first = rig.request(b"x" * 512)
        chain = rig.pop_one()
        second = rig.request(b"y" * 512)
        orphaned(rig)
        rig.complete(chain)
        assert rig.ring.get_used() == [(first, 1)]
        chain = rig.pop_one()
        assert b"".join(chain.views_in) == b"y" * 512
        rig.complete(chain)
        assert rig.ring.get_used() == [(second, 1)]


def test_a_view_taken_by_number_after_the_orphan_is_still_there(rig: Rig) -> None:
    """A chain popped just before the orphan finds its alias as long as any orphan lives, whatever is unmapped."""
    rig.offer(rig.readable(HEADER), at_data(rig, b"abcd"), rig.writable(1))
    chain = rig.pop_one()
    orphaned(rig)
    with rig.quiesced():
        rig.unmap(DATA)
        rig.map(DATA)
    assert bytes(rig.core.aliases[2].readable[:4]) == b"abcd"
    rig.complete(chain)
    with rig.quiesced():
        rig.unmap(DATA)
        rig.map(DATA)
    with pytest.raises(KeyError):
        rig.core.aliases[2]


def test_only_memory_that_is_in_use_is_taken_back(rig: Rig) -> None:
    """Regions that nothing in flight names keep their mapping, and an orphan of none takes nothing."""
    orphaned(rig)
    rig.core.aliases[1]
    rig.core.aliases[2]
    rig.offer(rig.readable(HEADER), room(PAGE), rig.writable(1))
    chain = rig.pop_one()
    orphaned(rig)
    rig.core.aliases[1]
    rig.core.aliases[3]
    rig.complete(chain)
    assert rig.core.orphans == 0


def test_an_orphan_of_a_queue_that_was_reset_is_told_to_nobody(rig: Rig) -> None:
    """After stop, or stop and start, no ring is touched, no interrupt comes, and the new life waits for the orphan."""
    for _ in range(2):
        rig.request()
    first, second = rig.queue.pop()
    orphaned(rig)
    rig.queue.stop()
    before = rig.memory.read(0, RING.size)
    rig.complete(first)
    assert rig.memory.read(0, RING.size) == before
    rig.restart()
    rig.request()
    before = rig.memory.read(0, RING.size)
    assert rig.queue.pop() == []
    rig.queue.clear_kick()
    rig.complete(second)
    assert rig.memory.read(0, RING.size) == before
    assert rig.vectors == []
    assert rig.kicked()
    assert len(rig.queue.pop()) == 1


def test_every_slot_may_be_orphaned_at_once() -> None:
    """A full queue of orphans, reset, leaves a new life that works once they have ended, and no token fits twice."""
    with Rig(life=Life(size=64)) as rig:
        for _ in range(3):
            for _ in range(64):
                rig.offer(rig.writable(1))
            chains = rig.queue.pop()
            orphaned(rig)
            assert (rig.core.busy, rig.core.orphans) == (0, 64)
            rig.restart()
            rig.complete(*chains)
            rig.complete(*chains)
            assert rig.core.orphans == 0
        rig.request()
        assert len(rig.serve()) == 1


def test_a_second_quiesce_with_orphans_has_nothing_in_flight(rig: Rig) -> None:
    """While an orphan lives every further quiesce succeeds at once, and orphaning again takes nothing."""
    rig.request(b"x")
    chain = rig.pop_one()
    orphaned(rig)
    assert rig.core.pause(Pause.QUIESCE) == 0
    rig.core.orphan()
    rig.core.resume(Pause.QUIESCE)
    assert rig.core.orphans == 1
    rig.complete(chain)
    assert rig.core.orphans == 0


def test_the_end_of_an_orphan_counts_as_a_drain(rig: Rig) -> None:
    """A paused queue tells drained_fd of it, so whoever waits looks again."""
    rig.request()
    chain = rig.pop_one()
    rig.core.pause(Pause.QUIESCE)
    rig.core.orphan()
    rig.complete(chain)
    assert rang(rig.core.drained_fd)
    rig.core.resume(Pause.QUIESCE)


@pytest.mark.parametrize("reason", [Pause.QUIESCE, Pause.RESET, Pause.BUS_MASTER])
def test_an_orphan_that_ends_while_its_queue_is_paused_is_told_afterwards(rig: Rig, reason: int) -> None:
    """An orphan does not count as busy, so nothing of it touches the ring or interrupts until the queue resumes."""
    head = rig.request(room=512)
    chain = rig.pop_one()
    rig.core.set_msix(on=False)
    rig.core.pause(reason)
    rig.core.orphan()
    assert rig.core.busy == 0
    rig.complete(chain, written=512)
    assert rig.ring.get_used() == []
    assert (rig.core.peek(), rig.vectors, rig.core.orphans) == (0, [], 0)
    rig.core.resume(reason)
    assert rig.kicked()
    assert rig.queue.pop() == []
    assert rig.ring.get_used() == [(head, 0)]
    assert rig.core.peek() == 1


IN_ORDER = [Life(in_order=True), Life(in_order=True, packed=True)]


@pytest.mark.parametrize("rig", IN_ORDER, ids=["split", "packed"], indirect=True)
def test_orphans_that_end_while_memory_is_away_are_told_in_order(rig: Rig) -> None:
    """RING-INORDER-001: in the order in which they ended, which is that of their chains, wherever they were kept."""
    rig.request()
    rig.request()
    rig.complete(*rig.queue.pop())  # what is free now comes in another order than at first
    rig.ring.get_used()
    heads = [rig.request(room=512) for _ in range(5)]
    chains = rig.queue.pop()
    orphaned(rig)
    with rig.quiesced():
        rig.unmap(RING)
    rig.complete(*chains)
    with rig.quiesced():
        rig.map(RING)
    assert rig.queue.pop() == []
    assert rig.ring.get_used() == [(head, 0) for head in heads]


@pytest.mark.parametrize("rig", IN_ORDER, ids=["split", "packed"], indirect=True)
def test_an_orphan_that_cannot_be_told_holds_back_what_comes_after_it(rig: Rig) -> None:
    """RING-INORDER-001: chains whose status bytes are there wait for one whose byte is not, new ones as well."""
    away = rig.offer(rig.readable(HEADER), room(1))
    heads = [away, rig.request()]
    chains = rig.queue.pop()
    orphaned(rig)
    with rig.quiesced():
        rig.unmap(DATA)
    rig.complete(*chains)
    heads.append(rig.request())
    assert rig.queue.pop() == []
    assert rig.ring.get_used() == []
    with rig.quiesced():
        rig.map(DATA)
    assert rig.kicked()
    assert [head for head, _ in rig.serve()] == heads


def test_an_orphan_that_cannot_be_told_holds_nobody_back_without_in_order(rig: Rig) -> None:
    """RING-SPLIT-016: what can be told is, and new chains are served."""
    away = rig.offer(rig.readable(HEADER), room(1))
    heads = [rig.request()]
    chains = rig.queue.pop()
    orphaned(rig)
    with rig.quiesced():
        rig.unmap(DATA)
    rig.complete(*chains)
    heads.append(rig.request())
    assert [head for head, _ in rig.serve()] == heads
    with rig.quiesced():
        rig.map(DATA)
    assert [head for head, _ in rig.serve()] == [away]


def test_a_queue_that_was_not_paused_waits_while_memory_is_taken_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue reset pauses one queue only: the others pop nothing before the fresh mappings are known."""
    rig.offer(rig.readable(HEADER), room(PAGE), rig.writable(1))
    chain = rig.pop_one()
    popped: list[list[Chain]] = []

    def meanwhile(described: object) -> Alias:
        rig.complete(chain)
        rig.offer(rig.readable(HEADER), room(PAGE), rig.writable(1))
        popped.append(rig.queue.pop())
        return Alias(described)

    monkeypatch.setattr("vmmblk.memory.Alias", meanwhile)
    rig.core.orphan()
    assert popped == [[]]
    assert rig.kicked()
    assert len(rig.queue.pop()) == 1


def test_status_and_header_memory_are_not_taken_back(rig: Rig) -> None:
    """Only what the disk sees is: an orphan whose data lie elsewhere is answered in place."""
    rig.request()
    chain = rig.pop_one()
    orphaned(rig)
    rig.complete(chain)
    assert len(rig.ring.get_used()) == 1
    assert rig.core.aliases[1]


def test_a_core_with_views_kept_can_be_closed() -> None:
    """A block that keeps a view for ever harms nobody."""
    with Rig(pieces=(RING, DATA), layout=(Range(0, 128 * PAGE),)) as rig:
        rig.offer(rig.readable(HEADER), room(PAGE), rig.writable(1))
        chain = rig.pop_one()
        rig.complete(chain)
    chain.views_out[0][:] = b"x" * PAGE
    assert chain.views_out[0].tobytes() == b"x" * PAGE


def test_a_core_without_queues_or_memory_closes() -> None:
    """Nothing is needed to be able to stop."""
    core = Core(1, 256)
    assert (core.busy, core.orphans) == (0, 0)
    core.close()


# ---- truncated files: each in a process of its own, for it may die

PREPARE = """
import dataclasses, faulthandler, os, sys
faulthandler.enable()
sys.path.insert(0, {tests!r})
from rings import *
RING, DATA = Range(0, 64 * PAGE), Range(64 * PAGE, 64 * PAGE)
rig = Rig(pieces=(RING, DATA), layout=(Range(0, 128 * PAGE),))
"""


def run_apart(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a rig in a process of its own."""
    prepare = PREPARE.format(tests=str(Path(__file__).parent))
    return subprocess.run(
        [sys.executable, "-c", prepare + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def survives(script: str) -> None:
    """The process must come to its end."""
    result = run_apart(textwrap.dedent(script) + "\nprint('alive')\nsys.stdout.flush()\nos._exit(0)\n")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "alive", "")


@pytest.mark.parametrize("page_size", [PAGE, 1 << 21, 1 << 40])
def test_views_of_a_truncated_file_read_as_zeros(page_size: int) -> None:
    """Beyond the end of the file, and nowhere else, there is private memory, whatever page size the client claims."""
    survives(f"""
        rig.unmap(DATA)
        rig.core.map(dataclasses.replace(rig.region(DATA), page_size={page_size}))
        rig.offer(rig.readable(HEADER), Segment(DATA.iova, 64 * PAGE, writable=True), rig.writable(1))
        chain = rig.pop_one()
        view = chain.views_out[0]
        view[:] = b"x" * len(view)
        canary = bytearray(b"c" * (1 << 20))
        os.ftruncate(rig.memory.fd, 80 * PAGE)
        assert view[20 * PAGE] == 0 and view[-1] == 0
        assert {page_size} > PAGE or bytes(view[: 16 * PAGE]) == b"x" * 16 * PAGE
        view[-5:] = b"abcde"
        assert bytes(view[-5:]) == b"abcde"
        assert bytes(view[16 * PAGE : -5]) == bytes(48 * PAGE - 5)
        rig.complete(chain)
        assert len(rig.ring.get_used()) == 1
        assert set(canary) == {{ord("c")}}
    """)


def test_a_ring_in_a_truncated_file_is_survived() -> None:
    """Whatever the ring's operations make of zeros, they do not raise SIGBUS; nor does a later unmap."""
    survives("""
        for _ in range(3):
            rig.request(b"x" * 512)
        chains = rig.queue.pop()
        os.ftruncate(rig.memory.fd, 0)
        for chain in chains:
            rig.complete(chain)
        try:
            rig.queue.pop()
        except Exception as error:
            assert type(error).__name__ == "LostMemory", error
        else:
            raise AssertionError
        rig.queue.looks_unshared
        rig.queue.stop()
        rig.unmap(DATA)
        rig.unmap(RING)
    """)


def test_an_orphan_in_a_truncated_file_is_survived() -> None:
    """Copying what is in flight meets the hole, too."""
    survives("""
        rig.offer(rig.readable(HEADER), Segment(DATA.iova, 64 * PAGE, writable=False), rig.writable(1))
        chain = rig.pop_one()
        os.ftruncate(rig.memory.fd, 80 * PAGE)
        rig.core.pause(1)
        rig.core.orphan()
        rig.core.resume(1)
        assert sum(chain.views_in[0]) == 0
        rig.complete(chain)
        assert len(rig.ring.get_used()) == 1
    """)


def test_a_system_call_into_a_truncated_file_fails_with_efault() -> None:
    """The kernel's own accesses raise no signal: the block gets an error."""
    survives("""
        rig.offer(rig.readable(HEADER), Segment(DATA.iova, PAGE, writable=True), rig.writable(1))
        chain = rig.pop_one()
        os.ftruncate(rig.memory.fd, 0)
        source = os.open("/proc/self/exe", os.O_RDONLY)
        try:
            os.preadv(source, chain.views_out, 0)
        except OSError as error:
            assert error.errno == 14, error
        else:
            raise AssertionError
    """)


def test_a_bus_error_elsewhere_still_kills_with_a_report() -> None:
    """Not ours: Python's faulthandler reports it and the process dies of SIGBUS."""
    result = run_apart("""
        import mmap
        fd = os.memfd_create("elsewhere")
        os.ftruncate(fd, PAGE)
        elsewhere = mmap.mmap(fd, PAGE)
        os.ftruncate(fd, 0)
        elsewhere[0]
    """)
    assert result.returncode == -signal.SIGBUS
    assert "Bus error" in result.stderr
    assert "<string>" in result.stderr


def test_a_bus_error_that_is_sent_still_kills() -> None:
    """A signal from another process has no address."""
    result = run_apart("os.kill(os.getpid(), 7)\nimport time\ntime.sleep(10)\n")
    assert result.returncode == -signal.SIGBUS
    assert "Bus error" in result.stderr
