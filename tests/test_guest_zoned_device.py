"""A zoned block device of a host, passed through: the host is a guest with null_blk, and vmmblk runs in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoned_guests import run_in_guest

pytestmark = pytest.mark.guest


def test_zones_of_a_linux_host_are_passed_through(tmp_path: Path) -> None:
    """Linux's own zones keep the contract of a disk, and a driver has them with their statuses and limits."""
    result = run_in_guest(Path(__file__).with_name("host_zones.py"), tmp_path, timeout=240)
    assert result.status == 0, result.output
