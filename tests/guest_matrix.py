"""Linux of several ages, each with either ring, one and four queues, and sectors of 512 and 4096 bytes.

A cell is one such combination, and one boot of a guest with three disks: vda is an image that is served natively, vdb a
Python disk that grows while it is mounted, and vdc a zoned one. The guest goes through every step, whatever became of
those before, and tells how each ended. ``tests/guest-matrix`` runs all cells and prints a table;
``test_guest_matrix.py`` runs a few.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from guests import MIB, Guest, Setup, guest_folder, make_image, serve, vfio_user_device
from rich.console import Console
from rich.table import Table

KERNELS = ("bookworm", "trixie", "trixie-backports")
CELL_SECONDS = 280.0

SIZE = 512 * MIB  # xfs takes no less than 300 MiB
SMALL, GROWN = 64 * MIB, 96 * MIB
ZONE, CONVENTIONAL = 4 * MIB, 8

STEPS = ("fio", "ext4", "xfs", "btrfs", "resize", "blkzone", "zonefs", "btrfs_zoned", "f2fs_zoned", "discard", "log")
OK, FAILED, NOT_IN_KERNEL = "ok", "FAILED", "-"
# What a step ends with in the guest when its kernel lacks what it is about.
LACKING = 77

# Grows once somebody has opened the named pipe ``control`` and closed it.
GROWING_DISK = """
import threading
from pathlib import Path

from vmmblk.backends.memory import Memory


class Disk(Memory):
    def __init__(self, sector: int, size: int, grown: int, control: Path):
        super().__init__(size // sector, sector_size=sector, max_sectors=grown // sector)
        threading.Thread(target=lambda: (control.read_bytes(), self.grow(grown // sector)), daemon=True).start()
"""

COMMAND = """
# has FILE TEXT: fails, and tells what there is, if the file holds anything else.
has() { test "$(cat "$1")" = "$2" || { echo "$1 has $(cat "$1"), not $2"; exit 1; }; }

# fill FOLDER: puts files there, and what they have to be into /tmp/sums.
fill() {
    cp /bin/busybox /usr/bin/fio /usr/lib/x86_64-linux-gnu/libc.so.6 "$1"
    dd if=/dev/urandom of="$1/random" bs=64k count=32 conv=fsync 2>/dev/null
    sha256sum "$1"/[a-z]*[a-z0-9] >/tmp/sums
}

# filesystem DISK TYPE CHECK...: mounts it, fills it, and finds everything again; twice checked by CHECK.
filesystem() {
    disk=$1 type=$2
    shift 2
    mount -t "$type" "$disk" /mnt
    mkdir /mnt/folder
    fill /mnt/folder
    umount /mnt
    "$@" "$disk"
    mount -t "$type" "$disk" /mnt
    sha256sum -c /tmp/sums
    rm /mnt/folder/random
    test $disk = /dev/vdc || fstrim /mnt
    umount /mnt
    "$@" "$disk"
}

fio_verify() {
    fio --name=verify --direct=1 --ioengine=io_uring --verify=crc32c --verify_fatal=1 --eta=never --output=/tmp/fio \\
        "$@" || { cat /tmp/fio; exit 1; }
}

step_fio() {
    has /sys/block/vda/queue/logical_block_size $SECTOR
    cut -c 35 /sys/block/vda/device/features >/tmp/packed
    has /tmp/packed $PACKED
    test "$(ls /sys/block/vda/mq | wc -w)" = $QUEUES
    fio_verify --filename=/dev/vda --iodepth=16 --rw=randwrite --bsrange=$SECTOR-64k --fsync=64 --numjobs=$QUEUES \\
        --size=$((16 / QUEUES))M --offset_increment=32M --cpus_allowed=0-$((QUEUES - 1)) --cpus_allowed_policy=split
    fio_verify --filename=/dev/vda --iodepth=4 --rw=write --bs=1M --offset=256M --size=16M
    # Each queue has a vector of its own, and all have interrupted.
    grep 'virtio0-req' /proc/interrupts >/tmp/interrupts
    test "$(wc -l </tmp/interrupts)" = $QUEUES
    awk -v last=$((QUEUES + 1)) '{ sum = 0; for (cpu = 2; cpu <= last; cpu++) sum += $cpu; if (!sum) exit 1 }' \\
        /tmp/interrupts
}

step_ext4() {
    mkfs.ext4 -q -F /dev/vda
    filesystem /dev/vda ext4 fsck.ext4 -f -n
}

step_xfs() {
    mkfs.xfs -q -f /dev/vda
    filesystem /dev/vda xfs xfs_repair -n
}

step_btrfs() {
    mkfs.btrfs -q -f /dev/vda
    filesystem /dev/vda btrfs btrfs check
}

step_resize() {
    has /sys/block/vdb/queue/logical_block_size $SECTOR
    mkfs.ext4 -q /dev/vdb
    mount -t ext4 /dev/vdb /mnt
    has /sys/block/vdb/size $((SMALL / 512))
    echo "@@ grow"
    tries=0
    while test "$(cat /sys/block/vdb/size)" = $((SMALL / 512)); do
        tries=$((tries + 1))
        test $tries -lt 300
        sleep 0.1
    done
    has /sys/block/vdb/size $((GROWN / 512))
    resize2fs /dev/vdb
    dd if=/dev/zero of=/mnt/big bs=1M count=$(((SMALL >> 20) + 8)) conv=fsync
    umount /mnt
    filesystem /dev/vdb ext4 fsck.ext4 -f -n
}

# need_zones: ends the step, well only if this kernel has no zones and so no disk.
need_zones() {
    test -e /sys/block/vdc && return
    test $ZONES_KNOWN = 0 && exit $LACKING
    echo "the zoned disk is not there"
    exit 1
}

# zones FIRST COUNT STATE: fails unless each of these zones is in this state.
zones() {
    blkzone report -o $(($1 * ZONE / 512)) -c $2 /dev/vdc >/tmp/zones
    test "$(grep -c "($3)" /tmp/zones)" = $2 || { cat /tmp/zones; exit 1; }
}

# zone OPERATION ZONE
zone() { blkzone $1 -o $(($2 * ZONE / 512)) -l $((ZONE / 512)) /dev/vdc; }

step_blkzone() {
    need_zones
    count=$((SIZE / ZONE)) first=$CONVENTIONAL
    has /sys/block/vdc/queue/zoned host-managed
    has /sys/block/vdc/queue/nr_zones $count
    has /sys/block/vdc/queue/logical_block_size $SECTOR
    zones 0 $first nw
    zones $first $((count - first)) em
    fio_verify --filename=/dev/vdc --zonemode=zbd --iodepth=8 --rw=write --bs=256k \\
        --offset=$((first * ZONE)) --size=$((2 * ZONE))
    zones $first 2 fu
    zones $((first + 2)) 1 em
    fio_verify --filename=/dev/vdc --zonemode=zbd --iodepth=8 --rw=randwrite --bs=16k \\
        --offset=$((16 * ZONE)) --size=$((4 * ZONE))
    zone open 30
    zones 30 1 oe
    dd if=/usr/bin/fio of=/dev/vdc bs=64k count=1 seek=$((30 * ZONE >> 16)) oflag=direct conv=notrunc 2>/dev/null
    zone close 30
    zones 30 1 cl
    zone finish 30
    zones 30 1 fu
    zone reset 30
    zones 30 1 em
    dd if=/usr/bin/fio of=/dev/vdc bs=64k count=1 seek=$((30 * ZONE >> 16)) oflag=direct conv=notrunc 2>/dev/null
    zones 30 1 oi
    blkzone reset /dev/vdc
    zones $first $((count - first)) em
}

step_zonefs() {
    need_zones
    modprobe zonefs || exit $LACKING
    mkzonefs -f /dev/vdc
    mount -t zonefs /dev/vdc /mnt
    test "$(ls /mnt/cnv | wc -w) $(ls /mnt/seq | wc -w)" = "$((CONVENTIONAL - 1)) $((SIZE / ZONE - CONVENTIONAL))"
    dd if=/usr/bin/fio of=/tmp/data bs=64k count=15 conv=sync 2>/dev/null
    for _ in 1 2 3; do
        dd if=/tmp/data of=/mnt/seq/0 bs=64k iflag=fullblock oflag=direct,append conv=notrunc 2>/dev/null
    done
    dd if=/tmp/data of=/mnt/cnv/2 bs=64k oflag=direct conv=notrunc 2>/dev/null
    dd if=/tmp/data of=/mnt/seq/1 bs=64k oflag=direct,append conv=notrunc 2>/dev/null
    dd if=/tmp/data of=/mnt/seq/3 bs=64k oflag=direct,append conv=notrunc 2>/dev/null
    truncate -s 0 /mnt/seq/1
    truncate -s $ZONE /mnt/seq/3
    umount /mnt
    zones $((CONVENTIONAL + 1)) 2 em
    zones $((CONVENTIONAL + 3)) 1 fu
    mount -t zonefs /dev/vdc /mnt
    cat /tmp/data /tmp/data /tmp/data | cmp - /mnt/seq/0
    head -c $((15 << 16)) /mnt/cnv/2 | cmp - /tmp/data
    head -c $((15 << 16)) /mnt/seq/3 | cmp - /tmp/data
    test "$(stat -c %s /mnt/seq/1 /mnt/seq/3 | tr '\\n' ' ')" = "0 $ZONE "
    umount /mnt
}

# Where a block goes in a zone btrfs leaves to the disk: it writes by ZONE_APPEND, once the conventional zones are used.
step_btrfs_zoned() {
    need_zones
    mkfs.btrfs -q -f -m single -d single /dev/vdc
    mount -t btrfs /dev/vdc /mnt
    fio_verify --filename=/mnt/fio --iodepth=8 --rw=write --bs=256k --size=$((CONVENTIONAL * ZONE + 2 * ZONE))
    umount /mnt
    filesystem /dev/vdc btrfs btrfs check
}

step_f2fs_zoned() {
    need_zones
    modprobe f2fs || exit $LACKING
    mkfs.f2fs -q -f -m /dev/vdc
    filesystem /dev/vdc f2fs fsck.f2fs
}

# Every second 8 MiB of 32 are forgotten or zeroed; those between stay.
step_discard() {
    blkdiscard /dev/vda
    tr '\\0' x </dev/zero | dd of=/dev/vda bs=1M count=32 iflag=fullblock oflag=direct 2>/dev/null
    blkdiscard -o 0 -l $((8 << 20)) /dev/vda
    blkdiscard -z -o $((16 << 20)) -l $((8 << 20)) /dev/vda
    piece() { dd if=/dev/vda bs=1M skip=$1 count=8 iflag=direct 2>/dev/null; }
    test "$(piece 16 | tr -d '\\0' | wc -c)" = 0
    for start in 8 24; do
        test "$(piece $start | tr -d x | wc -c)" = 0
        test "$(piece $start | wc -c)" = $((8 << 20))
    done
}

# Nothing that was done here may make the kernel complain.
step_log() { ! dmesg | grep -E -i -A 20 'i/o error|critical|warning:|bug:|call trace|corrupt|hung task|blocked for'; }

sed 's/.* Debian \\([^ -]*\\).*/\\1/' /proc/version
for name in $STEPS; do
    echo "@@ step $name"
    (set -e; step_$name)
    echo "@@ ended $name $?"
    umount /mnt 2>/dev/null
done
exit 0
"""


@dataclass(frozen=True)
class Cell:
    """One combination; ``kernel`` is what get-guest calls KERNEL."""

    kernel: str
    ring: str
    queues: int
    sector: int

    @property
    def name(self) -> str:
        """As it is named on the command line and in the table."""
        return f"{self.kernel} {self.ring} {self.queues}q {self.sector}"

    @property
    def zones_known(self) -> bool:
        """Whether the driver knows zoned disks, which came with Linux 6.4."""
        return not self.kernel.startswith("bookworm")


@dataclass
class Outcome:
    """How a cell went: the kernel's version, how each step ended, and in words what went wrong, if anything."""

    linux: str
    steps: dict[str, str]
    problems: list[str]
    seconds: float

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return not self.problems


def run(cell: Cell, folder: Path) -> Outcome:
    """Boots the cell's guest, with what it needs made in ``folder``, and tells how it went."""
    begun = time.monotonic()
    problems = []
    control = folder / "control"
    os.mkfifo(control)
    with ExitStack() as stack:
        lines = disks(cell, folder, control)
        servers = [stack.enter_context(serve(folder / name, *line)) for name, line in lines.items()]
        devices = [argument for server in servers for argument in vfio_user_device(server.socket)]
        setup = Setup(kernel=cell.kernel, cpus=cell.queues, arguments=devices)
        guest = stack.enter_context(Guest(setup, command(cell)))
        try:
            guest.wait_for("@@ grow", CELL_SECONDS)
            control.write_bytes(b"")
        except TimeoutError:
            problems.append("the guest did not come as far as growing a disk")
        result = guest.wait(max(1.0, begun + CELL_SECONDS - time.monotonic()))
        if result.status:
            problems.append(f"the guest ended with status {result.status}\n{guest.report()}")
        problems += [
            f"the server of the disk {server.socket.name} ended with status {status}\n{server.log}"
            for server in servers
            if (status := server.stop()) or server.log
        ]
    steps, failures = ended(result.output)
    problems += failures or on_the_host(folder / "disk.img")
    return Outcome(result.output.partition("\n")[0], steps, problems, time.monotonic() - begun)


def disks(cell: Cell, folder: Path, control: Path) -> dict[str, list[str]]:
    """Makes the guest's disks, in their order; what ``vmmblk serve`` is told for each."""
    image = make_image(folder / "disk.img", SIZE)
    zoned = make_image(folder / "zoned.img", SIZE)
    growing = folder / "growing.py"
    growing.write_text(GROWING_DISK, encoding="utf-8")
    common = ["--queues", str(cell.queues), "--features", f"packed={'on' if cell.ring == 'packed' else 'off'}"]
    sector = ["--block-size", str(cell.sector)]
    zones = ["--filter", f"zoned:zone_size={ZONE},conventional={CONVENTIONAL}"]
    own = [f"sector={cell.sector}", f"size={SMALL}", f"grown={GROWN}", f"control={control}"]
    return {
        "image": ["--engine", "native", *common, *sector, str(image)],
        "growing": [*common, str(growing), *own],
        "zoned": [*common, *sector, *zones, str(zoned)],
    }


def command(cell: Cell) -> str:
    """What the guest is to do."""
    settings = {
        "STEPS": " ".join(STEPS), "SECTOR": cell.sector, "PACKED": int(cell.ring == "packed"), "QUEUES": cell.queues,
        "SMALL": SMALL, "GROWN": GROWN, "SIZE": SIZE, "ZONE": ZONE, "CONVENTIONAL": CONVENTIONAL,
        "ZONES_KNOWN": int(cell.zones_known), "LACKING": LACKING,
    }  # fmt: skip
    return "".join(f"{name}='{value}'\n" for name, value in settings.items()) + COMMAND


def ended(output: str) -> tuple[dict[str, str], list[str]]:
    """How each step ended, and what those that failed have printed."""
    statuses = {"0": OK, str(LACKING): NOT_IN_KERNEL}
    steps = dict.fromkeys(STEPS, FAILED)
    failures = {name: f"{name} never came to its end" for name in STEPS}
    for name, text, status in re.findall(r"(?ms)^@@ step (\w+)\n(.*?)^@@ ended \w+ (\d+)$", output):
        steps[name] = statuses.get(status, FAILED)
        failures[name] = f"{name} failed with status {status}:\n{text}" if steps[name] == FAILED else ""
    return steps, list(filter(None, failures.values()))


def on_the_host(image: Path) -> list[str]:
    """What is wrong with the image after the last step, discard."""
    found = []
    with image.open("rb") as file:
        pieces = [file.read(8 * MIB) for _ in range(4)]
    if [pieces[1], pieces[2], pieces[3]] != [b"x" * (8 * MIB), bytes(8 * MIB), b"x" * (8 * MIB)]:
        found.append("discard: the image does not hold what the guest wrote and zeroed")
    if (used := image.stat().st_blocks * 512) > 26 * MIB:
        found.append(f"discard: the image still takes {used} bytes")
    return found


def table(outcomes: dict[Cell, Outcome]) -> Table:
    """Every cell that was run, and how each of its steps went."""
    shown = Table(title="Linux guests", caption="-: not in this kernel (zoned virtio disks came with Linux 6.4)")
    for column in ("Linux", "ring", "queues", "sector", *(name.replace("_", "\n") for name in STEPS), "seconds"):
        shown.add_column(column, no_wrap=True)
    for cell, outcome in outcomes.items():
        styles = {FAILED: "red", OK: "green", NOT_IN_KERNEL: "dim"}
        steps = [f"[{styles[outcome.steps[name]]}]{outcome.steps[name]}" for name in STEPS]
        first = (outcome.linux or cell.kernel, cell.ring, str(cell.queues), str(cell.sector))
        shown.add_row(*first, *steps, f"{outcome.seconds:.0f}")
    return shown


def main() -> int:
    """Runs the cells that were asked for, one after the other, and prints the table."""
    parser = argparse.ArgumentParser(prog="guest-matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only cells with these words in their names")
    words = set(parser.parse_args().words)
    every = [Cell(*values) for values in itertools.product(KERNELS, ("split", "packed"), (1, 4), (512, 4096))]
    cells = [cell for cell in every if words <= set(cell.name.split())]
    if not cells:
        parser.error(f"no cell has all of these in its name; they are named as in: {every[0].name}")
    for kernel in {cell.kernel: None for cell in cells}:
        guest_folder(kernel)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    outcomes: dict[Cell, Outcome] = {}
    for number, cell in enumerate(cells, 1):
        with tempfile.TemporaryDirectory(prefix="vmmblk-matrix-") as folder:
            outcome = outcomes[cell] = run(cell, Path(folder))
        verdict = "ok" if outcome.good else "FAILED"
        console.print(f"{number}/{len(cells)} {cell.name}: {verdict}, {outcome.seconds:.0f} s", markup=False)
        for problem in outcome.problems:
            console.print(problem, markup=False)
    console.print(table(outcomes))
    bad = sum(not outcome.good for outcome in outcomes.values())
    console.print(f"{bad} of {len(cells)} cells failed" if bad else f"all {len(cells)} cells passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
