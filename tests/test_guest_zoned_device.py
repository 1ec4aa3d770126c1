"""A zoned block device of a host, passed through: the host is a guest with null_blk, and vmmblk runs in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoned_guests import run_in_guest

pytestmark = pytest.mark.guest


PROGRAM = Path(__file__).with_name("host_zones.py")


def test_a_driver_uses_the_zones_of_a_linux_host(tmp_path: Path) -> None:
    """It has them with their limits and statuses, also over a server that is killed."""
    result = run_in_guest(PROGRAM, "served", folder=tmp_path, timeout=240)
    assert result.status == 0, result.output


@pytest.mark.long
def test_zones_of_a_linux_host_keep_the_contract(tmp_path: Path) -> None:
    """check_block holds for disks of null_blk, with small and big sectors, and for a SCSI disk."""
    result = run_in_guest(PROGRAM, "checked", folder=tmp_path, timeout=240)
    assert result.status == 0, result.output
