"""Coroutines that are begun at once and become tasks only if they wait."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from vmmblk.tasks import Starter

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    Coroutines = list[Coroutine[Any, Any, None]]

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="fresh")


def run(make: Callable[[list[object]], Coroutines], *, collect: bool = True) -> list[object]:
    """Begin the coroutines in one turn of a loop and let all end; what they noted, and "turn" for the turn's end."""
    notes: list[object] = []
    loop = asyncio.new_event_loop()
    starter = Starter(loop)

    def begin() -> None:
        starter.begin(iter(make(notes)))
        notes.append("turn")

    async def main() -> None:
        loop.call_soon(begin)
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            while starter.waiting:
                await asyncio.wait(starter.waiting)
        starter.close()

    try:
        loop.run_until_complete(main())
        assert not asyncio.all_tasks(loop)
    finally:
        loop.close()
        if collect:
            gc.collect()  # what was lost says so in the log, which every test looks at
    return notes


def test_what_does_not_wait_ends_at_once() -> None:
    """In the order in which it was given, before the turn of the loop is over."""

    async def quick(notes: list[object], number: int) -> None:
        notes.append(number)

    assert run(lambda notes: [quick(notes, each) for each in range(3)]) == [0, 1, 2, "turn"]


def test_what_waits_holds_nobody_up() -> None:
    """Those behind it are begun; it goes on later."""

    async def slow(notes: list[object], number: int, gate: asyncio.Future[None]) -> None:
        notes.append(number)
        await gate
        notes.append(f"{number} again")

    def make(notes: list[object]) -> Coroutines:
        loop = asyncio.get_running_loop()
        gates = [loop.create_future() for _ in range(3)]

        def turn(number: int) -> None:
            if number >= 0:  # until then they become tasks
                gates[number].set_result(None)
            if number < 2:
                loop.call_soon(turn, number + 1)

        turn(-5)
        return [slow(notes, each, gates[each]) for each in (2, 0, 1)]

    assert run(make) == [2, 0, 1, "turn", "0 again", "1 again", "2 again"]


def test_all_that_wait_for_one_future_go_on() -> None:
    """A disk may have its first requests wait for one thing, as a connection."""

    def make(notes: list[object]) -> Coroutines:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.001, future.set_result, "connected")

        async def wait() -> None:
            notes.append(await future)

        return [wait() for _ in range(3)]

    assert run(make) == ["turn", "connected", "connected", "connected"]


def test_what_is_awaited_may_fail() -> None:
    """The exception comes out of the await."""

    def make(notes: list[object]) -> Coroutines:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, ValueError("no"))

        async def wait() -> None:
            try:
                await future
            except ValueError as error:
                notes.append(str(error))

        return [wait(), wait()]

    assert run(make) == ["turn", "no", "no"]


class Bad:
    """Awaiting it yields what no event loop understands."""

    def __await__(self) -> Any:
        yield 5


def test_a_bad_awaitable_fails_where_it_is_awaited() -> None:
    """As in any task."""

    async def wait(notes: list[object]) -> None:
        try:
            await Bad()
        except RuntimeError as error:
            notes.append(str(error).partition(":")[0])

    assert run(lambda notes: [wait(notes)]) == ["turn", "Task got bad yield"]


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.001])
def test_timeouts_work(seconds: float) -> None:
    """Even one that is over before the coroutine has become a task; what was awaited is cancelled."""

    async def forever(notes: list[object]) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            notes.append("cancelled")
            raise

    async def wait(notes: list[object], *, inner: bool) -> None:
        try:
            async with asyncio.timeout(seconds):
                await (asyncio.ensure_future(forever(notes)) if inner else forever(notes))
        except TimeoutError:
            notes.append("timeout")
        current = asyncio.current_task()
        assert current is not None
        notes.append(current.cancelling())
        await asyncio.sleep(0)

    notes = run(lambda notes: [wait(notes, inner=False)])
    assert [note for note in notes if note != "turn"] == ["cancelled", "timeout", 0]
    notes = run(lambda notes: [wait(notes, inner=True)])
    assert [note for note in notes if note != "turn"] in (
        ["cancelled", "timeout", 0],
        ["timeout", 0],  # cancelled before it began
    )


def test_waiting_with_a_limit_and_in_groups_works() -> None:
    """``wait_for`` and ``TaskGroup``, which cancel the task that uses them."""

    async def wait(notes: list[object]) -> None:
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 0.001)
        except TimeoutError:
            notes.append("timeout")

    async def group(notes: list[object]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fail())
                await asyncio.Event().wait()
        except* ValueError:
            notes.append("group")

    async def fail() -> None:
        raise ValueError

    notes = run(lambda notes: [wait(notes), group(notes)])
    assert sorted(map(str, notes)) == ["group", "timeout", "turn"]


def test_the_current_task_stays_the_same() -> None:
    """From the beginning on, so that locks and scopes find their owner; who waits shares it with nobody."""

    async def wait(notes: list[object]) -> None:
        before = asyncio.current_task()
        await asyncio.sleep(0)
        assert asyncio.current_task() is before
        notes.append(id(before))

    notes = run(lambda notes: [wait(notes) for _ in range(3)])
    assert len(set(notes[1:])) == 3


def test_a_context_variable_is_taken_back_after_waiting() -> None:
    """Context is the same before and after; that of one that waits is its own."""

    async def wait(notes: list[object]) -> None:
        notes.append(variable.get())
        token = variable.set("changed")
        await asyncio.sleep(0)
        notes.append(variable.get())
        variable.reset(token)

    notes = run(lambda notes: [wait(notes), wait(notes)])
    assert notes == ["fresh", "fresh", "turn", "changed", "changed"]
    assert variable.get() == "fresh"


@pytest.mark.parametrize("waits", [False, True], ids=["ends", "waits"])
def test_who_cancels_itself_cancels_nobody_else(waits: bool) -> None:
    """Whether it waits afterwards or not."""

    async def cancel(notes: list[object]) -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        try:
            if waits:
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            notes.append("cancelled")

    async def other(notes: list[object]) -> None:
        await asyncio.sleep(0)
        notes.append("ended")

    notes = run(lambda notes: [cancel(notes), other(notes), cancel(notes), other(notes)])
    assert notes.count("ended") == 2
    assert notes.count("cancelled") == 2 * waits


def test_a_spare_task_is_used_again_later() -> None:
    """What waits in a later turn than the one in which its task was made goes on as well."""
    notes: list[object] = []

    async def quick() -> None:
        notes.append("quick")

    async def slow() -> None:
        await asyncio.sleep(0)
        notes.append("slow")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        starter = Starter(loop)
        for coroutine in (quick(), slow(), quick(), slow()):
            loop.call_soon(starter.begin, iter([coroutine]))
            for _ in range(5):
                await asyncio.sleep(0)
        starter.close()

    asyncio.run(main())
    assert notes == ["quick", "slow", "quick", "slow"]


def test_what_has_ended_is_freed_at_once() -> None:
    """Buffers are guest memory, and a garbage collection takes long."""
    kept: list[weakref.ref[Any]] = []

    class Buffer:
        """What a request holds."""

    async def wait(notes: list[object]) -> None:
        buffer = Buffer()
        kept.extend((weakref.ref(buffer), weakref.ref(asyncio.current_task())))
        await asyncio.sleep(0)
        notes.append(buffer)
        notes.clear()

    gc.collect()
    gc.disable()
    try:
        run(lambda notes: [wait(notes), wait(notes)], collect=False)
        assert [each() for each in kept] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_no_task_is_current_after_a_failure(error: type[BaseException]) -> None:
    """What a coroutine lets out all the same goes to the caller, and the starter can be used on."""
    notes: list[object] = []

    async def fail() -> None:
        raise error

    async def slow() -> None:
        await asyncio.sleep(0)
        notes.append("slow")

    def begin(starter: Starter) -> None:
        with pytest.raises(error):
            starter.begin(iter([fail()]))
        notes.append(asyncio.current_task())
        starter.begin(iter([slow()]))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        starter = Starter(loop)
        loop.call_soon(begin, starter)
        await asyncio.sleep(0)
        await asyncio.wait(starter.waiting)
        starter.close()

    asyncio.run(main())
    assert notes == [None, "slow"]
