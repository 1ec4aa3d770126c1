"""The rules: what VIRTIO 1.4 asks of a virtio-blk device on PCI, row by row (rules.tsv)."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["AREAS", "Rule", "ids", "rules"]

AREAS = {
    "STAT": "Device status",
    "FEAT": "Feature negotiation",
    "NOTE": "Notifications",
    "RST": "Device reset",
    "CFG": "Configuration space",
    "VQRST": "Queue reset",
    "RING-SPLIT": "Split rings",
    "RING-PACKED": "Packed rings",
    "RING-INDIRECT": "Indirect descriptors",
    "RING-EVENT": "Event suppression",
    "RING-INORDER": "In-order use",
    "SUSPEND": "Suspend",
    "RSVD": "Reserved feature bits",
    "ADMIN": "Administration queues",
    "PCI": "PCI transport",
    "BLK": "Block device",
    "LEGACY": "Legacy interface",
    "HOSTILE": "Hostile drivers",
}
"""What the ids of the rules begin with."""

_BINDING = {"MUST", "MUST NOT", "SHALL", "DESC", "DERIVED", "OPTIONAL"}

# An id, and the numbers of the same area that follow it.
_IDS = re.compile(
    rf"(?<![\w-])({'|'.join(sorted(AREAS, key=len, reverse=True))})-"
    r"(\d{3}\b(?:(?:\.\.| to |, | and )-?\d{3}\b)*)"
)
_NEXT = re.compile(r"(\.\.| to |, | and |^)-?(\d{3})")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.  ``level`` and ``requirement`` are explained at the head of rules.tsv."""

    id: str
    level: str
    requirement: str

    @property
    def area(self) -> str:
        """The id without its number."""
        return self.id.rpartition("-")[0]

    @property
    def binding(self) -> bool:
        """Whether a device that does otherwise breaks the specification: no advice, and no choice of ours."""
        return self.level in _BINDING


@functools.cache
def rules() -> Mapping[str, Rule]:
    """Every rule by id, in the order of the file."""
    text = resources.files(__package__).joinpath("rules.tsv").read_text()
    lines = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    return {each[0]: Rule(each[0], each[2], each[3]) for each in lines[1:]}


def ids(text: str) -> Iterator[str]:
    """The ids that a text names, ranges told one by one: "BLK-004, 006 and 007", "PCI-013..015"."""
    for area, numbers in _IDS.findall(text):
        last = 0
        for joint, number in _NEXT.findall(numbers):
            first = last + 1 if joint in ("..", " to ") else int(number)
            last = int(number)
            yield from (f"{area}-{each:03}" for each in range(first, last + 1))
