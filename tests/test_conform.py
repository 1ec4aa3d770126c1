"""``vmmblk conform``: its runner, which survives whatever a server does, and what it tells."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET  # of our own documents only

import pytest
from click.testing import CliRunner

from vmmblk.backends.null import Null
from vmmblk.cli.conform import conform
from vmmblk.client.errors import ProtocolError, StatusError
from vmmblk.conform.check import Broken, Check, Harm, NotOffered, NotTestable, Outcome, check, checks
from vmmblk.conform.report import Report
from vmmblk.conform.rules import rules
from vmmblk.conform.runner import keep, put_back, run, settle
from vmmblk.conform.target import Facts, Options, Target
from vmmblk.spec import Feature

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Served

    Serve = Callable[..., Served]

QUICK = Options(timeout=10, limit=60)
FACTS = Facts(offer=Feature.VERSION_1.mask, capacity=64, block_size=512, queues=1, queue_size=16)
BINDING, OPEN = "STAT-001", "HOSTILE-010"


def one(
    raising: BaseException | None, *, rule: str = BINDING, features: tuple[Feature, ...] = (), **options: Any
) -> Check:
    """A check that raises, or does not."""

    def body(_target: Target) -> None:
        if raising is not None:
            raise raising

    body.__doc__ = f"It holds ({rule})."
    return check(*features, **options)(body)


# The checks themselves.


def test_checks_name_rules_that_exist() -> None:
    """Every check has a title of its own and names rules, binding ones or others but not both."""
    known, found = rules(), list(checks())
    assert found
    assert len({each.name for each in found}) == len(found)
    for each in found:
        assert each.title, each.name
        assert each.rules, each.name
        assert all(rule in known for rule in each.rules), each.name
        assert len({known[rule].binding for rule in each.rules}) == 1, f"{each.name} mixes binding rules and others"


def test_a_title_is_the_first_line_without_the_rules() -> None:
    """What the list tells."""
    assert (one(None).title, one(None).rules) == ("It holds.", (BINDING,))


# What a check comes to.


@pytest.mark.parametrize(
    ("raising", "rule", "outcome", "detail"),
    [
        (None, BINDING, Outcome.PASSED, ""),
        (Broken("seen"), BINDING, Outcome.BROKEN, "seen"),
        (Broken("seen"), OPEN, Outcome.OPEN, "seen"),
        (Harm("seen"), OPEN, Outcome.BROKEN, "seen"),
        (NotOffered("why"), BINDING, Outcome.NOT_OFFERED, "why"),
        (NotTestable("why"), BINDING, Outcome.NOT_TESTED, "why"),
        (StatusError(1), OPEN, Outcome.OPEN, "a request was completed with IOERR"),
        (TimeoutError("slow"), BINDING, Outcome.BROKEN, "timeout: slow"),
        (ProtocolError("nonsense"), OPEN, Outcome.BROKEN, "nonsense"),
        (ConnectionResetError("gone"), OPEN, Outcome.BROKEN, "the server closed the connection: gone"),
        (ZeroDivisionError("x"), OPEN, Outcome.BROKEN, "the check stumbled: ZeroDivisionError: x"),
    ],
    ids=[
        "nothing",
        "broken",
        "left open",
        "harm",
        "not offered",
        "not testable",
        "status",
        "timeout",
        "protocol",
        "closed",
        "stumbled",
    ],
)
def test_outcomes(tmp_path: Path, raising: BaseException | None, rule: str, outcome: Outcome, detail: str) -> None:
    """A binding rule is broken, another is left open; whatever the rule, harm and nonsense count as broken."""
    result = settle(Target(tmp_path / "s", QUICK, FACTS), one(raising, rule=rule))
    assert (result.outcome, result.detail) == (outcome, detail)


def test_what_is_not_offered_or_destroys_is_not_run(tmp_path: Path) -> None:
    """A feature that is missing, and zones that could not be put back, keep a check from being run."""
    target = Target(tmp_path / "s", QUICK, FACTS)
    packed = settle(target, one(Broken("ran"), features=(Feature.RING_PACKED,)))
    assert (packed.outcome, packed.detail) == (Outcome.NOT_OFFERED, "RING_PACKED is not offered")
    destroying = settle(target, one(Broken("ran"), destructive=True))
    assert (destroying.outcome, destroying.detail) == (Outcome.NOT_TESTED, "takes --destructive")
    willing = Target(tmp_path / "s", Options(destructive=True), FACTS)
    assert settle(willing, one(None, destructive=True)).outcome is Outcome.PASSED


def test_a_check_is_run_in_each_ring_format_that_is_offered(serve: Serve) -> None:
    """Once for a device with split rings, twice for one with packed rings too."""
    served = serve(features={"packed": True})
    results = list(run(served.path, QUICK, [one(None, each_ring=True)]))
    assert [result.ring for result in results] == ["split", "packed"]
    old = serve(features={"packed": False})
    assert [result.ring for result in run(old.path, QUICK, [one(None, each_ring=True)])] == ["split"]


# Servers that hang or die.


def test_a_disk_that_keeps_nothing_is_not_held_against_every_check(serve: Serve) -> None:
    """What the server could not do before a check does not count as harm done by it."""
    served = serve(Null(2048))
    assert [result.outcome for result in run(served.path, QUICK, [one(None)])] == [Outcome.PASSED]


def test_a_server_that_dies_is_told_and_the_rest_is_not_tested(serve: Serve) -> None:
    """The check after which the server is gone is broken, and those after it say so."""
    served = serve()

    def kill(target: Target) -> None:
        """It lives (HOSTILE-001)."""
        served.server.stop(5)

    results = list(run(served.path, QUICK, [one(None), check()(kill), one(None)]))
    assert [result.outcome for result in results] == [Outcome.PASSED, Outcome.BROKEN, Outcome.NOT_TESTED]
    assert "afterwards the server does not serve" in results[1].detail
    assert results[2].detail == "the server is gone since test_conform.kill"


def test_a_server_that_hangs_is_told(tmp_path: Path) -> None:
    """One that accepts and never answers ends the run with one line, in bounded time."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        result = CliRunner().invoke(
            conform, ["--socket", str(tmp_path / "s"), "--timeout", "0.2"], standalone_mode=True
        )
    assert result.exit_code == 1
    assert "cannot check this server: timed out" in result.stderr


def test_a_check_that_does_not_end_is_ended(serve: Serve) -> None:
    """Its connections fail once its time is over, and it counts as broken."""

    def wait_forever(target: Target) -> None:
        """It answers (STAT-001)."""
        with target.driver() as driver:
            driver.wait_config_change(60)

    served = serve()
    result = settle(Target(served.path, Options(limit=0.3)), check()(wait_forever))
    assert result.outcome is Outcome.BROKEN
    assert result.detail.startswith("did not end within 0.3 s")


# What is told.


def test_what_was_on_the_disk_is_put_back(serve: Serve) -> None:
    """The places that checks write to hold in the end what they held before."""
    served = serve()
    served.disk.data[:] = before = bytes(range(256)) * (len(served.disk.data) // 256)
    facts = Target(served.path, QUICK).facts
    saved = keep(served.path, QUICK, facts)
    with Target(served.path, QUICK, facts).driver() as driver:
        driver.write(0, bytes(4096))
        driver.write(facts.capacity - 1, bytes(512))
    put_back(served.path, QUICK, saved)
    assert served.disk.data == before


def test_the_worst_result_is_the_rules(tmp_path: Path) -> None:
    """A rule that one check sees broken is broken; one that only some could try has passed."""
    target = Target(tmp_path / "s", QUICK, FACTS)
    broken = [settle(target, one(each)) for each in (None, Broken("x"), NotOffered("y"))]
    passed = [settle(target, one(each, rule=OPEN)) for each in (NotTestable("z"), None)]
    report = Report(FACTS, [*broken, *passed])
    assert {each.rule: each.outcome for each in report.verdicts()} == {BINDING: Outcome.BROKEN, OPEN: Outcome.PASSED}


def test_json_and_junit_tell_everything(serve: Serve, tmp_path: Path) -> None:
    """Both files hold each result; the tables go to standard error when one of them takes standard output."""
    served = serve()
    arguments = ["--socket", str(served.path), "--only", "STAT-001,status.bits", "--json", "-"]
    result = CliRunner().invoke(conform, [*arguments, "--junit", str(tmp_path / "x.xml")])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["whole"]
    assert told["device"]["capacity_sectors"] == 2048
    assert {each["outcome"] for each in told["results"]} == {"passed"}
    assert "STAT-001" in {each["id"] for each in told["rules"]}
    cases = ET.fromstring((tmp_path / "x.xml").read_bytes()).findall("testcase")
    assert len(cases) == len(told["results"])
    assert "passed" in result.stderr


def test_failures_are_failures_in_junit(tmp_path: Path) -> None:
    """Broken is a failure, open one if strict, and what was not tried is skipped."""
    target = Target(tmp_path / "s", QUICK, FACTS)
    results = [settle(target, one(Broken("\x00<bad>"))), settle(target, one(Broken("x"), rule=OPEN))]
    results.append(settle(target, one(NotOffered("y"))))
    lax, strict = (ET.fromstring(Report(FACTS, results).junit(strict=strict)) for strict in (False, True))
    assert [child.tag for case in lax for child in case] == ["failure", "system-out", "skipped"]
    assert [child.tag for case in strict for child in case] == ["failure", "failure", "skipped"]
    assert (lax.get("failures"), strict.get("failures")) == ("1", "2")
