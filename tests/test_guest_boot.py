"""How a guest comes to its disk: through firmware, above 4 GiB, without MSI-X, after a reboot, by ``vmmblk run``."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from guests import (
    MIB,
    VMMBLK,
    Setup,
    boot,
    fio,
    make_boot_disk,
    make_image,
    on_both_engines_if_long,
    serve,
    vfio_user_device,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.guest


@on_both_engines_if_long
def test_seabios_boots_through_the_window_when_the_bar_is_above_4_gib(tmp_path: Path, engine: str) -> None:
    """On machine pc with 4 GiB only the PCI_CFG window reaches the BAR from 32-bit SeaBIOS, which boots by it."""
    make_boot_disk(tmp_path / "boot.img")
    command = """
        for device in /sys/bus/pci/devices/*; do
            grep -q 0x1042 $device/device && sed -n 5p $device/resource
        done"""
    with serve(tmp_path / "s", str(tmp_path / "boot.img"), engine=engine) as server:
        device = vfio_user_device(server.socket, bootindex=0)
        trace = ["-trace", "vfio_pci_write_config"]
        result = boot(command, *device, *trace, firmware="seabios", machine="pc", memory="4G")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    assert int(result.output.split()[0], 16) >= 4 << 30, result.output
    # Each request takes a few writes to the window; a boot without it writes to configuration space some fifty times.
    assert result.qemu_log.count("vfio_pci_write_config") > 1000


@on_both_engines_if_long
def test_a_guest_without_msi_uses_intx(tmp_path: Path, engine: str) -> None:
    """With pci=nomsi the disk interrupts by INTx, and every block verifies."""
    image = make_image(tmp_path / "disk.img", 32 * MIB)
    command = f"""set -e
        {fio("randwrite", "4k", "8M")}
        {fio("write", "128k", "16M", offset="8M")}
        grep virtio /proc/interrupts"""
    with serve(tmp_path / "s", str(image), engine=engine) as server:
        device = vfio_user_device(server.socket)
        result = boot(command, *device, kernel_args="pci=nomsi", memory="256M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    interrupts = re.search(r":\s+(\d+)\s+IO-APIC.*-fasteoi\s+virtio0", result.output)
    assert interrupts, result.output
    assert int(interrupts[1]) > 0


@on_both_engines_if_long
def test_the_disk_works_before_and_after_a_reboot(tmp_path: Path, engine: str) -> None:
    """A guest that boots from the disk writes to it, reboots, boots from it again and finds what it wrote."""
    make_boot_disk(tmp_path / "boot.img")
    command = """set -e
        if test "$(head -c 7 /dev/vda2)" = written; then
            echo after the reboot
            exit
        fi
        echo before the reboot
        printf written | dd of=/dev/vda2 conv=fsync
        reboot -f"""
    with serve(tmp_path / "s", str(tmp_path / "boot.img"), engine=engine) as server:
        device = vfio_user_device(server.socket, bootindex=0)
        result = boot(command, *device, firmware="seabios", memory="384M", allow_reboot=True)
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    assert result.output.index("before the reboot") < result.output.index("after the reboot")
    assert not re.search("timed out|unexpected reply|bad header", result.qemu_log)


def test_run_adds_what_qemu_needs_and_ends_with_its_status(tmp_path: Path) -> None:
    """``vmmblk run`` gives the guest of a plain QEMU command the disk, and QEMU's status is its own."""
    image = make_image(tmp_path / "disk.img", 32 * MIB)
    # With these arguments QEMU ends with status 1 when the guest says through the device that it panicked.
    arguments = ["-device", "pvpanic-pci,addr=9", "-action", "panic=exit-failure"]
    command = f"""set -e
        cat /sys/block/vda/serial; echo
        {fio("randwrite", "4k", "4M")}
        echo verified
        read address rest </sys/bus/pci/devices/0000:00:09.0/resource
        devmem $address 8 1"""
    (tmp_path / "command").write_text(command, encoding="utf-8")
    qemu = Setup(memory="256M", memory_backend="none", arguments=arguments).command_line(tmp_path, interactive=False)
    line = [*VMMBLK, "run", "--serial", "FROM-RUN", str(image), "--", *qemu]
    result = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
    output, errors = result.stdout.decode(), result.stderr.decode()
    assert "FROM-RUN\nverified\n" in output, output + errors
    assert result.returncode == 1, errors
    added = errors.removeprefix("vmmblk: added to QEMU: ").splitlines()
    assert len(added) == 1, errors
    assert f"size={256 * MIB},share=on" in added[0]
    assert "vfio-user-pci" in added[0]
