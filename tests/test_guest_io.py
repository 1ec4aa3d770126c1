"""What a Linux guest does to a disk that vmmblk serves: fio, file systems, discard, sectors of 4 KiB, user disks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from guests import MIB, Guest, Setup, boot, fio, make_image, on_both_engines_if_long, serve, vfio_user_device

pytestmark = pytest.mark.guest

SIZE = 64 * MIB

# A disk in memory as a user writes it, with plain methods. Reading what begins at or after sector "broken" raises.
USER_DISK = """
import vmmblk

class Disk(vmmblk.Block):
    def __init__(self, size: int, broken: int = 1 << 40):
        self.data = bytearray(size)
        self.broken = broken
        self.info = vmmblk.BlockInfo(True, 512, size // 512)

    def read(self, sector_start, buffers):
        if sector_start >= self.broken:
            raise KeyError("the head has crashed")
        at = sector_start * 512
        for buffer in buffers:
            buffer[:] = self.data[at:at + len(buffer)]
            at += len(buffer)

    def write(self, sector_start, buffers):
        at = sector_start * 512
        for buffer in buffers:
            self.data[at:at + len(buffer)] = buffer
            at += len(buffer)
"""


def image_sha256(image: Path) -> str:
    """What the guest's sha256sum has to say about the whole disk."""
    return hashlib.sha256(image.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("cache", "shown", "parameters", "engine"),
    [
        pytest.param("writeback", "write back", [], "native", id="writeback"),
        pytest.param("writethrough", "write through", [], "native", id="writethrough"),
        pytest.param("writeback", "write back", ["direct=on"], "native", id="direct"),
        pytest.param("writeback", "write back", [], "python", id="writeback python"),
        pytest.param("writethrough", "write through", [], "python", id="writethrough python", marks=pytest.mark.long),
        pytest.param("writeback", "write back", ["direct=on"], "python", id="direct python", marks=pytest.mark.long),
    ],
)
def test_fio_verifies_what_it_wrote_and_the_guest_can_toggle_the_cache(
    tmp_path: Path, cache: str, shown: str, parameters: list[str], engine: str
) -> None:
    """Blocks of 512 bytes to 1 MiB, 32 deep with fsync, verify in the guest and are in the image, in each mode."""
    image = make_image(tmp_path / "disk.img", SIZE)
    other = {"write back": "write through", "write through": "write back"}[shown]
    command = f"""set -e
        cat /sys/block/vda/serial; echo
        cat /sys/block/vda/cache_type /sys/block/vda/queue/write_cache
        {fio("randwrite", "512", "2M")}
        {fio("randwrite", "4k", "16M", offset="8M")}
        {fio("write", "64k", "16M", offset="24M")}
        echo {other} >/sys/block/vda/cache_type
        cat /sys/block/vda/cache_type /sys/block/vda/queue/write_cache
        {fio("randwrite", "1M", "16M", offset="40M")}
        {fio("randwrite", "4k", "2M", offset="4M")}
        echo {shown} >/sys/block/vda/cache_type
        cat /sys/block/vda/cache_type
        {fio("randrw", "16k", "4M", offset="60M")}
        dd if=/dev/vda bs=1M iflag=direct | sha256sum"""
    arguments = ["--cache", cache, "--serial", "V-4711", str(image), *parameters]
    with serve(tmp_path / "s", *arguments, engine=engine) as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    modes = f"{shown}\n{shown}\n{other}\n{other}\n{shown}\n"
    assert result.output.startswith(f"V-4711\n{modes}")
    assert image_sha256(image) in result.output


@on_both_engines_if_long
def test_an_ext4_file_system_survives_and_mounts_read_only(tmp_path: Path, engine: str) -> None:
    """mkfs, mount, write, umount and fsck -f find nothing wrong; a read-only disk mounts and refuses writes."""
    image = make_image(tmp_path / "disk.img", SIZE)
    command = """set -e
        mkfs.ext4 -q /dev/vda
        mount -t ext4 /dev/vda /mnt
        mkdir /mnt/folder
        dd if=/dev/urandom of=/mnt/folder/file bs=64k count=200 conv=fsync
        cp /bin/busybox /mnt/program
        sha256sum /mnt/folder/file /mnt/program >/mnt/sums
        umount /mnt
        fsck.ext4 -f -n /dev/vda
        mount -t ext4 /dev/vda /mnt
        sha256sum -c /mnt/sums
        rm /mnt/program
        umount /mnt
        fsck.ext4 -f -n /dev/vda"""
    with serve(tmp_path / "s", str(image), engine=engine) as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert result.status == 0, result.output
        assert (server.stop(), server.log) == (0, "")
    before = image_sha256(image)
    command = """
        cat /sys/block/vda/ro
        dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct && exit 1
        blkdiscard /dev/vda && exit 1
        blockdev --setrw /dev/vda
        dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct && exit 1
        set -e
        mount -t ext4 -o ro /dev/vda /mnt
        grep folder/file /mnt/sums | sha256sum -c"""
    with serve(tmp_path / "s", "--read-only", str(image), engine=engine) as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    assert result.output.startswith("1\n")
    assert "/mnt/folder/file: OK" in result.output
    assert image_sha256(image) == before


@on_both_engines_if_long
def test_discard_and_write_zeroes_reach_the_file(tmp_path: Path, engine: str) -> None:
    """A blkdiscard makes the sparse file smaller, blkdiscard -z zeroes; what lies beside them stays."""
    image = make_image(tmp_path / "disk.img", SIZE)
    command = """set -e
        tr '\\0' x </dev/zero | dd of=/dev/vda bs=1M count=32 iflag=fullblock oflag=direct
        blkdiscard -o 0 -l $((16 << 20)) /dev/vda
        blkdiscard -z -o $((16 << 20)) -l $((8 << 20)) /dev/vda
        dd if=/dev/vda bs=1M iflag=direct | sha256sum"""
    with serve(tmp_path / "s", str(image), engine=engine) as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    data = image.read_bytes()
    assert data[16 * MIB : 24 * MIB] == bytes(8 * MIB)
    assert data[24 * MIB : 32 * MIB] == b"x" * (8 * MIB)
    assert image.stat().st_blocks * 512 <= 17 * MIB
    assert hashlib.sha256(data).hexdigest() in result.output


@on_both_engines_if_long
def test_a_disk_with_sectors_of_4096_bytes(tmp_path: Path, engine: str) -> None:
    """--block-size 4096 is what the guest sees, and fio and ext4 work on it."""
    image = make_image(tmp_path / "disk.img", SIZE)
    command = f"""set -e
        cat /sys/block/vda/queue/logical_block_size /sys/block/vda/size
        {fio("randwrite", "4k", "16M")}
        {fio("randwrite", "60k", "16M", offset="16M")}
        mkfs.ext4 -q /dev/vda
        mount -t ext4 /dev/vda /mnt
        cp /bin/busybox /mnt
        umount /mnt
        fsck.ext4 -f -n /dev/vda
        mount -t ext4 -o ro /dev/vda /mnt
        cmp /bin/busybox /mnt/busybox"""
    with serve(tmp_path / "s", "--block-size", "4096", str(image), engine=engine) as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    assert result.output.startswith(f"4096\n{SIZE // 512}\n")


def test_a_disk_written_in_python_verifies(tmp_path: Path) -> None:
    """A Block class of twenty lines in a user's file stores what a guest's fio writes."""
    (tmp_path / "mydisk.py").write_text(USER_DISK, encoding="utf-8")
    command = f"""set -e
        {fio("randwrite", "4k", "8M")}
        {fio("write", "128k", "16M", offset="8M")}"""
    with serve(tmp_path / "s", str(tmp_path / "mydisk.py"), "size=32M") as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output


def test_a_python_disk_that_raises_gives_the_guest_an_io_error(tmp_path: Path) -> None:
    """The log has the traceback of the user's exception, the guest EIO, and the rest of the disk goes on working."""
    (tmp_path / "mydisk.py").write_text(USER_DISK, encoding="utf-8")
    command = f"""
        dd if=/dev/vda bs=4k skip=2048 count=1 iflag=direct of=/dev/null && exit 1
        {fio("randwrite", "4k", "2M")}"""
    with serve(tmp_path / "s", str(tmp_path / "mydisk.py"), "size=32M", "broken=16K") as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert server.stop() == 0
        log = server.log
    assert result.status == 0, result.output
    assert "Input/output error" in result.output
    assert "Traceback" in log
    assert 'mydisk.py", line 12, in read' in log
    assert "KeyError: 'the head has crashed'" in log


@on_both_engines_if_long
@pytest.mark.parametrize(("switch", "bit"), [("packed=on", 1), ("packed=off", 0)])
def test_the_guest_takes_the_ring_that_is_offered(tmp_path: Path, engine: str, switch: str, bit: int) -> None:
    """Linux negotiates RING_PACKED (bit 34) if it is offered; what it writes in many laps of either ring verifies."""
    image = make_image(tmp_path / "disk.img", SIZE)
    command = f"""set -e
        cut -c 35 /sys/bus/virtio/devices/virtio0/features
        {fio("randwrite", "4k", "16M")}
        {fio("write", "256k", "32M", offset="16M")}
        dd if=/dev/vda bs=1M iflag=direct | sha256sum"""
    with serve(tmp_path / "s", "--features", switch, "--queue-size", "64", str(image), engine=engine) as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    assert result.output.startswith(f"{bit}\n")
    assert image_sha256(image) in result.output


def test_a_guest_whose_doorbells_are_mapped(tmp_path: Path) -> None:
    """QEMU maps the page, what the guest stores there reaches nobody, and all that it writes verifies."""
    command = f"echo up; {fio('randwrite', '4k', '1M')}"
    with serve(tmp_path / "s", "--doorbell", "mmap", "--queues", "1", "memory:64M") as server:
        setup = Setup(arguments=list(vfio_user_device(server.socket)), memory="256M")
        with Guest(setup, command) as guest:
            guest.wait_for("up", 120)
            assert "vmmblk-doorbells" in Path(f"/proc/{guest.process.pid}/maps").read_text()
            result = guest.wait(120)
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
