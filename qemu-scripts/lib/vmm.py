"""Starts QEMU with the test guest, and reads what its command printed and how it ended.

The scripts in this folder and the tests share it. It needs Python's standard library only: the scripts run before
there is a virtual environment.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self, cast

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from types import TracebackType

SCRIPTS = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmmblk"
# An emulated processor on a busy machine can be too slow for the check of the timer, which then panics.
KERNEL_ARGUMENTS = "console=ttyS0 loglevel=5 panic=-1 no_timer_check"

TIMED_OUT = 124
NO_STATUS = 125

# What the guest's init writes around the command's output; firmware may have written to the port before.
_BEGINS = b"@@ command begins @@\n"
_ENDS = b"\n@@ command ended: "
_ENDED = re.compile(_ENDS + rb"(\d+) @@\n")


def qemu() -> Path:
    """The QEMU to run, fetched first if need be."""
    return Path(_last_line(SCRIPTS / "get-qemu"))


def guest_folder(kernel: str = "") -> Path:
    """The folder of the guest's kernel and initramfs, fetched first if need be; ``kernel`` is get-guest's KERNEL."""
    return Path(_last_line(SCRIPTS / "get-guest", *([kernel] if kernel else [])))


def firmware_image(name: str) -> Path:
    """The image of firmware that get-firmware knows by this name, fetched first if need be."""
    return Path(_last_line(SCRIPTS / "get-firmware", name))


def _last_line(script: Path, *arguments: str) -> str:
    # Its standard error is the user's: progress is shown there.
    result = subprocess.run([script, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)
    return result.stdout.splitlines()[-1]


def kvm_works() -> bool:
    """Whether guests can run under KVM: the processor's flags say so, and /dev/kvm opens."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if not re.search(r"^flags\s*:.*\b(svm|vmx)\b", flags, re.MULTILINE):
        return False
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def vfio_user_device(socket: Path | str, **properties: object) -> list[str]:
    """QEMU's arguments for a vfio-user device; only JSON can say the socket."""
    device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(socket)}, **properties}
    return ["-device", json.dumps(device)]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A guest machine.

    ``memory`` is in QEMU's notation. ``memory_backend`` is ``shared`` (a memfd that a vfio-user server can map),
    ``private`` (a memfd whose pages the guest copies on write) or ``none`` (plain ``-m``). ``firmware`` is None to
    boot the kernel directly, ``seabios`` or ``ovmf`` to boot from a disk, or one of get-firmware's: U-Boot, on the
    machine ``pc``, waits on the console for commands. ``kernel`` is get-guest's KERNEL. ``console`` is a connected
    socket that becomes the console, to type there.
    """

    memory: str = "512M"
    cpus: int = 1
    machine: str = "q35"
    memory_backend: str = "shared"
    firmware: str | None = None
    kernel: str = ""
    kernel_args: str = ""
    allow_reboot: bool = False
    console: socket.socket | None = None
    arguments: list[str] = field(default_factory=list)

    def command_line(self, folder: Path, *, interactive: bool) -> list[str]:
        """QEMU's command line; folder is for this machine's own files, and holds the file ``command``."""
        machine = self.machine
        memory = ["-m", self.memory]
        if self.memory_backend != "none":
            share = "on" if self.memory_backend == "shared" else "off"
            memory += ["-object", f"memory-backend-memfd,id=mem,size={self.memory},share={share}"]
            machine += ",memory-backend=mem"
        kvm = kvm_works()
        accelerator = ["-accel", "kvm", "-cpu", "host"] if kvm else ["-accel", "tcg", "-cpu", "max"]
        line = [str(qemu()), "-nodefaults", "-no-user-config", "-display", "none", "-machine", machine, *accelerator]
        # Where there can be only one processor, TCG leaves out the guest's memory barriers: then whoever serves a disk
        # from another thread now and then sees a stale used_event, sends no interrupt, and the guest hangs.
        processors = str(self.cpus) if kvm else f"{self.cpus},maxcpus={max(self.cpus, 2)}"
        line += ["-smp", processors, *memory]
        line += [] if self.allow_reboot else ["-no-reboot"]
        line += self._boot(folder)
        line += ["-fw_cfg", f"name=opt/vmmblk/command,file={folder}/command"]
        if interactive:
            line += ["-fw_cfg", "name=opt/vmmblk/shell,string=1"]
            line += ["-serial", "mon:stdio"]
        else:
            console = f"file,id=console,path={folder}/console"
            if self.console is not None:
                console = f"socket,id=console,fd={self.console.fileno()},logfile={folder}/console"
            line += ["-chardev", console, "-serial", "chardev:console"]
            line += ["-chardev", "stdio,id=output,signal=off", "-serial", "chardev:output"]
        return line + self.arguments

    def _boot(self, folder: Path) -> list[str]:
        if self.firmware == "ovmf":
            place = CACHE / "qemu"
            variables = folder / "OVMF_VARS.fd"
            variables.write_bytes((place / "OVMF_VARS.fd").read_bytes())
            code = f"if=pflash,unit=0,format=raw,readonly=on,file={place}/OVMF_CODE.fd"
            return ["-drive", code, "-drive", f"if=pflash,unit=1,format=raw,file={variables}"]
        if self.firmware == "seabios":
            return []
        if self.firmware is not None:
            return ["-bios", str(firmware_image(self.firmware))]
        place = guest_folder(self.kernel)
        line = ["-kernel", f"{place}/vmlinuz", "-initrd", f"{place}/initramfs"]
        return [*line, "-append", f"{KERNEL_ARGUMENTS} {self.kernel_args}".strip()]


@dataclass(frozen=True)
class Result:
    """How a guest ended.

    ``status`` is the command's, TIMED_OUT or NO_STATUS (QEMU ended before the command did: a panic, an abort).
    ``output`` is what the command printed, ``console`` the kernel's messages, ``qemu_log`` QEMU's standard error and
    ``qemu_status`` QEMU's exit status, negative for a signal.
    """

    status: int
    output: str
    console: str
    qemu_log: str
    qemu_status: int


class Served:
    """A running ``vmmblk serve``, to be used as a context manager; it is killed at the end if it still runs.

    ``arguments`` follow ``vmmblk serve --socket SOCKET``. It is listening once the constructor has returned; when it
    ended instead, RuntimeError has what it said.
    """

    def __init__(self, socket: Path, *arguments: str, program: Sequence[str] = ("vmmblk",)) -> None:
        self.socket = socket
        self._log_file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        line = [*program, "serve", "--socket", str(socket), *arguments]
        self.process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log_file, text=True
        )
        stdout = cast("IO[str]", self.process.stdout)
        # It prints once it listens, and is silent from then on.
        self.first_line = stdout.readline()
        if not self.first_line:
            self.process.wait()
            raise RuntimeError(self.log.strip() or f"vmmblk serve ended with status {self.process.returncode}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._log_file.close()

    @property
    def log(self) -> str:
        """What it has written to its standard error so far."""
        return os.pread(self._log_file.fileno(), 1 << 24, 0).decode(errors="replace")

    def stop(self, timeout: float = 30) -> int:
        """Ends it with SIGTERM; returns its exit status. Raises subprocess.TimeoutExpired."""
        self.process.terminate()
        return self.process.wait(timeout)

    def kill(self) -> None:
        """Kills it with SIGKILL, if it still runs, and waits for its end."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        cast("IO[str]", self.process.stdout).close()


class CommandOutput:
    """The command's output as it comes from the serial port, and its status once it has ended."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.status: int | None = None
        self._held = b""
        self._begun = False

    def feed(self, piece: bytes) -> bytes:
        """Takes a piece from the port; returns what of the output became known by it."""
        self._held += piece
        if not self._begun:
            if _BEGINS not in self._held:
                return b""
            self._begun = True
            self._held = self._held.partition(_BEGINS)[2]
        if ended := _ENDED.search(self._held):
            self.status = int(ended[1])
            known, self._held = self._held[: ended.start()], b""
        else:
            # A last line that may become the one that tells the status waits for its end.
            line = self._held.rfind(b"\n")
            may_be = line >= 0 and _ENDS.startswith(self._held[line:][: len(_ENDS)])
            end = line if may_be else len(self._held)
            known, self._held = self._held[:end], self._held[end:]
        self.text += known
        return known

    def end(self) -> bytes:
        """Returns what was held back, when nothing more comes."""
        known, self._held = self._held if self._begun else b"", b""
        self.text += known
        return known


class Guest:
    """A running guest, to be used as a context manager; what is left of it at the end is killed.

    ``process`` is QEMU itself. ``on_output`` is called with each piece of the command's output as it comes.
    """

    def __init__(self, setup: Setup, command: str, on_output: Callable[[bytes], object] | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="vmmblk-guest-")
        self._folder = Path(self._temporary.name)
        (self._folder / "command").write_text(command + "\n", encoding="utf-8")
        self._on_output = on_output
        self._output = CommandOutput()
        line = setup.command_line(self._folder, interactive=False)
        with (self._folder / "qemu-log").open("wb") as log:
            self.process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[] if setup.console is None else [setup.console.fileno()],
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self._temporary.cleanup()

    @property
    def output(self) -> str:
        """What the command has printed so far."""
        return self._output.text.decode(errors="replace")

    @property
    def console(self) -> str:
        """What the kernel has printed so far."""
        return self._text("console")

    @property
    def qemu_log(self) -> str:
        """What QEMU has printed so far."""
        return self._text("qemu-log")

    def kill(self) -> None:
        """Kills QEMU with SIGKILL, if it still runs, and waits for its end."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._stdout.close()

    def wait_for(self, text: str, timeout: float) -> None:
        """Waits until the command has printed text. Raises TimeoutError with the console's tail."""
        if not self._read(time.monotonic() + timeout, until=text.encode()):
            raise TimeoutError(f"the guest did not print {text!r}\n{self.report()}")

    def wait(self, timeout: float) -> Result:
        """Waits for QEMU's end, at most timeout seconds; then it is killed."""
        ended = self._read(time.monotonic() + timeout, until=None)
        if ended:
            self.process.wait()  # it closes its output before it has quite ended, and then with a status of its own
        self.kill()
        status = self._output.status
        if status is None:
            status = NO_STATUS if ended else TIMED_OUT
        return Result(status, self.output, self.console, self.qemu_log, self.process.returncode)

    def report(self) -> str:
        """The last lines of everything there is, for whoever wants to know why it went wrong."""
        parts = {"QEMU": self.qemu_log, "console": self.console, "output": self.output}
        tails = {name: text.splitlines()[-80:] for name, text in parts.items()}
        return "\n".join(line for name, tail in tails.items() if tail for line in (f"--- {name}:", *tail))

    @property
    def _stdout(self) -> IO[bytes]:
        return cast("IO[bytes]", self.process.stdout)  # it was asked for

    def _text(self, name: str) -> str:
        file = self._folder / name
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def _read(self, deadline: float, until: bytes | None) -> bool:
        """Collects output until it holds ``until``, or QEMU ends; False when the time was up first."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while until is None or until not in self._output.text:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return False
                piece = os.read(self._stdout.fileno(), 65536)
                known = self._output.feed(piece) if piece else self._output.end()
                if self._on_output is not None:
                    self._on_output(known)
                if not piece:
                    return until is None or until in self._output.text
        return True


def shell(setup: Setup) -> int:
    """Boots a guest with a prompt on this terminal; returns QEMU's exit status."""
    with tempfile.TemporaryDirectory(prefix="vmmblk-guest-") as folder:
        (Path(folder) / "command").write_text("", encoding="utf-8")
        return subprocess.call(setup.command_line(Path(folder), interactive=True))
