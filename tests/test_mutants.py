"""The tests notice devices that are broken on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from conformance.mutants import MUTANTS, Mutant, broken, survives
from conformance.setups import serving

from vmmblk.conform.check import Outcome, checks
from vmmblk.conform.runner import run

if TYPE_CHECKING:
    from pathlib import Path


def _name(mutant: Mutant) -> str:
    return mutant.rule.partition(" ")[2]


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=_name)
def test_a_broken_device_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    """With the rule broken, a test fails that passes without."""
    broken(mutant, tmp_path)
    assert not (told := survives(mutant, tmp_path)), told


@pytest.mark.long
@pytest.mark.parametrize("mutant", [each for each in MUTANTS if each.setup], ids=_name)
def test_conform_notices_a_broken_device(mutant: Mutant, tmp_path: Path) -> None:
    """Against the broken device a check fails that passes against ours."""
    tree, folder = tmp_path / "tree", tmp_path / "served"
    tree.mkdir()
    folder.mkdir()
    broken(mutant, tree)
    rule = mutant.rule.partition(" ")[0]
    first = [each for each in checks() if rule in each.rules]
    rest = [each for each in checks() if rule not in each.rules]
    with serving(mutant.setup, folder, tree) as (served, options):
        outcomes = (result.outcome for chosen in (first, rest) for result in run(served.socket, options, chosen))
        assert any(outcome in (Outcome.BROKEN, Outcome.OPEN) for outcome in outcomes)
