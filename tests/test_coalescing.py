"""Interrupts that the core holds back for more completions, seen from the driver's side of the ring."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

import pytest
from rings import INDIRECT, PAGE, Descriptor, Life, Range, Rig

from vmmblk.memory import Pause
from vmmblk.ring import CorruptRing

if TYPE_CHECKING:
    from vmmblk.ring import Chain

LIVES = [
    Life(packed=packed, event_idx=event_idx, indirect=True) for packed in (False, True) for event_idx in (False, True)
]
NAMES = ["split", "split-event", "packed", "packed-event"]
FOR_EVER = 3_600_000_000  # microseconds

lives = pytest.mark.parametrize("life", LIVES, ids=NAMES)
"""The test holds for either format of ring, and either way to suppress notifications."""


def rig(life: Life, count: int = 3, microseconds: int = FOR_EVER) -> Rig:
    """A core that holds interrupts back, and a driver that asks for one at the first completion."""
    made = Rig(life=life, coalesce=(count, microseconds))
    assert not made.ring.arm()
    return made


def taken(rig: Rig, count: int) -> list[Chain]:
    """So many requests in flight."""
    for _ in range(count):
        rig.request()
    chains = rig.queue.pop()
    assert len(chains) == count
    return chains


def told(rig: Rig) -> int:
    """How many interrupts came since this was last asked."""
    count = len(rig.vectors)
    del rig.vectors[:count]
    return count


def used(rig: Rig) -> int:
    """How many requests the driver finds used; it asks for nothing."""
    return len(rig.ring.get_used())


def seen(rig: Rig) -> int:
    """How many requests the driver finds used; it asks for an interrupt at the next."""
    count = used(rig)
    assert not rig.ring.arm()
    return count


def tell_now(rig: Rig) -> None:
    """Have the core raise what it holds back, if the driver wants it."""
    rig.core.pause(Pause.STOP)
    rig.core.resume(Pause.STOP)


@lives
def test_completions_share_an_interrupt(life: Life) -> None:
    """The driver sees each at once, and is told of three."""
    with rig(life) as r:
        *first, last = taken(r, 8)
        found = []
        for chain in first:
            r.complete(chain)
            found.append((seen(r), told(r)))
        assert found == [(1, 0), (1, 0), (1, 1), (1, 0), (1, 0), (1, 1), (1, 0)]
        r.complete(last)
        assert (seen(r), told(r)) == (1, 1)


@lives
def test_the_last_in_flight_is_told_at_once(life: Life) -> None:
    """Who waits for one request after the other waits no longer than without."""
    with rig(life) as r:
        for _ in range(5):
            r.complete(*taken(r, 1))
            assert (seen(r), told(r)) == (1, 1)


@lives
def test_what_comes_together_is_told_together(life: Life) -> None:
    """More at once than may be held back are one interrupt."""
    with rig(life) as r:
        first, *rest = taken(r, 6)
        r.complete(*rest)
        assert told(r) == 1
        r.complete(first)
        assert told(r) == (not life.event_idx)  # the driver has asked for no second


@lives
def test_a_request_that_waits_in_the_ring_is_in_flight(life: Life) -> None:
    """It will be served at once, and its completion tells of both; even if it is taken back before."""
    with rig(life) as r:
        [chain] = taken(r, 1)
        r.request()
        r.complete(chain)
        assert (seen(r), told(r)) == (1, 0)
        r.complete(r.pop_one())
        assert (seen(r), told(r)) == (1, 1)


@lives
def test_who_pops_tells_what_is_due(life: Life) -> None:
    """However busy the server is otherwise."""
    with rig(life, 100, 1000) as r:
        first, *_rest = taken(r, 3)
        began = time.monotonic()
        r.complete(first)
        while not told(r):
            assert not r.queue.pop()
        assert time.monotonic() - began >= 0.001


@lives
def test_who_sleeps_is_woken(life: Life) -> None:
    """By the timer, when an interrupt is due; then it is quiet, also if another completion was told of it before."""
    with rig(life, 2, 2000) as r:
        chains = taken(r, 6)
        for count in (1, 2, 1):
            began = time.monotonic()
            for _ in range(count):
                r.complete(chains.pop())
            while not told(r):
                assert select.select([r.queue.timer_fd], [], [], 10)[0]
                r.queue.tell()
            assert count == 2 or time.monotonic() - began >= 0.002
            assert not select.select([r.queue.timer_fd], [], [], 0.005)[0]
            seen(r)


@lives
def test_nothing_is_told_before_its_time(life: Life) -> None:
    """Neither by who asks, nor by who pops."""
    with rig(life) as r:
        first, *_rest = taken(r, 3)
        r.complete(first)
        r.queue.tell()
        assert not r.queue.pop()
        assert not select.select([r.queue.timer_fd], [], [], 0)[0]
        assert not told(r)


REASONS = [Pause.QUIESCE, Pause.RESET, Pause.BUS_MASTER, Pause.STOP, Pause.ORPHAN, Pause.SUSPEND]


@pytest.mark.parametrize("reason", REASONS)
@lives
def test_a_pause_tells_at_once(life: Life, reason: int) -> None:
    """And nothing is held back meanwhile: whoever drains waits for requests, not for interrupts."""
    with rig(life) as r:
        first, second, third, last = taken(r, 4)
        r.complete(first)
        assert (used(r), told(r)) == (1, 0)
        assert r.core.pause(reason) == 3
        assert (seen(r), told(r)) == (0, 1)
        r.complete(second)
        assert (seen(r), told(r), r.core.busy) == (1, 1, 2)
        r.complete(third, last)
        assert (seen(r), told(r), r.core.busy) == (2, 1, 0)
        assert os.eventfd_read(r.core.drained_fd)
        r.core.resume(reason)
        first, second = taken(r, 2)
        r.complete(first)
        assert (seen(r), told(r)) == (1, 0)


@lives
def test_memory_that_moves_loses_no_interrupt(life: Life) -> None:
    """What was held back is told before the ring goes."""
    piece = Range(0, 1 << 20)
    with rig(life) as r:
        first, second = taken(r, 2)
        r.complete(first)
        with r.quiesced():
            assert (seen(r), told(r)) == (1, 1)
            assert r.core.busy == 1
            r.complete(second)
            del first, second
            r.unmap(piece)
            r.map(piece)
        assert (seen(r), told(r)) == (1, 1)
        r.complete(*taken(r, 1))
        assert (seen(r), told(r)) == (1, 1)


@lives
def test_the_wish_counts_when_it_is_told(life: Life) -> None:
    """A driver that has turned interrupts off by then, or has seen what there was, gets none."""
    with rig(life) as r:
        first, second, third, *_rest = taken(r, 6)
        r.complete(first)
        r.ring.disarm()
        tell_now(r)
        assert (used(r), told(r)) == (1, 0)
        r.complete(second)
        assert r.ring.arm()  # one is there already, so it looks again
        tell_now(r)
        assert told(r) == 1
        assert seen(r) == 1
        r.complete(third)
        assert (seen(r), told(r)) == (1, 0)
        tell_now(r)
        assert told(r) == (not life.event_idx)


@pytest.mark.parametrize("parts", [1, 3], ids=["short", "long"])
@lives
def test_positions_do_not_go_round(life: Life, parts: int) -> None:
    """At the latest a ring's length is told, so that what the driver waits for is not mistaken."""
    with rig(life, 1 << 30) as r:
        [_kept] = taken(r, 1)
        last = unheard = 0
        for _ in range(100):
            r.offer(*[r.readable(bytes(16)) for _ in range(parts)], r.writable(1))
            r.complete(r.pop_one())
            last += 1
            unheard = 0 if told(r) else unheard + 1
            assert unheard < life.size
            assert seen(r) == 1
        assert unheard < last


@lives
def test_a_queue_that_starts_again_owes_nothing(life: Life) -> None:
    """What was held back in one life is not told in the next."""
    with rig(life) as r:
        first, second = taken(r, 2)
        r.complete(first)
        r.queue.stop()
        r.complete(second)
        r.ring.close()
        r.rings[0] = r.new_ring(0)
        r.start()
        assert not r.queue.pop()
        r.queue.tell()
        assert not told(r)
        r.complete(*taken(r, 1))
        assert (seen(r), told(r)) == (1, 1)


@lives
def test_an_orphan_is_told_with_what_was_held_back(life: Life) -> None:
    """When its memory is there again, whatever else is in flight."""
    piece = Range(0, 1 << 20)
    with rig(life) as r:
        orphan, *_ = taken(r, 1)
        r.core.pause(Pause.QUIESCE)
        r.core.orphan()
        r.complete(orphan)
        r.unmap(piece)
        r.map(piece)
        r.core.resume(Pause.QUIESCE)
        assert not told(r)
        assert not r.queue.pop()
        assert (seen(r), told(r)) == (1, 1)


@lives
def test_a_ring_that_breaks_is_told_of_what_was_served(life: Life) -> None:
    """What looked like more to come was nothing, so nothing is waited for."""
    with rig(life) as r:
        [chain] = taken(r, 1)
        r.offer_raw(Descriptor(PAGE, 15, INDIRECT))
        r.complete(chain)
        assert not told(r)
        with pytest.raises(CorruptRing):
            r.queue.pop()
        assert told(r) == 1


@lives
def test_a_ring_out_of_reach_is_told_of(life: Life) -> None:
    """If what the driver wants cannot be read any more, it gets an interrupt too many rather than one too few."""
    with rig(life) as r:
        first, *_rest = taken(r, 3)
        r.complete(first)
        r.ring.disarm()
        r.unmap(Range(0, 1 << 20))
        tell_now(r)
        assert told(r) == 1


def test_without_it_there_is_no_timer() -> None:
    """Each completion is told, and nobody need ask."""
    with Rig() as r:
        assert r.queue.timer_fd == -1
        first, *_rest = taken(r, 3)
        r.complete(first)
        r.queue.tell()
        assert told(r) == 1
