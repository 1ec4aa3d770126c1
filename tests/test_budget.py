"""Bounds on what others can cause."""

from __future__ import annotations

import asyncio

import pytest

from vmmblk.budget import Patience, Room


def test_memory_is_shared_in_the_order_of_asking() -> None:
    """Whoever does not fit waits, and so do those behind; what is given back goes to the next."""
    events: list[str] = []
    allowed = {name: asyncio.Event() for name in "abcd"}

    async def use(room: Room, name: str, size: int) -> None:
        async with room.take(size):
            events.append(f"{name} in")
            await allowed[name].wait()
        events.append(f"{name} out")

    async def main() -> None:
        room = Room(10)
        tasks = [
            asyncio.ensure_future(use(room, name, size)) for name, size in (("a", 6), ("b", 4), ("c", 7), ("d", 1))
        ]
        for name in "bacd":
            await settle()
            events.append("|")
            allowed[name].set()
        await asyncio.gather(*tasks)

    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert " ".join(events) == "a in b in | b out | a out c in d in | c out | d out"


def test_who_needs_more_than_there_is_gets_all_alone() -> None:
    """It waits until nobody has any, and then nobody else has."""
    held = most = 0

    async def use(room: Room, size: int) -> None:
        nonlocal held, most
        async with room.take(size):
            held += size
            most = max(most, held)
            await asyncio.sleep(0)
            held -= size

    async def main() -> None:
        room = Room(10)
        await asyncio.gather(*(use(room, size) for size in (3, 50, 0, 10, 4, 6)))

    asyncio.run(main())
    assert most == 50


def test_what_was_taken_is_given_back_after_an_error() -> None:
    """A request that fails leaves the room as it was."""

    async def main() -> None:
        room = Room(10)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with room.take(10):
                    _ = 1 / 0
        async with room.take(10):
            pass

    asyncio.run(asyncio.wait_for(main(), 5))


def test_patience_grows_while_sleep_is_short() -> None:
    """From nothing, twice as long each time, up to the most."""
    patience = Patience(50_000, adaptive=True)
    windows = [patience.window]
    for _ in range(7):
        patience.slept(49_999)
        windows.append(patience.window)
    assert windows == [0, 2_000, 4_000, 8_000, 16_000, 32_000, 50_000, 50_000]


def test_patience_ends_when_nothing_comes() -> None:
    """Half as long each time, then none: who is idle uses no processor."""
    patience = Patience(50_000, adaptive=True)
    for _ in range(6):
        patience.slept(0)
    windows = []
    for _ in range(6):
        patience.slept(50_000)
        windows.append(patience.window)
    assert windows == [25_000, 12_500, 6_250, 3_125, 1_562, 0]


@pytest.mark.parametrize(("most", "endless"), [(0, False), (7, False), (None, True)])
def test_patience_can_be_fixed(most: int | None, endless: bool) -> None:
    """However long the sleep."""
    patience = Patience(most, adaptive=False)
    before = patience.window
    for duration in (0, 10**12):
        patience.slept(duration)
    assert patience.window == before
    assert patience.endless is endless
    assert before == most or (endless and before > 10**18)


def test_endless_patience_does_not_adapt() -> None:
    """Even if it is asked to."""
    patience = Patience(None, adaptive=True)
    patience.slept(10**12)
    assert patience.window > 10**18
