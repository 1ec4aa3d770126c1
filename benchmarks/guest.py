"""fio in a guest that has all disks at once: ours, QEMU's own, and those of QEMU's storage daemon.

They are measured one right after the other, so that what else the machine does falls on all of them; who comes first
changes from round to round.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cells import GUEST_DISKS, Server, guest_seconds
from benchmarks.measure import image

_SCRIPTS = Path(__file__).resolve().parents[1] / "qemu-scripts"
sys.path.insert(0, str(_SCRIPTS / "lib"))

import vmm  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.cells import GuestCell, GuestDisk, Settings

__all__ = ["accelerator", "fetch", "in_guest", "jobs", "parsed"]

Sample = dict[str, Any]

_VMMBLK = (sys.executable, "-m", "vmmblk")
_FIRST_SLOT = 0x10
_IMAGE_SIZE = 256 << 20
_RAMP = 0.2
_BOOT_TIMEOUT = 300.0
_JOB_TIMEOUT = 60.0


def fetch() -> Path:
    """QEMU's storage daemon; it, QEMU and the guest are fetched if need be.  Raises RuntimeError."""
    try:
        vmm.qemu()
        vmm.guest_folder()
        found = subprocess.run([_SCRIPTS / "get-storage-daemon"], stdout=subprocess.PIPE, text=True, check=False)
        if found.returncode:
            raise RuntimeError("QEMU's storage daemon cannot be had; the reason is above")
    except SystemExit:
        raise RuntimeError("QEMU or the guest cannot be had; the reason is above") from None
    return Path(found.stdout.strip())


def accelerator() -> dict[str, str]:
    """What decides how fast a guest is here, for whoever reads the figures."""
    said = subprocess.run([vmm.qemu(), "--version"], capture_output=True, text=True, check=False).stdout
    kind = "KVM" if vmm.kvm_works() else "TCG: there is no KVM here, so an emulated processor sets the pace"
    return {"QEMU": said.splitlines()[0] if said else "", "guest": kind}


def in_guest(cells: Sequence[GuestCell], settings: Settings, daemon: Path, folder: Path) -> Iterator[Sample]:
    """A sample for each disk, cell and round, as they come; images lie in ``folder``.  Raises RuntimeError, OSError."""
    rounds, seconds = settings.rounds, guest_seconds(settings.seconds)
    with contextlib.ExitStack() as stack:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmmblk-bench-")))
        arguments = ["-object", "iothread,id=io"]
        for number, disk in enumerate(GUEST_DISKS):
            file = stack.enter_context(image(folder, min(settings.size, _IMAGE_SIZE), cached=not disk.direct))
            arguments += stack.enter_context(_device(number, disk, file, (daemon, sockets / str(number))))
        guest = stack.enter_context(vmm.Guest(vmm.Setup(arguments=arguments), _script(cells, rounds, seconds)))
        _await(guest, "@ready\n", _BOOT_TIMEOUT)
        for number in range(rounds):
            for place, cell in enumerate(cells):
                done = f"@done {number} {place}\n"
                _await(guest, done, len(GUEST_DISKS) * (seconds + _JOB_TIMEOUT))
                said = guest.output.partition(f"@begin {number} {place}\n")[2].partition(done)[0]
                for disk, iops in parsed(said, cell):
                    yield {"round": number, **asdict(disk), **asdict(cell), "iops": iops}


def _await(guest: vmm.Guest, text: str, timeout: float) -> None:
    """Wait until the guest says so; one that ends first, or hangs, is a RuntimeError of one line."""
    deadline = time.monotonic() + timeout
    try:
        guest.wait_for(text, timeout)
    except TimeoutError:
        ended = time.monotonic() < deadline  # its output has, and QEMU itself may take a moment more
        said = [line for line in (*guest.output.splitlines(), *guest.qemu_log.splitlines()) if line.strip()]
        how = "ended too early" if ended else f"was silent for {timeout:.0f} s"
        raise RuntimeError(f"the guest {how}; the last that was said: {said[-1] if said else 'nothing'}") from None


# The disks.


@contextlib.contextmanager
def _device(number: int, disk: GuestDisk, file: Path, server: tuple[Path, Path]) -> Iterator[list[str]]:
    """QEMU's arguments for a disk in a slot of its own, while its server, a daemon on a socket, runs."""
    daemon, path = server
    slot = f"{_FIRST_SLOT + number:#x}"
    node = f"driver=file,node-name=disk{number},aio=io_uring,filename={_comma(file)}"
    node += f",cache.direct={'on' if disk.direct else 'off'}"
    match disk.server:
        case Server.VMMBLK:
            mode = ["direct=on"] if disk.direct else []
            with vmm.Served(path, "--queues", "1", str(file), *mode, program=_VMMBLK):
                yield vmm.vfio_user_device(path, addr=slot)
        case Server.QEMU:
            yield ["-blockdev", node, "-device", f"virtio-blk-pci,drive=disk{number},iothread=io,addr={slot}"]
        case Server.DAEMON:
            with _exported(daemon, path, node, number):
                device = f"vhost-user-blk-pci,chardev=disk{number},num-queues=1,addr={slot}"
                yield ["-chardev", f"socket,id=disk{number},path={_comma(path)}", "-device", device]


@contextlib.contextmanager
def _exported(daemon: Path, path: Path, node: str, number: int) -> Iterator[None]:
    """The storage daemon on a socket, which it gets listening: QEMU may connect at once."""
    with contextlib.ExitStack() as stack:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            export = f"vhost-user-blk,id=export,node-name=disk{number},writable=on,iothread=io"
            command = [str(daemon), "--object", "iothread,id=io", "--blockdev", node]
            command += ["--export", f"{export},addr.type=fd,addr.str={listener.fileno()}"]
            server = stack.enter_context(subprocess.Popen(command, pass_fds=[listener.fileno()]))
        stack.callback(server.terminate)
        yield


def _comma(path: Path) -> str:
    """A path as QEMU's option parser wants it."""
    return str(path).replace(",", ",,")


# The guest's work.


def _script(cells: Sequence[GuestCell], rounds: int, seconds: float) -> str:
    """The guest's command: it says where each cell begins and ends, and in between what fio has to say."""
    lines = [
        f"disk{number}=$(echo /sys/bus/pci/devices/0000:00:{_FIRST_SLOT + number:02x}.0/virtio*/block/*);"
        f" disk{number}=/dev/${{disk{number}##*/}}; test -b $disk{number} || exit 9"
        for number in range(len(GUEST_DISKS))
    ]
    lines += [*jobs(cells[0], 0, seconds), "echo @ready"]  # what emulates a processor needs time to warm up
    for number in range(rounds):
        for place, cell in enumerate(cells):
            lines += [f"echo '@begin {number} {place}'", *jobs(cell, number, seconds), f"echo '@done {number} {place}'"]
    return "\n".join(lines)


def jobs(cell: GuestCell, number: int, seconds: float) -> list[str]:
    """The lines of shell that measure a cell on all disks, in the order of this round."""
    options = ["--direct=1", "--ioengine=io_uring", "--thread", "--output-format=terse", "--terse-version=3"]
    options += [f"--rw={cell.rw}", f"--bs={cell.block_size}", f"--iodepth={cell.iodepth}", "--norandommap"]
    options += ["--time_based", f"--runtime={seconds * 1000:.0f}ms", f"--ramp_time={_RAMP * 1000:.0f}ms"]
    options += ["--randrepeat=0", f"--fdatasync={int(cell.flush)}"]
    each = [f"--name={index} --stonewall --filename=$disk{index}" for index in _order(number)]
    lines = [f"fio {shlex.join(options)} {' '.join(each)} >/tmp/fio 2>&1 || {{ cat /tmp/fio; exit 1; }}"]
    lines.append("grep '^3;' /tmp/fio | cut -d';' -f3,8,49")
    if "write" in cell.rw:
        # What the page cache took is written now, and not while another disk is measured.
        lines += [f"dd if=/dev/null of=$disk{index} conv=fsync status=none" for index in range(len(GUEST_DISKS))]
    return lines


def _order(number: int) -> Sequence[int]:
    """The disks as this round takes them: of each cache mode another server comes first."""
    count = len(Server)
    return [first + (number + step) % count for first in range(0, len(GUEST_DISKS), count) for step in range(count)]


def parsed(said: str, cell: GuestCell) -> Iterator[tuple[GuestDisk, float]]:
    """Requests per second of each disk.  Raises RuntimeError if fio left one out."""
    found = [line.split(";") for line in said.splitlines()]
    if sorted(each[0] for each in found) != [str(index) for index in range(len(GUEST_DISKS))]:
        raise RuntimeError(f"fio in the guest did not measure every disk: {said.strip().splitlines()[-1:]}")
    for index, reads, writes in found:
        yield GUEST_DISKS[int(index)], float(writes if "write" in cell.rw else reads)
