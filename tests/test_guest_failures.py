"""What survives when QEMU, the server or the disk fails under a real guest, and when guest memory is not shared."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from typing import TYPE_CHECKING

import pytest
from guests import (
    MIB,
    TIMED_OUT,
    Guest,
    Setup,
    boot,
    fio,
    make_image,
    on_both_engines,
    on_both_engines_if_long,
    serve,
    vfio_user_device,
    wait_until,
)

if TYPE_CHECKING:
    from pathlib import Path

    from guests import Served

pytestmark = pytest.mark.guest

SIZE = 64 * MIB

# Writes a known pattern to the first 8 MiB and has it flushed; then it keeps writing behind them.
FLUSH_THEN_WRITE = """set -e
    tr '\\0' x </dev/zero | dd of=/dev/vda bs=64k count=128 iflag=fullblock oflag=direct conv=fsync
    echo flushed
    fio --name=load --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=32 --rw=randwrite --bs=4k \\
        --offset=32M --size=16M --time_based --runtime=600 --output=/dev/null &
    while test "$(awk '{print $2}' /sys/block/vda/inflight)" = 0; do :; done
    echo busy
    wait"""
FLUSHED = b"x" * (8 * MIB)

# The first request for the sector at 16 MiB finds the disk asleep.
HANGING_DISK = """
import time
import vmmblk

class Disk(vmmblk.Block):
    def __init__(self, seconds: float):
        self.data = bytearray(32 << 20)
        self.seconds = seconds
        self.info = vmmblk.BlockInfo(True, 512, len(self.data) // 512)

    {keyword} read(self, sector_start, buffers):
        at = sector_start * 512
        if at == 16 << 20:
            seconds, self.seconds = self.seconds, 0
            time.sleep(seconds)
        for buffer in buffers:
            buffer[:] = self.data[at:at + len(buffer)]
            at += len(buffer)

    {keyword} write(self, sector_start, buffers):
        at = sector_start * 512
        for buffer in buffers:
            self.data[at:at + len(buffer)] = buffer
            at += len(buffer)
"""

QEMU_IS_UNHAPPY = re.compile("timed out|unexpected reply|bad header|failed|EOF|Broken pipe")


def guest(server: Served, command: str, **setup: object) -> Guest:
    """A guest of 256 MiB that has the disk."""
    return Guest(Setup(**{"memory": "256M", "arguments": vfio_user_device(server.socket), **setup}), command)


def said(server: Served, words: str, times: int) -> bool:
    """Whether the server has said something so many times."""
    return server.log.count(words) == times


@on_both_engines_if_long
def test_flushed_data_survives_the_death_of_qemu(tmp_path: Path, engine: str) -> None:
    """QEMU killed under load, then coming and going: the server stays, and each guest finds all that was flushed."""
    image = make_image(tmp_path / "disk.img", SIZE)
    with serve(tmp_path / "s", str(image), engine=engine) as server:
        with guest(server, FLUSH_THEN_WRITE) as first:
            first.wait_for("busy", 120)
            first.kill()
        assert image.read_bytes()[: 8 * MIB] == FLUSHED
        for count in range(3):
            command = f"""set -e
                dd if=/dev/vda bs=1M count=8 iflag=direct | sha256sum
                {fio("randwrite", "4k", "4M", offset="16M")}
                dd if=/dev/vda bs=512 skip=$((8 << 11)) count=1 | head -c 2
                echo {count + 1}! | dd of=/dev/vda bs=512 seek=$((8 << 11)) conv=fsync"""
            result = boot(command, *vfio_user_device(server.socket), memory="256M")
            assert result.status == 0, result.output
            assert hashlib.sha256(FLUSHED).hexdigest() in result.output
            assert count == 0 or f"{count}!" in result.output
        assert (server.stop(), server.log) == (0, "")


@on_both_engines_if_long
def test_flushed_data_survives_the_death_of_the_server(tmp_path: Path, engine: str) -> None:
    """A server killed under load leaves a whole image; a new one takes its socket and lock over and serves it."""
    image = make_image(tmp_path / "disk.img", SIZE)
    with serve(tmp_path / "s", str(image), engine=engine) as server, guest(server, FLUSH_THEN_WRITE) as orphan:
        orphan.wait_for("busy", 120)
        server.kill()
        wait_until(lambda: "EOF" in orphan.qemu_log or orphan.process.poll() is not None, "QEMU noticing")
        assert (tmp_path / "s").is_socket()
        assert image.read_bytes()[: 8 * MIB] == FLUSHED
        with serve(tmp_path / "s", str(image), engine=engine) as successor:
            command = f"""set -e
                dd if=/dev/vda bs=1M count=8 iflag=direct | sha256sum
                {fio("randwrite", "4k", "4M", offset="16M")}"""
            result = boot(command, *vfio_user_device(successor.socket), memory="256M")
            assert result.status == 0, result.output
            assert hashlib.sha256(FLUSHED).hexdigest() in result.output
            assert (successor.stop(), successor.log) == (0, "")
    assert image.read_bytes()[: 8 * MIB] == FLUSHED


@on_both_engines
def test_sigterm_under_load_loses_no_completed_write(tmp_path: Path, engine: str) -> None:
    """SIGTERM while a guest writes ends the server with status 0, and what the guest saw completed is in the image."""
    image = make_image(tmp_path / "disk.img", SIZE)
    command = """
        fio --name=load --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=32 --rw=randwrite --bs=4k \\
            --offset=32M --size=16M --time_based --runtime=600 --output=/dev/null &
        n=0
        while echo "block $n " | dd of=/dev/vda bs=512 seek=$n conv=sync oflag=direct 2>/dev/null; do
            echo "wrote $n"
            n=$((n + 1))
        done"""
    with serve(tmp_path / "s", str(image), engine=engine) as server, guest(server, command) as writer:
        writer.wait_for("wrote 50\n", 120)
        assert server.stop() == 0
        assert server.log == ""
        wait_until(lambda: "EOF" in writer.qemu_log or writer.process.poll() is not None, "QEMU noticing")
        assert writer.wait(0.5).status == TIMED_OUT
        written = writer.output.count("wrote")
    assert written > 50
    data = image.read_bytes()
    for n in range(written):
        assert data[n * 512 :].startswith(b"block %d " % n)


@on_both_engines_if_long
def test_memory_that_is_not_shared_is_named_and_the_next_guest_served(tmp_path: Path, engine: str) -> None:
    """Plain -m and share=off give one line with QEMU's memory arguments each; then a proper guest is served."""
    image = make_image(tmp_path / "disk.img", SIZE)
    advice = "guest memory is not shared with vmmblk: start QEMU with -object memory-backend-memfd,"
    with serve(tmp_path / "s", str(image), engine=engine) as server:
        for count, backend in enumerate(["none", "private"], start=1):
            with guest(server, "echo unexpected", memory_backend=backend):
                wait_until(partial(said, server, advice, count), f"advice with {backend} memory")
        result = boot(fio("randwrite", "4k", "4M"), *vfio_user_device(server.socket), memory="256M")
        assert result.status == 0, result.output
        assert server.stop() == 0
        assert len(server.log.splitlines()) == 2, server.log


@pytest.mark.parametrize(
    ("keyword", "seconds"),
    [pytest.param("def", 8, id="in a thread for 8 s"), pytest.param("async def", 20, id="in the event loop for 20 s")],
)
def test_a_disk_that_hangs_does_not_hold_up_a_reboot(tmp_path: Path, keyword: str, seconds: int) -> None:
    """A guest reboots while the disk sleeps; QEMU times out on nothing, and all works once the disk has woken."""
    script = tmp_path / "hanging.py"
    script.write_text(HANGING_DISK.format(keyword=keyword), encoding="utf-8")
    command = f"""
        if dd if=/dev/vda bs=512 count=1 iflag=direct | grep -q rebooted; then
            echo after the reboot
            {fio("randwrite", "4k", "4M", offset="1M")}
            dd if=/dev/vda of=/dev/null bs=4k skip=4096 count=1 iflag=direct
            exit
        fi
        set -e
        echo rebooted | dd of=/dev/vda bs=512 conv=sync oflag=direct
        dd if=/dev/vda of=/dev/null bs=4k skip=4096 count=1 iflag=direct &
        while test "$(awk '{{print $1}}' /sys/block/vda/inflight)" = 0; do :; done
        reboot -f"""
    with serve(tmp_path / "s", str(script), f"seconds={seconds}") as server:
        result = boot(command, *vfio_user_device(server.socket), memory="256M", allow_reboot=True)
        assert server.stop() == 0
        assert "their memory is taken back" in server.log
    assert result.status == 0, result.output
    assert "after the reboot" in result.output
    assert not QEMU_IS_UNHAPPY.search(result.qemu_log), result.qemu_log
