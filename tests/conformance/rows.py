"""The rows, what is said about them, and the page docs/conformance.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from vmmblk.conform.rules import AREAS, ids
from vmmblk.conform.rules import rules as rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "conformance.md"
OPEN = HERE / "open.txt"

PASSED, FAILED, NOT_RUN, OPEN_OUTCOME, NOT_APPLICABLE = "passed", "failed", "not run", "open", "not applicable"

LAST_CELL = re.compile(r"\| ([^|]*::[^|]*) \|$", re.MULTILINE)

INTRODUCTION = """\
# Conformance

What VIRTIO 1.4 (Committee Specification 01) asks of a virtio-blk device on PCI, row by row, and the tests that fail
when vmmblk does not do it. The rows are [vmmblk/conform/rules.tsv](../vmmblk/conform/rules.tsv), where the levels
are explained.

This page is made by the tests: do not edit it. `python -m pytest --conformance-page` writes it from what that run saw
(with `-k`, a test that did not run keeps its outcome; what has not passed is bold). The tests fail when a row has
neither test nor reason, or the page is stale.
"""


def reasons() -> dict[str, str]:
    """Why a row does not apply."""
    found: dict[str, str] = {}
    for spec, reason in tomllib.loads((HERE / "reasons.toml").read_text()).items():
        for row in ids(spec):
            assert row not in found, f"tests/conformance/reasons.toml names {row} twice"
            found[row] = reason
    return found


def still_open() -> list[str]:
    """Rows that are still to do."""
    return [row for line in OPEN.read_text().splitlines() if not line.startswith("#") for row in ids(line)]


def complaints(tests: Mapping[str, Iterable[str]]) -> list[str]:
    """What is wrong with the rows, given the tests of each; nothing if nothing is."""
    known, given, to_do = rows(), reasons(), still_open()
    wrong = [f"{row} does not exist, but {', '.join(tests[row])} tests it" for row in tests if row not in known]
    wrong += [f"{row} does not exist (reasons.toml, open.txt)" for row in [*given, *to_do] if row not in known]
    wrong += [f"{row} is in open.txt twice" for row in sorted({row for row in to_do if to_do.count(row) > 1})]
    for row in known:
        there = {"a test": row in tests, "a reason": row in given, "a line in open.txt": row in to_do}
        has = [name for name, is_there in there.items() if is_there]
        if not has:
            wrong.append(f"{row} has neither a test nor a reason")
        elif len(has) > 1:
            wrong.append(f"{row} has {' and '.join(has)}: one is enough")
    return wrong


def passed() -> dict[str, str]:
    """The tests that had passed when the page was written."""
    names = (name for tests in LAST_CELL.findall(PAGE.read_text()) for name in tests.split())
    return {name: PASSED for name in names if not name.startswith("*")}


def page(tests: Mapping[str, Iterable[str]], outcomes: Mapping[str, str]) -> str:
    """The page, given the tests of each row and what each test came to."""
    given = reasons()
    told = {}
    for row in rows():
        names = tests.get(row, ())
        shown = " ".join(name if outcomes.get(name) == PASSED else f"**{name}**" for name in names)
        told[row] = (_outcome(names, outcomes, given.get(row)), shown)
    return "\n".join([INTRODUCTION, *_summary({row: outcome for row, (outcome, _) in told.items()}), *_tables(told)])


def _outcome(names: Iterable[str], outcomes: Mapping[str, str], reason: str | None) -> str:
    seen = {outcomes.get(name, NOT_RUN) for name in names}
    if not seen:
        return f"{NOT_APPLICABLE}: {reason}" if reason else OPEN_OUTCOME
    return next(each for each in (FAILED, NOT_RUN, PASSED) if each in seen)


def _summary(told: Mapping[str, str]) -> Iterator[str]:
    kinds = [PASSED, NOT_APPLICABLE, OPEN_OUTCOME, FAILED, NOT_RUN]
    yield f"| area | rows | {' | '.join(kinds)} |"
    yield "|---|" + "--:|" * (1 + len(kinds))
    everything = [(row.rpartition("-")[0], outcome.partition(":")[0]) for row, outcome in told.items()]
    for area, title in AREAS.items():
        counts = [everything.count((area, kind)) for kind in kinds]
        yield f"| {title} ({area}) | {sum(counts)} | {' | '.join(map(str, counts))} |"
    counts = [sum(outcome == kind for _, outcome in everything) for kind in kinds]
    yield f"| **all** | {sum(counts)} | {' | '.join(map(str, counts))} |"


def _tables(told: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    area = ""
    for row in rows().values():
        if row.area != area:
            area = row.area
            yield from ("", f"## {AREAS[area]} ({area})", "")
            yield from ("| row | level | requirement | outcome | tests |", "|---|---|---|---|---|")
        outcome, names = told[row.id]
        yield f"| {row.id} | {row.level} | {_cell(row.requirement)} | {_cell(outcome)} | {names} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("<", "&lt;")
