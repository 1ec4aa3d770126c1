"""Runs checks one by one, whatever the server does."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk.client.errors import NeedsReset, ProtocolError, RemoteError, StatusError
from vmmblk.conform.check import Broken, Check, Harm, NotOffered, NotTestable, Outcome
from vmmblk.conform.target import SCRATCH_SECTORS, TAIL_SECTORS, Target
from vmmblk.spec import SECTOR_SIZE, Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from vmmblk.conform.target import Facts, Options

__all__ = ["Result", "keep", "put_back", "run", "settle"]

_CHUNK_SECTORS = 256


@dataclass(frozen=True, slots=True)
class Result:
    """What one check came to, in one ring format if it is run in each."""

    check: Check
    ring: str
    """"split", "packed", or nothing."""
    outcome: Outcome
    detail: str
    """What was seen, or why not; empty if passed."""
    seconds: float

    @property
    def name(self) -> str:
        """The name of the check and the ring format."""
        return f"{self.check.name}[{self.ring}]" if self.ring else self.check.name


def run(address: Path, options: Options, chosen: Iterable[Check]) -> Iterator[Result]:
    """Run ``chosen``, giving each result when it is there.

    After each check the server must serve as it did before it.  Once it cannot be reached any more the rest is not
    tested.  Raises OSError if it cannot be reached to begin with.
    """
    facts = Target(address, options).facts
    # a disk that never gives back what was written, and says so in its own checks, is not to blame every one of them
    healthy, gone = not _prove(Target(address, options, facts))[0], ""
    for each in chosen:
        for ring in _rings(each, facts.offer):
            if gone:
                yield Result(each, ring, Outcome.NOT_TESTED, gone, 0.0)
                continue
            result = settle(Target(address, options, facts, packed=ring == "packed"), each, ring)
            if result.outcome not in (Outcome.NOT_OFFERED, Outcome.NOT_TESTED):
                complaint, reached = _prove(Target(address, options, facts))
                if complaint and healthy:
                    before = f"{result.detail}; " if result.detail else ""
                    detail = f"{before}afterwards the server does not serve: {complaint}"
                    result = Result(each, ring, Outcome.BROKEN, detail, result.seconds)
                healthy = not complaint
                gone = "" if reached else f"the server is gone since {result.name}"
            yield result


def settle(target: Target, each: Check, ring: str = "") -> Result:
    """Run one check within its time."""
    began = time.monotonic()
    overrun = threading.Event()

    def stop() -> None:
        overrun.set()
        target.abort()

    timer = threading.Timer(target.options.limit, stop)
    timer.daemon = True
    timer.start()
    try:
        outcome, detail = _attempt(target, each)
    finally:
        timer.cancel()
    if overrun.is_set():
        outcome, detail = Outcome.BROKEN, f"did not end within {target.options.limit:g} s; last: {detail or 'nothing'}"
    return Result(each, ring, outcome, detail, time.monotonic() - began)


def keep(address: Path, options: Options, facts: Facts) -> dict[int, bytes]:
    """What the disk holds where checks write, by sector; nothing if they may not.

    Raises OSError, StatusError, NeedsReset.
    """
    if facts.offer & (Feature.BLK_RO.mask | Feature.BLK_ZONED.mask):
        return {}
    head = range(min(facts.capacity, SCRATCH_SECTORS))
    tail = range(max(len(head), (facts.capacity - TAIL_SECTORS) // 8 * 8), facts.capacity)
    with Target(address, options, facts).driver() as driver:
        return {at: driver.read(at, n * SECTOR_SIZE) for area in (head, tail) for at, n in _pieces(area)}


def put_back(address: Path, options: Options, saved: Mapping[int, bytes]) -> None:
    """Write what ``keep`` returned.  Raises OSError, StatusError, NeedsReset."""
    if not saved:
        return
    with Target(address, options).driver() as driver:
        for at, data in saved.items():
            driver.write(at, data)
        if driver.has(Feature.BLK_FLUSH):
            driver.flush()


def _pieces(area: range) -> Iterator[tuple[int, int]]:
    for at in area[::_CHUNK_SECTORS]:
        yield at, min(_CHUNK_SECTORS, area.stop - at)


def _rings(each: Check, offer: int) -> list[str]:
    if not each.each_ring:
        return [""]
    return ["split", "packed"] if offer & Feature.RING_PACKED.mask else ["split"]


def _attempt(target: Target, each: Check) -> tuple[Outcome, str]:
    differs = Outcome.BROKEN if each.binding else Outcome.OPEN
    try:
        target.require(*each.features)
        if each.destructive and not target.options.destructive:
            return Outcome.NOT_TESTED, "takes --destructive"
        each.run(target)
    except NotOffered as reason:
        return Outcome.NOT_OFFERED, str(reason)
    except NotTestable as reason:
        return Outcome.NOT_TESTED, str(reason)
    except Harm as seen:
        return Outcome.BROKEN, str(seen)
    except Broken as seen:
        return differs, str(seen)
    except NeedsReset:
        return differs, "the device set DEVICE_NEEDS_RESET"
    except StatusError as status:
        return differs, f"a request was completed with {status}"
    except RemoteError as error:
        return differs, f"the server refused a message: {error}"
    except ProtocolError as error:
        return Outcome.BROKEN, str(error)
    except ConnectionError as error:
        return Outcome.BROKEN, f"the server closed the connection: {error}"
    except TimeoutError as error:
        return differs, f"timeout: {error}"
    except Exception as error:  # noqa: BLE001 - whatever the device made a check stumble over, the others go on
        return Outcome.BROKEN, f"the check stumbled: {type(error).__name__}: {error}"
    return Outcome.PASSED, ""


def _prove(target: Target) -> tuple[str, bool]:
    """Whether the server serves: (what is wrong, or nothing; whether it can be reached)."""
    if complaint := _complaint(lambda: _reach(target)):
        return complaint, False
    return _complaint(lambda: _serve(target)), True


def _complaint(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except (OSError, Broken, NeedsReset, StatusError) as error:
        return str(error) or type(error).__name__
    return ""


def _reach(target: Target) -> None:
    with target.connection():
        pass


def _serve(target: Target) -> None:
    with target.driver() as driver:
        if not target.facts.capacity:
            return
        unit = target.facts.block_size
        before = driver.read(0, unit)
        try:
            target.room(target.block_sectors)
        except (NotOffered, NotTestable):
            return
        pattern = bytes(byte ^ 0xFF for byte in before)
        driver.write(0, pattern)
        if driver.read(0, unit) != pattern:
            raise Broken("what is written is not what is read")
