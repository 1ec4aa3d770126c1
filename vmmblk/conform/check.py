"""What a check is, and how it says what it has seen."""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk.conform.rules import ids, rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmmblk.conform.target import Target
    from vmmblk.spec import Feature

__all__ = ["Broken", "Check", "Harm", "NotOffered", "NotTestable", "Outcome", "check", "checks", "expect"]


class Outcome(enum.Enum):
    """What a check, or a rule, came to; from the best to the worst."""

    PASSED = "passed"
    NOT_OFFERED = "not offered"
    """It is about something optional that this device does not have."""
    NOT_TESTED = "not tested"
    """It could not be tried here; the detail says why."""
    OPEN = "left open"
    """The device does other than expected, where the specification leaves the outcome open or only advises."""
    BROKEN = "broken"
    """A rule is broken; or, whatever the rule, the server died, hung, or did not recover."""

    @property
    def rank(self) -> int:
        """How bad it is: several outcomes of one rule count as the one with the highest rank that says something."""
        return [Outcome.NOT_OFFERED, Outcome.NOT_TESTED, Outcome.PASSED, Outcome.OPEN, Outcome.BROKEN].index(self)


class Broken(Exception):
    """The device does not do what the rule says; the text tells what it does."""


class Harm(Broken):
    """The device does what no device may do, however open the outcome: its text tells what."""


class NotOffered(Exception):
    """The device does not have what the check is about."""


class NotTestable(Exception):
    """The check cannot be carried out on this disk, or not without an option; the text tells why."""


def expect(condition: object, seen: str) -> None:
    """Raise :class:`Broken` with what was ``seen`` unless ``condition`` holds."""
    if not condition:
        raise Broken(seen)


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the rules ``rules``, which are all binding or all not."""

    name: str
    """Unique: module and function, as in "split.chains_end"."""
    title: str
    """What a device does that passes, one line."""
    rules: tuple[str, ...]
    run: Callable[[Target], None]
    features: tuple[Feature, ...]
    """What must have been offered."""
    each_ring: bool
    """Whether it is run once per ring format that the device offers, or in the format that suits it."""
    destructive: bool
    """Whether it changes what cannot be put back, so that it is only run on request."""

    @property
    def binding(self) -> bool:
        """Whether failing it means that the specification is broken."""
        return any(rules()[rule].binding for rule in self.rules)


def check(
    *features: Feature, each_ring: bool = False, destructive: bool = False
) -> Callable[[Callable[[Target], None]], Check]:
    """Make a check of a function whose docstring tells what holds, and the rules in brackets."""

    def make(function: Callable[[Target], None]) -> Check:
        text = inspect.getdoc(function) or ""
        title = re.sub(r"\s*\([^()]*-\d{3}[^()]*\)", "", text.partition("\n\n")[0].replace("\n", " "))
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        return Check(name, title, tuple(dict.fromkeys(ids(text))), function, features, each_ring, destructive)

    return make


def checks() -> Iterator[Check]:
    """Every check, in the order of the files and of their lines."""
    package = importlib.import_module("vmmblk.conform.checks")
    for module in pkgutil.iter_modules(package.__path__):
        found = vars(importlib.import_module(f"{package.__name__}.{module.name}")).values()
        yield from (each for each in found if isinstance(each, Check))
