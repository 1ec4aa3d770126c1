"""``vmmblk conform`` against ``vmmblk serve``: every check passes where it applies, and applies somewhere."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conformance.layouts import LAYOUTS
from conformance.setups import SETUPS, serving

from vmmblk.conform.check import Check, Outcome, checks
from vmmblk.conform.runner import Result, run

if TYPE_CHECKING:
    from collections.abc import Iterable

NEVER_OFFERED = {
    "block_config.geometry_is_valid",
    "features.sr_iov_has_its_capability",
    "features.sr_iov_is_offered",
}
"""Checks for devices that have what ours has in no setup: a geometry, virtual functions."""


QUICK = {"plain", "default", "everything", "zoned", "file"}
"""Setups in which every check is run each time; in the others it takes --long."""


def results(setup: str, chosen: Iterable[Check]) -> list[Result]:
    """What the checks come to with the device set up so."""
    with tempfile.TemporaryDirectory() as folder, serving(setup, Path(folder)) as (served, options):
        found = list(run(served.socket, options, chosen))
        assert served.stop() == 0, served.log
    wrong = [each for each in found if each.outcome in (Outcome.BROKEN, Outcome.OPEN)]
    assert not wrong, "\n".join(f"{each.name}: {each.outcome.value}: {each.detail}" for each in wrong)
    return found


@pytest.mark.parametrize(
    "setup", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SETUPS]
)
def test_nothing_is_broken_and_nothing_differs(setup: str) -> None:
    """Each check passes, or is about what this device does not offer."""
    assert results(setup, checks())


def test_every_check_passes_somewhere() -> None:
    """None is left that no setup offers what it needs; what takes another layout passes in test_conform_layout."""
    left = {each.name: each for each in checks()}
    for name in dict.fromkeys(("everything", *SETUPS)):
        for each in results(name, list(left.values())):
            if each.outcome is Outcome.PASSED:
                left.pop(each.check.name, None)
    elsewhere = {name for layout in LAYOUTS for name in layout.proves}
    assert set(left) == elsewhere | NEVER_OFFERED
