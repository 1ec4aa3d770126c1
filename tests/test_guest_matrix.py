"""The newest Linux that Debian has, from fio to file systems on zones; ``tests/guest-matrix`` has older ones too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from guest_matrix import FAILED, NOT_IN_KERNEL, OK, STEPS, Cell, ended, run

if TYPE_CHECKING:
    from pathlib import Path

CELLS = [Cell("trixie-backports-cloud", "packed", 4, 512), Cell("trixie-backports-cloud", "split", 1, 4096)]


@pytest.mark.guest
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_new_linux(tmp_path: Path, cell: Cell) -> None:
    """Everything verifies that fio and four file systems write, zoned and not, and a disk grows under one of them."""
    outcome = run(cell, tmp_path)
    assert outcome.good, "\n".join(outcome.problems)
    # A cloud kernel has no f2fs, and may have no zonefs.
    optional = {name: outcome.steps.pop(name) for name in ("zonefs", "f2fs_zoned")}
    assert set(optional.values()) <= {OK, NOT_IN_KERNEL}
    assert set(outcome.steps.values()) == {OK}


def test_a_step_that_fails_or_never_ends_is_told() -> None:
    """A step is good with status 0 only; what it printed is told if not, and so are steps that did not end."""
    output = "7.3\n@@ step fio\nfine\n@@ ended fio 0\n@@ step xfs\nno disk\n@@ ended xfs 1\n"
    output += "@@ step blkzone\n@@ ended blkzone 77\n@@ step log\nhangs"
    steps, failures = ended(output)
    assert steps == dict.fromkeys(STEPS, FAILED) | {"fio": OK, "blkzone": NOT_IN_KERNEL}
    assert "xfs failed with status 1:\nno disk\n" in failures
    assert len(failures) == len(STEPS) - 2
