"""Zones as a state machine: every request in every state, resources, write pointers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmmblk.block import ZoneModel, ZoneState, ZoneType, Zoning
from vmmblk.errors import (
    BlockError,
    ZoneActiveResource,
    ZoneInvalidCommand,
    ZoneOpenResource,
    ZoneUnalignedWritePointer,
)
from vmmblk.filters.zone_table import Piece, ZoneTable

if TYPE_CHECKING:
    from collections.abc import Callable

ZONE = 16  # sectors
CAPACITY = 12
EMPTY, IMPLICIT, EXPLICIT, CLOSED, FULL, READ_ONLY, OFFLINE = (
    ZoneState.EMPTY,
    ZoneState.IMPLICIT_OPEN,
    ZoneState.EXPLICIT_OPEN,
    ZoneState.CLOSED,
    ZoneState.FULL,
    ZoneState.READ_ONLY,
    ZoneState.OFFLINE,
)
STATES = (EMPTY, IMPLICIT, EXPLICIT, CLOSED, FULL, READ_ONLY, OFFLINE)
HOLDS = {EMPTY: 0, FULL: CAPACITY}
"""Sectors that a zone holds in a state, if not 4."""


def a_table(
    *, model: ZoneModel = ZoneModel.HOST_MANAGED, max_open: int = 0, max_active: int = 0, granularity: int = 512
) -> ZoneTable:
    """Eight zones of 16 sectors, 12 of them writable; the first zone is conventional, the last has 8 sectors."""
    zoning = Zoning(model, ZONE, max_open, max_active, 8, granularity)
    return ZoneTable(zoning, 7 * ZONE + 8, 512, conventional=1, zone_capacity=CAPACITY)


def write(table: ZoneTable, zone: int, sectors: int, offset: int | None = None) -> None:
    """Check and write, at the write pointer unless told otherwise."""
    piece = Piece(zone, table.written(zone) if offset is None else offset, sectors)
    table.check_write(piece)
    table.write(piece)


def append(table: ZoneTable, zone: int, sectors: int) -> None:
    """Check and append."""
    table.write(table.check_append(zone, sectors))


def open_zone(table: ZoneTable, zone: int) -> None:
    """OPEN."""
    table.check_open(zone)
    table.open_zone(zone)


def close_zone(table: ZoneTable, zone: int) -> None:
    """CLOSE."""
    table.check_close(zone)
    table.close_zone(zone)


def finish(table: ZoneTable, zone: int) -> None:
    """FINISH."""
    table.check_finish(zone)
    table.finish(zone)


def reset(table: ZoneTable, zone: int) -> None:
    """RESET."""
    table.check_reset(zone)
    table.reset(zone)


def reset_all(table: ZoneTable, _zone: int) -> None:
    """RESET_ALL."""
    for zone in table.resettable():
        table.reset(zone)


def bring(table: ZoneTable, zone: int, state: ZoneState) -> None:
    """Bring an empty zone into a state, with 4 sectors written unless it is empty or full."""
    if state is FULL:
        write(table, zone, CAPACITY)
    elif state is not EMPTY:
        write(table, zone, 4)
    if state is EXPLICIT:
        open_zone(table, zone)
    elif state is CLOSED:
        close_zone(table, zone)
    elif state in (READ_ONLY, OFFLINE):
        table.check_fail(zone, state)
        table.fail(zone, state)
    assert table.state(zone) is state


REQUESTS: dict[str, Callable[[ZoneTable, int], None]] = {
    "write": lambda table, zone: write(table, zone, 2),
    "append": lambda table, zone: append(table, zone, 2),
    "open": open_zone,
    "close": close_zone,
    "finish": finish,
    "reset": reset,
    "reset_all": reset_all,
}

# The table in docs/zoned.md; None is ZONE_INVALID_CMD.
OUTCOMES: dict[ZoneState, tuple[ZoneState | None, ...]] = {
    EMPTY: (IMPLICIT, IMPLICIT, EXPLICIT, None, FULL, EMPTY, EMPTY),
    IMPLICIT: (IMPLICIT, IMPLICIT, EXPLICIT, CLOSED, FULL, EMPTY, EMPTY),
    EXPLICIT: (EXPLICIT, EXPLICIT, EXPLICIT, CLOSED, FULL, EMPTY, EMPTY),
    CLOSED: (IMPLICIT, IMPLICIT, EXPLICIT, CLOSED, FULL, EMPTY, EMPTY),
    FULL: (None, None, None, None, FULL, EMPTY, EMPTY),
    READ_ONLY: (None, None, None, None, None, None, READ_ONLY),
    OFFLINE: (None, None, None, None, None, None, OFFLINE),
}


@pytest.mark.parametrize(
    ("state", "request_name", "outcome"),
    [
        pytest.param(state, name, outcome, id=f"{state.name.lower()}-{name}")
        for state in STATES
        for name, outcome in zip(REQUESTS, OUTCOMES[state], strict=True)
    ],
)
def test_every_request_in_every_state(state: ZoneState, request_name: str, outcome: ZoneState | None) -> None:
    """BLK-118..127, BLK-135, BLK-143, BLK-151..169: the zone goes where the table says, or is left as it was."""
    table = a_table()
    bring(table, 2, state)
    held = HOLDS.get(state, 4)
    assert table.written(2) == held
    if outcome is None:
        with pytest.raises(ZoneInvalidCommand):
            REQUESTS[request_name](table, 2)
        assert (table.state(2), table.written(2)) == (state, held)
        return
    REQUESTS[request_name](table, 2)
    more = {"write": 2, "append": 2}.get(request_name, 0)
    expected = 0 if outcome is EMPTY else held + more
    assert (table.state(2), table.written(2)) == (outcome, expected)
    assert all(table.state(zone) is EMPTY for zone in (1, 3, 7))


@pytest.mark.parametrize("state", STATES)
def test_a_state_uses_the_resources_it_should(state: ZoneState) -> None:
    """BLK-144..146: open zones use an open resource, open and closed ones an active one; leaving gives them back."""
    table = a_table()
    bring(table, 2, state)
    assert table.open == (state in (IMPLICIT, EXPLICIT))
    assert table.active == (state in (IMPLICIT, EXPLICIT, CLOSED))
    if state not in (READ_ONLY, OFFLINE):
        reset(table, 2)
        assert (table.open, table.active) == (0, 0)


@pytest.mark.parametrize("state", [IMPLICIT, EXPLICIT])
@pytest.mark.parametrize("put", [write, append])
def test_a_zone_that_is_written_to_its_capacity_is_full(state: ZoneState, put: Callable[..., None]) -> None:
    """BLK-158, BLK-162: and its resources are free again."""
    table = a_table()
    bring(table, 2, state)
    put(table, 2, CAPACITY - 4)
    assert (table.state(2), table.open, table.active) == (FULL, 0, 0)


def test_an_opened_zone_that_was_not_written_is_empty_when_closed() -> None:
    """BLK-160, BLK-161: CLOSE of an explicitly open zone looks at the write pointer."""
    table = a_table()
    open_zone(table, 2)
    close_zone(table, 2)
    assert (table.state(2), table.active) == (EMPTY, 0)


# Limits.


@pytest.mark.parametrize("request_name", ["open", "write", "append"])
def test_the_open_limit_closes_what_was_opened_implicitly_first(request_name: str) -> None:
    """BLK-134, BLK-157: the oldest implicitly open zone makes room."""
    table = a_table(max_open=2)
    write(table, 3, 1)
    write(table, 2, 1)
    REQUESTS[request_name](table, 4)
    assert [table.state(zone) for zone in (2, 3)] == [IMPLICIT, CLOSED]
    assert (table.open, table.active) == (2, 3)


@pytest.mark.parametrize("request_name", ["open", "write", "append"])
@pytest.mark.parametrize("state", [EMPTY, CLOSED])
def test_the_open_limit_holds(request_name: str, state: ZoneState) -> None:
    """BLK-043, BLK-120, BLK-129, BLK-147: explicitly open zones make no room, and the zone stays as it was."""
    table = a_table(max_open=1)
    bring(table, 3, state)
    open_zone(table, 2)
    with pytest.raises(ZoneOpenResource):
        REQUESTS[request_name](table, 3)
    assert (table.state(2), table.state(3), table.open) == (EXPLICIT, state, 1)


@pytest.mark.parametrize("request_name", ["open", "write", "append"])
@pytest.mark.parametrize("max_open", [0, 1], ids=["active", "both"])
def test_the_active_limit_holds(request_name: str, max_open: int) -> None:
    """BLK-044, BLK-148, BLK-149: the active limit, or both at once, gives ZONE_ACTIVE_RESOURCE."""
    table = a_table(max_open=max_open, max_active=1)
    open_zone(table, 2)
    with pytest.raises(ZoneActiveResource):
        REQUESTS[request_name](table, 3)
    assert (table.state(3), table.active) == (EMPTY, 1)
    finish(table, 2)
    REQUESTS[request_name](table, 3)
    assert table.active == 1


def test_open_zones_need_no_resource_anew() -> None:
    """BLK-155, BLK-163: opening explicitly what is open works at both limits."""
    table = a_table(max_open=1, max_active=1)
    write(table, 2, 1)
    open_zone(table, 2)
    open_zone(table, 2)
    assert (table.state(2), table.open) == (EXPLICIT, 1)


def test_finish_needs_no_resource() -> None:
    """Decided in docs/zoned.md: an empty zone can be finished while no resource is left."""
    table = a_table(max_open=1, max_active=1)
    open_zone(table, 2)
    finish(table, 3)
    assert table.state(3) is FULL


# Where and how much.


@pytest.mark.parametrize("offset", [0, 3, 5])
def test_a_write_begins_at_the_write_pointer(offset: int) -> None:
    """BLK-109, BLK-132: elsewhere it gets ZONE_UNALIGNED_WP and nothing moves."""
    table = a_table()
    write(table, 2, 4)
    with pytest.raises(ZoneUnalignedWritePointer):
        write(table, 2, 1, offset)
    assert table.written(2) == 4


@pytest.mark.parametrize("put", [write, append])
def test_a_write_fits_into_the_capacity(put: Callable[..., None]) -> None:
    """BLK-130: more than what is left gets ZONE_INVALID_CMD and nothing moves."""
    table = a_table()
    write(table, 2, 4)
    with pytest.raises(ZoneInvalidCommand):
        put(table, 2, CAPACITY - 3)
    assert (table.written(2), table.state(2)) == (4, IMPLICIT)


@pytest.mark.parametrize("put", [write, append])
@pytest.mark.parametrize("sectors", [1, 2, 3, 5])
def test_a_write_ends_at_the_granularity(put: Callable[..., None], sectors: int) -> None:
    """BLK-133, HOSTILE-193: write_granularity is 4 sectors here; what ends elsewhere moves nothing."""
    table = a_table(granularity=2048)
    with pytest.raises(ZoneUnalignedWritePointer):
        put(table, 2, sectors)
    assert (table.written(2), table.state(2)) == (0, EMPTY)
    put(table, 2, 8)
    assert table.written(2) == 8


def test_writing_nothing_changes_nothing() -> None:
    """HOSTILE-194: neither a write nor an append of no bytes opens a zone."""
    table = a_table()
    write(table, 2, 0)
    with pytest.raises(ZoneInvalidCommand):
        append(table, 2, 0)
    assert table.state(2) is EMPTY


@pytest.mark.parametrize(("sector", "sectors"), [(2 * ZONE, ZONE + 1), (ZONE - 1, 2), (2 * ZONE - 1, 2)])
def test_a_range_does_not_leave_a_sequential_zone(sector: int, sectors: int) -> None:
    """BLK-131, HOSTILE-197: not even from a conventional zone into one."""
    with pytest.raises(ZoneInvalidCommand):
        a_table().pieces(sector, sectors)
    assert len(a_table(model=ZoneModel.HOST_AWARE).pieces(sector, sectors)) == 2


@pytest.mark.parametrize("sector", [1, ZONE + 1, 2 * ZONE - 1, 7 * ZONE + 8, 1 << 60])
def test_a_zone_is_named_by_its_start(sector: int) -> None:
    """HOSTILE-188, HOSTILE-189, BLK-113: any other sector gets ZONE_INVALID_CMD."""
    with pytest.raises(ZoneInvalidCommand):
        a_table().named(sector)
    assert a_table().named(2 * ZONE) == 2


def test_a_conventional_zone_takes_no_command_and_no_append() -> None:
    """BLK-106, BLK-108, BLK-111, BLK-112: it is written anywhere, in any order, and stays "not wp"."""
    table = a_table()
    with pytest.raises(ZoneInvalidCommand):
        table.sequential(0)
    with pytest.raises(ZoneInvalidCommand):
        append(table, 0, 1)
    write(table, 0, 1, 15)
    write(table, 0, 4, 2)
    assert table.describe(0).state is ZoneState.NOT_WRITE_POINTER
    assert table.readable(Piece(0, 0, ZONE)) == ZONE
    assert (table.open, table.active) == (0, 0)


def test_a_report_describes_zones() -> None:
    """BLK-042, BLK-098, BLK-101..105, BLK-150: start, capacity, pointer, type and state; the last zone may be short."""
    table = a_table()
    write(table, 2, 4)
    zones = table.report(ZONE + 3, 100)
    assert [zone.start for zone in zones] == [ZONE * index for index in range(1, 8)]
    assert [zone.capacity for zone in zones] == [CAPACITY] * 6 + [8]
    assert (zones[0].write_pointer, zones[0].state) == (ZONE, EMPTY)
    assert (zones[1].write_pointer, zones[1].state) == (2 * ZONE + 4, IMPLICIT)
    assert {zone.type for zone in zones} == {ZoneType.SEQUENTIAL_REQUIRED}
    assert table.report(0, 1)[0].type is ZoneType.CONVENTIONAL
    assert a_table(model=ZoneModel.HOST_AWARE).report(ZONE, 1)[0].type is ZoneType.SEQUENTIAL_PREFERRED


@pytest.mark.parametrize("end", [finish, lambda table, zone: table.fail(zone, READ_ONLY)], ids=["full", "read-only"])
def test_what_was_not_written_is_not_readable(end: Callable[[ZoneTable, int], None]) -> None:
    """BLK-137, BLK-138, BLK-171: data ends at the write pointer, also after FINISH and in a read-only zone."""
    table = a_table()
    write(table, 2, 4)
    end(table, 2)
    assert [table.readable(Piece(2, offset, 4)) for offset in (0, 2, 4, 8)] == [4, 2, 0, 0]


def test_an_offline_zone_takes_nothing() -> None:
    """BLK-136, BLK-171: not even a read."""
    table = a_table()
    bring(table, 2, OFFLINE)
    with pytest.raises(ZoneInvalidCommand):
        table.readable(Piece(2, 0, 1))


def test_zones_fail_one_way_only() -> None:
    """BLK-170: read-only may become offline, and offline is final; conventional zones do not fail."""
    table = a_table()
    bring(table, 2, READ_ONLY)
    table.check_fail(2, OFFLINE)
    table.fail(2, OFFLINE)
    for zone, state in ((2, READ_ONLY), (2, OFFLINE), (0, OFFLINE), (3, FULL)):
        with pytest.raises(ValueError, match="cannot become"):
            table.check_fail(zone, state)


def test_a_host_aware_zone_is_written_anywhere() -> None:
    """BLK-110: the write pointer moves on, never back; a full zone can be written; there is no append."""
    table = a_table(model=ZoneModel.HOST_AWARE)
    write(table, 2, 2, 5)
    assert (table.written(2), table.state(2)) == (7, IMPLICIT)
    write(table, 2, 2, 0)
    assert table.written(2) == 7
    finish(table, 2)
    write(table, 2, 1, 8)
    assert table.state(2) is FULL
    with pytest.raises(ZoneInvalidCommand):
        append(table, 3, 1)


# All of it at once.

ZONES = st.integers(1, 6)


class Zones(RuleBasedStateMachine):
    """Any requests in any order against a table with limits, beside a model that knows the rules only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = a_table(max_open=2, max_active=3)
        self.held = [0] * 8

    def attempt(self, request: Callable[[ZoneTable, int], None], zone: int) -> bool:
        """Make a request; one that fails must leave every zone and every counter as it was."""
        table = self.table
        before = [table.describe(each) for each in range(table.count)], table.open, table.active
        try:
            request(table, zone)
        except BlockError:
            assert ([table.describe(each) for each in range(table.count)], table.open, table.active) == before
            return False
        return True

    @rule(zone=ZONES, sectors=st.integers(0, 13), offset=st.one_of(st.none(), st.integers(0, 12)))
    def write(self, zone: int, sectors: int, offset: int | None) -> None:
        """Only at the pointer does it succeed."""
        at = self.held[zone] if offset is None else offset
        if self.attempt(lambda table, each: write(table, each, sectors, offset), zone):
            assert at == self.held[zone]
            self.held[zone] += sectors

    @rule(zone=ZONES, sectors=st.integers(0, 13))
    def append(self, zone: int, sectors: int) -> None:
        """It goes to the pointer."""
        if self.attempt(lambda table, each: append(table, each, sectors), zone):
            self.held[zone] += sectors

    @rule(zone=ZONES, name=st.sampled_from(["open", "close", "finish"]))
    def command(self, zone: int, name: str) -> None:
        """None of these moves the pointer."""
        self.attempt(REQUESTS[name], zone)

    @rule(zone=ZONES)
    def reset(self, zone: int) -> None:
        """Back to the start, unless the zone has failed."""
        if self.attempt(reset, zone):
            self.held[zone] = 0

    @rule()
    def reset_all(self) -> None:
        """All but those that have failed."""
        reset_all(self.table, 0)
        failed = (READ_ONLY, OFFLINE)
        self.held = [held if self.table.state(zone) in failed else 0 for zone, held in enumerate(self.held)]

    @precondition(lambda self: sum(self.table.state(zone) in (READ_ONLY, OFFLINE) for zone in range(8)) < 2)
    @rule(zone=ZONES, state=st.sampled_from([READ_ONLY, OFFLINE]))
    def fail(self, zone: int, state: ZoneState) -> None:
        """The medium fails, at most twice."""
        if self.table.state(zone) is not OFFLINE:
            self.table.fail(zone, state)

    @invariant()
    def rules_hold(self) -> None:
        """BLK-107, BLK-144..149: limits, counters, and what each state says about the pointer."""
        table = self.table
        states = [table.state(zone) for zone in range(1, 8)]
        assert ZoneState.NOT_WRITE_POINTER not in states
        assert table.open == sum(state in (IMPLICIT, EXPLICIT) for state in states) <= 2
        assert table.active == table.open + states.count(CLOSED) <= 3
        for zone in range(1, 8):
            written, state = table.written(zone), table.state(zone)
            assert written == self.held[zone] <= table.capacity(zone)
            assert (written == 0) or state is not EMPTY
            assert (0 < written < table.capacity(zone)) or state not in (IMPLICIT, CLOSED)


Zones.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestZones = Zones.TestCase
