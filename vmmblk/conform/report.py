"""Results told: rule by rule, as JSON, as JUnit's XML.  Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from vmmblk.conform.check import Outcome
from vmmblk.conform.rules import AREAS, rules
from vmmblk.spec import Feature

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.conform.runner import Result
    from vmmblk.conform.target import Facts

__all__ = ["Report", "Verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rule came to: the worst of the results that are about it."""

    rule: str
    outcome: Outcome
    results: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What a run has shown so far."""

    facts: Facts
    results: list[Result]

    def verdicts(self) -> Iterator[Verdict]:
        """Each rule that a result is about, in the order of the rules."""
        about: dict[str, list[Result]] = {}
        for result in self.results:
            for rule in result.check.rules:
                about.setdefault(rule, []).append(result)
        for rule in rules():
            if found := about.get(rule):
                worst = max((result.outcome for result in found), key=lambda outcome: outcome.rank)
                yield Verdict(rule, worst, tuple(found))

    def areas(self) -> Iterator[tuple[str, Counter[Outcome]]]:
        """The title of each area that a result is about, and how many of its rules came to what."""
        counts: dict[str, Counter[Outcome]] = {}
        for verdict in self.verdicts():
            counts.setdefault(rules()[verdict.rule].area, Counter())[verdict.outcome] += 1
        yield from ((f"{AREAS[area]} ({area})", counts[area]) for area in AREAS if area in counts)

    def count(self, outcome: Outcome) -> int:
        """How many checks came to ``outcome``."""
        return sum(result.outcome is outcome for result in self.results)

    def json(self) -> dict[str, Any]:
        """Everything, for json.dump."""
        return {
            "device": {
                "features": [feature.name for feature in Feature if self.facts.offer & feature.mask],
                "features_mask": self.facts.offer,
                "capacity_sectors": self.facts.capacity,
                "block_size_bytes": self.facts.block_size,
                "queues": self.facts.queues,
                "queue_size": self.facts.queue_size,
            },
            "checks": {outcome.value: self.count(outcome) for outcome in Outcome},
            "rules": [
                {
                    "id": verdict.rule,
                    "level": rules()[verdict.rule].level,
                    "requirement": rules()[verdict.rule].requirement,
                    "outcome": verdict.outcome.value,
                    "checks": [result.name for result in verdict.results],
                }
                for verdict in self.verdicts()
            ],
            "results": [
                {
                    "check": result.name,
                    "title": result.check.title,
                    "rules": list(result.check.rules),
                    "outcome": result.outcome.value,
                    "detail": result.detail,
                    "seconds": round(result.seconds, 6),
                }
                for result in self.results
            ],
        }

    def junit(self, *, strict: bool = False) -> bytes:
        """A test case for each result; what is left open is a failure if ``strict``, else it passes."""
        failed = {Outcome.BROKEN, Outcome.OPEN} if strict else {Outcome.BROKEN}
        skipped = {Outcome.NOT_OFFERED, Outcome.NOT_TESTED}
        suite = ET.Element(
            "testsuite",
            name="vmmblk conform",
            tests=str(len(self.results)),
            failures=str(sum(self.count(outcome) for outcome in failed)),
            skipped=str(sum(self.count(outcome) for outcome in skipped)),
            time=f"{sum(result.seconds for result in self.results):.3f}",
        )
        for result in self.results:
            area, _, name = result.name.partition(".")
            case = ET.SubElement(suite, "testcase", classname=area, name=name, time=f"{result.seconds:.3f}")
            tag = "failure" if result.outcome in failed else "skipped" if result.outcome in skipped else "system-out"
            if result.outcome is not Outcome.PASSED:
                text = f"{result.outcome.value}: {result.detail} [{' '.join(result.check.rules)}]"
                element = ET.SubElement(case, tag)
                if tag == "system-out":
                    element.text = _printable(text)
                else:
                    element.set("message", _printable(text))
        document: bytes = ET.tostring(suite, encoding="utf-8", xml_declaration=True)
        return document


def _printable(text: str) -> str:
    """``text`` without what XML cannot hold."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)
