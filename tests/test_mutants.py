"""The tests notice devices that are broken on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from conformance.mutants import MUTANTS, Mutant, broken, survives

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule.partition(" ")[2])
def test_a_broken_device_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    """With the rule broken, a test fails that passes without."""
    broken(mutant, tmp_path)
    assert not (told := survives(mutant, tmp_path)), told
