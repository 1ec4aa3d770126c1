"""``vmmblk conform`` against ``vmmblk serve``: every check passes where it applies, and applies somewhere."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from conformance.layouts import LAYOUTS
from conformance.setups import SETUPS, serving

from vmmblk.conform.check import Outcome, checks
from vmmblk.conform.runner import Result, run

NEVER_OFFERED = {
    "block_config.geometry_is_valid",
    "features.sr_iov_has_its_capability",
    "features.sr_iov_is_offered",
}
"""Checks for devices that have what ours has in no setup: a geometry, virtual functions."""


@functools.cache
def results(setup: str) -> list[Result]:
    """What every check comes to with the device set up so."""
    with tempfile.TemporaryDirectory() as folder, serving(setup, Path(folder)) as (served, options):
        found = list(run(served.socket, options, checks()))
        assert served.stop() == 0, served.log
    return found


@pytest.mark.parametrize("setup", SETUPS)
def test_nothing_is_broken_and_nothing_differs(setup: str) -> None:
    """Each check passes, or is about what this device does not offer."""
    wrong = [each for each in results(setup) if each.outcome in (Outcome.BROKEN, Outcome.OPEN)]
    assert not wrong, "\n".join(f"{each.name}: {each.outcome.value}: {each.detail}" for each in wrong)


def test_every_check_passes_somewhere() -> None:
    """None is left that no setup offers what it needs; what takes another layout passes in test_conform_layout."""
    passed = {each.check.name for setup in SETUPS for each in results(setup) if each.outcome is Outcome.PASSED}
    elsewhere = {name for layout in LAYOUTS for name in layout.proves}
    assert {each.name for each in checks()} - passed == elsewhere | NEVER_OFFERED
