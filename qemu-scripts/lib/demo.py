"""The part of the demo that runs once everything is installed: serve, boot, measure, verify, print."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vmm
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
IMAGE_SIZE = 256 * MIB
# Jobs that verify work on these parts of the disk, and the timed jobs that write on what follows.
VERIFIED = 32 * MIB
READ_BACK = 64 * MIB
VMMBLK = (sys.executable, "-m", "vmmblk")

console = Console()


@dataclass(frozen=True)
class Job:
    """One fio job: its title, its options, and whether it verifies what it wrote rather than measure."""

    title: str
    options: str
    verifies: bool = False


def jobs(runtime: float, *, writes: bool) -> list[Job]:
    """The jobs of one guest. Those that write leave the verified parts alone."""
    timed = f"--time_based --runtime={runtime * 1000:.0f}ms"
    beyond = f"--offset={VERIFIED}" if writes else ""
    measured = [
        Job("random read 4 KiB, QD 32", f"--rw=randread --bs=4k --iodepth=32 {timed}"),
        Job("random read 4 KiB, QD 1", f"--rw=randread --bs=4k --iodepth=1 {timed}"),
        Job("seq. read 128 KiB, QD 8", f"--rw=read --bs=128k --iodepth=8 {timed}"),
    ]
    if not writes:
        return measured
    checked = "--verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=256"
    half = VERIFIED // 2
    return [
        *measured,
        Job("random write 4 KiB, QD 32", f"--rw=randwrite --bs=4k --iodepth=32 {beyond} {timed}"),
        Job("seq. write 128 KiB, QD 8", f"--rw=write --bs=128k --iodepth=8 {beyond} {timed}"),
        Job("random write 4 KiB, flushes", f"--rw=randwrite --bs=4k --fdatasync=1 {beyond} {timed}"),
        Job("random", f"--rw=randwrite --bs=4k --iodepth=32 --size={half} {checked}", verifies=True),
        Job("sequential", f"--rw=write --bs=128k --iodepth=8 --offset={half} --size={half} {checked}", verifies=True),
    ]


def verify_only(job: Job) -> Job:
    """The job that reads back, in another guest, what this one wrote."""
    return Job(job.title, f"{job.options} --verify_only", verifies=True)


def command(work: list[Job], size: int) -> str:
    """The shell command for the guest: every job's number, then fio's JSON."""
    common = "--filename=/dev/vda --direct=1 --ioengine=io_uring --output-format=json --lat_percentiles=1"
    lines = [f"test $(blockdev --getsize64 /dev/vda) -ge {size} || exit 9"]
    lines += [f"echo '@job {n}'; fio --name=job {common} {job.options} || exit" for n, job in enumerate(work)]
    return "\n".join([*lines, "echo '@done'"])


class Failed(Exception):
    """The demo cannot go on; the message is for the user."""


def run_guest(name: str, device: list[str], script: str, advance: Callable[[int], object], timeout: float) -> str:
    """Boots a guest and runs a script in it, calling advance with the number of jobs begun. Returns its output."""
    text = bytearray()

    def follow(piece: bytes) -> None:
        text.extend(piece)
        advance(text.count(b"@job ") + text.count(b"@done"))

    with vmm.Guest(vmm.Setup(arguments=device), script, on_output=follow) as guest:
        result = guest.wait(timeout)
        if result.status:
            raise Failed(f"the guest with {name} failed (status {result.status})\n{guest.report()}")
    return result.output


def results(output: str) -> list[dict[str, Any]]:
    """What fio reported for each job."""
    found = []
    for part in output.split("@job ")[1:]:
        # fio may print warnings before its JSON.
        body = part.partition("@done")[0]
        found.append(json.loads(body[body.index("{\n") : body.rindex("}") + 1])["jobs"][0])
    return found


def measure(result: dict[str, Any]) -> tuple[float, float, float, float]:
    """IOPS, MiB/s, and the mean and 99th percentile of the latency in microseconds, of the direction that moved."""
    side = max((result["read"], result["write"]), key=lambda side: int(side["total_ios"]))
    latency = side["lat_ns"]
    return (
        float(side["iops"]),
        float(side["bw_bytes"]) / MIB,
        float(latency["mean"]) / 1000,
        float(latency.get("percentile", {}).get("99.000000", 0)) / 1000,
    )


def table(work: list[Job], ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Table:
    """The one table: every timed job, as both guests saw it."""
    accelerator = "KVM" if vmm.kvm_works() else "TCG: no KVM here, so an emulated processor sets the pace"
    shown = Table(title="What the guest saw", caption=f"Guest under {accelerator}")
    shown.add_column("job", no_wrap=True)
    shown.add_column("disk", no_wrap=True)
    for column in ("IOPS", "MiB/s", "mean µs", "p99 µs"):
        shown.add_column(column, justify="right", no_wrap=True)
    for job, one, other in zip(work, ours, theirs, strict=True):
        if not job.verifies:
            left, right = measure(one), measure(other)
            ratio = f"{left[0] / right[0]:.2f} of QEMU's" if right[0] else ""
            shown.add_row(job.title, "vmmblk", *(f"{value:,.0f}" for value in left))
            shown.add_row(f"[dim]{ratio}", "QEMU", *(f"{value:,.0f}" for value in right), end_section=True)
    return shown


def compare(image: Path | None, runtime: float, folder: Path) -> int:
    """Runs the jobs on the image through vmmblk, then through QEMU's own virtio-blk, and prints the table."""
    writes = image is None
    if image is None:
        image = folder / "disk.img"
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, IMAGE_SIZE)
    size = image.stat().st_size if image.is_file() else 0
    if size < MIB:
        raise Failed(f"{image} is no raw disk image of 1 MiB or more")
    work = jobs(runtime, writes=writes)
    again = [verify_only(job) for job in work if job.verifies]
    mode = [] if writes else ["--read-only"]
    read_back = "" if writes else f"\ndd if=/dev/vda bs=1M count={READ_BACK // MIB} iflag=direct | sha256sum"
    timeout = 300 + 10 * runtime * len(work)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[doing]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def follower(name: str, titles: list[Job]) -> Callable[[int], object]:
            task = progress.add_task(name, total=len(titles), doing="booting")

            def follow(begun: int) -> None:
                done = begun > len(titles)
                title = "done" if done else titles[begun - 1].title if begun else "booting"
                progress.update(task, completed=max(0, begun - 1), doing=title)

            return follow

        with vmm.Served(folder / "disk.sock", *mode, str(image), program=VMMBLK) as server:
            device = vmm.vfio_user_device(server.socket)
            output = run_guest("vmmblk", device, command(work, size) + read_back, follower("vmmblk", work), timeout)
            if status := server.stop():
                raise Failed(f"vmmblk serve ended with status {status}\n{server.log}")
        ours = results(output)
        if not writes:
            with image.open("rb") as head:
                expected = hashlib.sha256(head.read(READ_BACK)).hexdigest()
            if expected not in output:
                raise Failed(f"the guest did not read what {image} holds")

        theirs_work = [*again, *work]
        options = "" if writes else ",read-only=on"
        device = ["-object", "iothread,id=io"]
        device += ["-blockdev", f"driver=file,node-name=disk,aio=io_uring{options},filename={comma(image)}"]
        device += ["-device", "virtio-blk-pci,drive=disk,iothread=io"]
        output = run_guest(
            "QEMU's own virtio-blk", device, command(theirs_work, size), follower("QEMU", theirs_work), timeout
        )
        theirs = results(output)[len(again) :]
    console.print(table(work, ours, theirs))
    if writes:
        console.print(
            f"Verified: {VERIFIED // MIB} MiB written through vmmblk, random and sequential, with flushes: every byte"
            " read back through vmmblk and, in the second guest, through QEMU's own virtio-blk."
        )
    else:
        console.print(f"Verified: the first {min(READ_BACK, size) // MIB} MiB that the guest read are the file's.")
    return 0


def comma(path: Path) -> str:
    """A path as QEMU's option parser wants it."""
    return str(path).replace(",", ",,")


def shell(image: Path | None, folder: Path) -> int:
    """A prompt in a guest that has the image as /dev/vda."""
    if image is None:
        image = folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(IMAGE_SIZE)
    with vmm.Served(folder / "disk.sock", str(image), program=VMMBLK) as server:
        console.print("A prompt in the guest; the disk is /dev/vda. 'exit' ends it, and so does Ctrl-A X.")
        status = vmm.shell(vmm.Setup(arguments=vmm.vfio_user_device(server.socket)))
        return server.stop() or status


def main() -> int:
    """Parses the command line and runs the demo."""
    parser = argparse.ArgumentParser(prog="demo")
    parser.add_argument("--shell", action="store_true")
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--runtime", type=float, default=4)
    options = parser.parse_args()
    if options.runtime <= 0:
        parser.error("--runtime needs a number of seconds above 0")
    with tempfile.TemporaryDirectory(prefix="demo-", dir=vmm.CACHE) as name:
        try:
            if options.shell:
                return shell(options.disk, Path(name))
            return compare(options.disk, options.runtime, Path(name))
        except (Failed, RuntimeError) as error:
            console.print(f"demo: {error}", style="red", markup=False, highlight=False)
            return 1
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
