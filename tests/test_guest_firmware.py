"""Firmware and boot loaders that read from the disk: SeaBIOS and OVMF, each with GRUB, and U-Boot."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from firmware import TRACE_REGISTERS, accepted_features, u_boot
from guests import MIB, boot, fio, make_boot_disk, make_image, serve, vfio_user_device

from vmmblk.spec import Feature

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.guest

EVERYTHING = "in_order=on,notification_data=on,notif_config_data=on,access_platform=on,order_platform=on,suspend=on"
SERVED = {
    "one queue": ["--engine", "native", "--queues", "1"],
    "four queues": ["--engine", "native", "--queues", "4"],
    "every feature": ["--engine", "native", "--queues", "4", "--features", EVERYTHING],
    "in Python": ["--engine", "python", "--queues", "1"],
}
"""How the disk is served: with the features that are offered by default, or with all that can be, by either engine."""

GRUB_WROTE = {
    "seabios": b"# GRUB Environment Block\nbooted=i386-pc\n",
    "ovmf": b"# GRUB Environment Block\nbooted=x86_64-efi\n",
}


def is_split(features: int) -> bool:
    """Whether a driver of VIRTIO 1 took these features and stayed with split rings."""
    return features >> Feature.VERSION_1 & 1 == 1 and features >> Feature.RING_PACKED & 1 == 0


def matrix(quick: list[tuple[Any, ...]], *everything: tuple[Any, ...]) -> list[Any]:
    """Parameters: those of ``quick``, and whatever else ``everything`` has, which takes long."""
    others = [each for each in everything if each not in quick]
    assert len(others) + len(quick) == len(everything)
    return [*quick, *(pytest.param(*each, marks=pytest.mark.long) for each in others)]


@pytest.mark.parametrize(
    ("firmware", "machine", "sector_size", "served"),
    matrix(
        [
            ("seabios", "q35", 512, "four queues"),
            ("ovmf", "q35", 512, "one queue"),
            ("ovmf", "q35", 4096, "four queues"),
        ],
        *itertools.product(["seabios"], ["q35", "pc"], [512], SERVED),
        *itertools.product(["ovmf"], ["q35", "pc"], [512, 4096], SERVED),
    ),
)
def test_firmware_boots_from_the_disk(
    tmp_path: Path, firmware: str, machine: str, sector_size: int, served: str
) -> None:
    """From a vmmblk disk that bootindex puts first the firmware loads GRUB, which loads Linux and writes a file."""
    image = tmp_path / "boot.img"
    make_boot_disk(image, sector_size)
    command = """set -e
        test -e /sys/firmware/efi && echo booted by ovmf || echo booted by seabios
        cat /sys/block/vda/queue/logical_block_size
        mkfs.ext4 -q /dev/vda2
        mount -t ext4 /dev/vda2 /mnt
        cp /bin/busybox /mnt
        umount /mnt
        fsck.ext4 -f -n /dev/vda2"""
    with serve(tmp_path / "s", *SERVED[served], "--block-size", str(sector_size), str(image)) as server:
        device = vfio_user_device(server.socket, bootindex=0)
        arguments = [*device, *TRACE_REGISTERS]
        result = boot(command, *arguments, timeout=240, firmware=firmware, machine=machine, memory="384M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    assert result.output.startswith(f"booted by {firmware}\n{sector_size}\n")
    assert GRUB_WROTE[firmware] in image.read_bytes()
    assert is_split(accepted_features(result.qemu_log)[0])


def test_seabios_leaves_sectors_of_4096_bytes_alone(tmp_path: Path) -> None:
    """SeaBIOS says that it cannot use such a disk and resets it; Linux uses it all the same."""
    image = make_image(tmp_path / "disk.img", 16 * MIB)
    said = tmp_path / "seabios"
    debug_port = ["-chardev", f"file,id=seabios,path={said}", "-device", "isa-debugcon,iobase=0x402,chardev=seabios"]
    with serve(tmp_path / "s", "--block-size", "4096", str(image)) as server:
        device = vfio_user_device(server.socket)
        result = boot(fio("randwrite", "4k", "4M"), *device, *debug_port, memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    assert "block size 4096 is unsupported" in said.read_text()


@pytest.mark.parametrize(
    ("firmware", "sector_size", "served"),
    matrix(
        [("u-boot", 512, served) for served in SERVED],
        *itertools.product(["u-boot"], [512], SERVED),
        *itertools.product(["u-boot-new"], [512, 4096], SERVED),
    ),
)
def test_u_boot_reads_and_writes(tmp_path: Path, firmware: str, sector_size: int, served: str) -> None:
    """U-Boot reads 8 MiB whole, writes them elsewhere, is refused what lies past the end, and goes on."""
    size = 8 * MIB
    # Without a partition table U-Boot looks for one of Apple's, whose test overruns its buffer when sectors are large.
    partition = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", 1, 1)
    contents = (bytes(446) + partition).ljust(510, b"\0") + b"\x55\xaa" + os.urandom(size - 512)
    image = tmp_path / "disk.img"
    image.write_bytes(contents + bytes(size))
    sectors = size // sector_size
    with serve(tmp_path / "s", *SERVED[served], "--block-size", str(sector_size), str(image)) as server:
        with u_boot(*vfio_user_device(server.socket), *TRACE_REGISTERS, firmware=firmware) as console:
            console.run("virtio scan")
            assert f"({2 * sectors} x {sector_size})" in console.run("virtio info")
            assert f"{sectors} blocks read: OK" in console.run(f"virtio read 1000000 0 {sectors:x}")
            assert f"{zlib.crc32(contents):08x}" in console.run(f"crc32 1000000 {size:x}")
            assert f"{sectors} blocks written: OK" in console.run(f"virtio write 1000000 {sectors:x} {sectors:x}")
            assert "ERROR" in console.run(f"virtio read 1000000 {2 * sectors - 1:x} 2")
            assert "1 blocks read: OK" in console.run(f"virtio read 1000000 {2 * sectors - 1:x} 1")
            accepted = accepted_features(console.guest.qemu_log)
        assert (server.stop(), server.log) == (0, "")
    assert image.read_bytes() == contents * 2
    assert is_split(accepted[0])


def test_u_boot_that_ignores_the_sector_size(tmp_path: Path) -> None:
    """U-Boot before 2026.01 takes any disk for one of 512-byte sectors: it reads whole sectors, and parts fail."""
    image = tmp_path / "disk.img"
    contents = os.urandom(MIB)
    image.write_bytes(contents)
    with serve(tmp_path / "s", "--block-size", "4096", str(image)) as server:
        with u_boot(*vfio_user_device(server.socket)) as console:
            console.run("virtio scan")
            assert "(2048 x 512)" in console.run("virtio info")
            assert "ERROR" in console.run("virtio read 1000000 0 1")
            assert "2048 blocks read: OK" in console.run("virtio read 1000000 0 800")
            assert f"{zlib.crc32(contents):08x}" in console.run(f"crc32 1000000 {MIB:x}")
        assert (server.stop(), server.log) == (0, "")


@pytest.mark.parametrize(
    ("firmware", "sector_size", "served"),
    matrix(
        [("u-boot", 512, "four queues")],
        # With ACCESS_PLATFORM this U-Boot starts no Linux, be it from a device of QEMU's own.
        *itertools.product(["u-boot"], [512], ["one queue", "four queues"]),
        *itertools.product(["u-boot-new"], [512, 4096], SERVED),
    ),
)
def test_u_boot_starts_linux(tmp_path: Path, firmware: str, sector_size: int, served: str) -> None:
    """U-Boot loads a kernel and its initramfs from a file system on the disk, and the Linux so started uses it."""
    image = tmp_path / "boot.img"
    make_boot_disk(image, sector_size)
    command = "cat /proc/cmdline; mkfs.ext4 -q /dev/vda2 && fsck.ext4 -f -n /dev/vda2"
    with serve(tmp_path / "s", *SERVED[served], "--block-size", str(sector_size), str(image)) as server:
        with u_boot(*vfio_user_device(server.socket), firmware=firmware, command=command) as console:
            console.run("virtio scan")
            assert "bytes read in" in console.run("load virtio 0:1 $loadaddr /vmmblk/vmlinuz")
            # Far from where the kernel unpacks itself.
            assert "bytes read in" in console.run("load virtio 0:1 10000000 /vmmblk/initramfs")
            console.run("setenv bootargs console=ttyS0 loglevel=5 panic=-1 no_timer_check by=u-boot")
            result = console.leave("zboot $loadaddr - 10000000 $filesize")
            assert result.status == 0, console.guest.report()
        assert (server.stop(), server.log) == (0, "")
    assert "by=u-boot" in result.output
