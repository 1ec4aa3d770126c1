"""``vmmblk conform`` assumes no layout: devices that have another one pass as ours does."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from conformance.layouts import LAYOUTS, Layout, rebuilt
from guests import Served

from vmmblk.conform.check import Outcome, checks
from vmmblk.conform.runner import run
from vmmblk.conform.target import Options

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_check_holds_for_another_layout(layout: Layout, tmp_path: Path) -> None:
    """Each passes or is about what is not offered, and those that only this layout lets apply pass."""
    rebuilt(layout, tmp_path)
    program = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from vmmblk.cli import main; main()",
    ]
    with Served(tmp_path / "s", *layout.arguments, "memory:16M", program=program) as served:
        results = list(run(served.socket, Options(), checks()))
        assert served.stop() == 0, served.log
    wrong = [each for each in results if each.outcome in (Outcome.BROKEN, Outcome.OPEN)]
    assert not wrong, "\n".join(f"{each.name}: {each.outcome.value}: {each.detail}" for each in wrong)
    assert set(layout.proves) <= {each.check.name for each in results if each.outcome is Outcome.PASSED}
