"""What a Linux guest makes of an emulated zoned disk."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from guests import MIB, boot, make_image, serve, vfio_user_device

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.guest

SIZE = 128 * MIB

FIO = (
    "fio --name=zbd --filename=/dev/vda --direct=1 --zonemode=zbd --ioengine=io_uring --iodepth=8 --rw={rw} --bs={bs}"
    " --offset={offset} --size={size} --verify=crc32c --do_verify=1 --verify_fatal=1 --eta=never"
    " --output=/tmp/fio || {{ cat /tmp/fio; exit 1; }}"
)


def reported(output: str) -> list[str]:
    """The state of each zone that blkzone has told of."""
    return re.findall(r"zcond: ?\d+\((\w\w)\)", output)


def test_a_linux_guest_uses_a_host_managed_disk(tmp_path: Path) -> None:
    """Zones are seen, written in order, finished and reset; a write elsewhere fails; a restart keeps what was there."""
    image = make_image(tmp_path / "disk.img", SIZE)
    options = ("--filter", "zoned:zone_size=8M,conventional=2,max_open=4,max_active=6")
    command = f"""set -e
        cat /sys/block/vda/queue/zoned /sys/block/vda/queue/nr_zones /sys/block/vda/queue/chunk_sectors
        cat /sys/block/vda/queue/max_open_zones /sys/block/vda/queue/max_active_zones
        test "$(cat /sys/block/vda/queue/zone_append_max_bytes)" -gt 0
        {FIO.format(rw="write", bs="64k", offset="16M", size="24M")}
        {FIO.format(rw="randwrite", bs="16k", offset="64M", size="32M")}
        blkzone reset -o $((64 << 11)) -l $((64 << 11)) /dev/vda
        dd if=/dev/zero of=/dev/vda bs=64k seek=640 count=1 oflag=direct conv=notrunc
        dd if=/dev/zero of=/dev/vda bs=64k seek=648 count=1 oflag=direct conv=notrunc && exit 1
        blkzone open -o $((48 << 11)) -l $((8 << 11)) /dev/vda
        blkzone finish -o $((56 << 11)) -l $((8 << 11)) /dev/vda
        sync
        blkzone report /dev/vda"""
    with serve(tmp_path / "s", *options, str(image)) as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    lines = result.output.splitlines()
    assert lines[:5] == ["host-managed", "16", "16384", "4", "6"]
    assert "Input/output error" in result.output
    states = ["nw", "nw", "fu", "fu", "fu", "oi", "oe", "fu", *["em"] * 8]
    assert reported(result.output) == states
    command = f"""set -e
        blkzone report /dev/vda
        {FIO.format(rw="read", bs="64k", offset="16M", size="24M")}
        dd if=/dev/zero of=/dev/vda bs=64k seek=641 count=1 oflag=direct conv=notrunc
        blkzone reset /dev/vda
        blkzone report -o $((16 << 11)) -c 1 /dev/vda
        dd if=/dev/vda bs=1M skip=16 count=8 iflag=direct 2>/dev/null | tr -d '\\0' | wc -c"""
    with serve(tmp_path / "s", *options, str(image)) as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    assert reported(result.output) == [*states[:5], "cl", "em", "fu", *["em"] * 8, "em"]
    assert result.output.splitlines()[-1] == "0"
