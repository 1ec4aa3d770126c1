"""The command line: what is refused, what is printed, signals and exit statuses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmmblk.cli import main
from vmmblk.cli.qemu import added_arguments
from vmmblk.device import SWITCHES
from vmmblk.engine import EngineOptions
from vmmblk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmmblk.block import Block
    from vmmblk.server import ServerOptions

VMMBLK = [sys.executable, "-m", "vmmblk"]
SOCKET = Path("/run/disk.sock")
DEVICE = ["-device", '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/disk.sock"}}']
SHARED = "memory-backend-file,id=m,mem-path=/dev/shm/m,size=1G,share=on"


def backend(size: int) -> list[str]:
    """The memory arguments for ``size`` bytes."""
    backend = f"memory-backend-memfd,id=vmmblk-mem,size={size},share=on"
    return ["-object", backend, "-machine", "memory-backend=vmmblk-mem"]


class FakeServer:
    """A server that remembers what it was made for and done to it."""

    failure: BaseException | None = None
    stops = True
    engine = "a fake one"
    made: list[FakeServer]

    def __init__(self, socket: Path, block: Block, options: ServerOptions) -> None:
        self.socket, self.block, self.options = socket, block, options
        self.calls: list[object] = []
        self.made.append(self)

    def start(self) -> None:
        """Note the call."""
        self.calls.append("start")

    def stop(self, timeout: float) -> bool:
        """Note the call."""
        self.calls.append(("stop", timeout))
        return self.stops

    @property
    def failed(self) -> BaseException | None:
        """What the test wants."""
        return self.failure


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[FakeServer]:
    """The fake server in place of the real one."""

    class Server(FakeServer):
        made: list[FakeServer] = []  # noqa: RUF012

    monkeypatch.setattr("vmmblk.server.Server", Server)
    return Server


def status_of_main(*arguments: object) -> int:
    """Run the command line in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start commands of vmmblk that are gone at the end of the test."""
    started = []

    def start_one(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*VMMBLK, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


# -- what is added to QEMU's command line


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        ("", backend(128 << 20)),
        ("-m 1G", backend(1 << 30)),
        ("-m 1024", backend(1 << 30)),
        ("--m 512M", backend(512 << 20)),
        ("-m size=2G", backend(2 << 30)),
        ("-m size=2G,slots=2,maxmem=4G", backend(2 << 30)),
        ("-m 2G,slots=2,maxmem=4G", backend(2 << 30)),
        ("-m 1.5G", backend(3 << 29)),
        ("-m 1G -m 2G", backend(2 << 30)),
        ("-m 1G -m slots=2,maxmem=4G", backend(1 << 30)),
        ("-machine q35 -m 1G", backend(1 << 30)),
        ("-append '-m 3G' -m 1G", backend(1 << 30)),
        ("-object iothread,id=t -m 1G", backend(1 << 30)),
        (f"-m 1G -object {SHARED} -machine q35,memory-backend=m", []),
        (f"-m 1G --object {SHARED} -M memory-backend=m", []),
        (f"-m 1G -object {SHARED.replace('on', 'yes')} -M memory-backend=m", []),
        ("-object memory-backend-memfd,id=m,size=1G -machine memory-backend=m", []),
        ("-object qom-type=memory-backend-memfd,id=m,size=1G -machine memory-backend=m", []),
        (
            (
                """-object '{"qom-type":"memory-backend-file","id":"m","size":1073741824,"share":true}' """
                "-machine memory-backend=m"
            ),
            [],
        ),
        (f"-object {SHARED} -numa node,memdev=m", []),
        ("-object memory-backend-ram,id=unused,size=1G -m 1G", backend(1 << 30)),
    ],
)
def test_run_adds_the_memory_that_is_missing_and_the_device(arguments: str, added: list[str]) -> None:
    """The backend is as big as -m says; one that the user brings is left alone if it is shared."""
    assert added_arguments(["qemu", *shlex.split(arguments)], SOCKET) == [*added, *DEVICE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m lots", "-m lots: cannot tell the size"),
        ("-mem-path /dev/hugepages", "-mem-path /dev/hugepages: this memory is not shared; use -object"),
        ("-machine memory-backend=m", "no -object with id=m"),
        (
            "-object memory-backend-ram,id=m,size=1G,share=on -M memory-backend=m",
            "cannot be shared; use memory-backend-memfd",
        ),
        ("-object memory-backend-file,id=m,size=1G -M memory-backend=m", "is not shared; add share=on"),
        ("-object memory-backend-memfd,id=m,size=1G,share=off -M memory-backend=m", "is not shared; add share=on"),
        ("-object memory-backend-file,id=m,size=1G -numa node,memdev=m", "is not shared; add share=on"),
        (
            """-object '{"qom-type":"memory-backend-file","id":"m"}' -M memory-backend=m""",
            "is not shared; add share=on",
        ),
        ("-object '{nonsense'", "this is not JSON"),
    ],
)
def test_run_refuses_memory_that_the_server_could_not_reach(arguments: str, message: str) -> None:
    """The line names the argument at fault and what to write instead."""
    with pytest.raises(ConfigError) as caught:
        added_arguments(["qemu", *shlex.split(arguments)], SOCKET)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bootindex_is_a_property_of_the_device() -> None:
    """As a number, in JSON."""
    device = json.loads(added_arguments(["qemu"], SOCKET, bootindex=0)[-1])
    assert device["bootindex"] == 0


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command; see vmmblk --help"),
        (["dance"], "No such command 'dance'"),
        (["serve", "null:1M"], "Missing option '--socket'; see vmmblk serve --help"),
        (["serve", "--socket", "s"], "Missing argument 'DISK'"),
        (["serve", "--socket", "s", "null:1M", "--sparkle"], "No such option"),
        (["serve", "--socket", "s", "--block-size", "1024", "null:1M"], "'1024' is not one of"),
        (["serve", "--socket", "s", "--queue-size", "100", "null:1M"], "use a power of two"),
        (["serve", "--socket", "s", "--serial", "x" * 21, "null:1M"], "at most 20"),
        (["serve", "--socket", "s", "--serial", "\u00e9", "null:1M"], "ASCII"),
        (["serve", "--socket", "s", "--queues", "65", "null:1M"], "1<=x<=64"),
        (["serve", "--socket", "s", "--features", "mq", "null:1M"], "'mq' is not a switch; write it as NAME=on"),
        (["serve", "--socket", "s", "--features", "mq=on,mq=off", "null:1M"], "mq is given twice"),
        (["serve", "--socket", "s", "--features", "warp=on", "null:1M"], "there is no feature warp"),
        (["serve", "--socket", "s", "--queues=2", "--features", "mq=off", "null:1M"], "(BLK-003)"),
        (["serve", "--socket", "s", "/nowhere/disk.img"], "does not exist"),
        (["run", "null:1M"], "put the QEMU command after --"),
        (["run", "null:1M", "--"], "put the QEMU command after --"),
        (["run", "null:1M", "qemu"], "put the QEMU command after --"),
        (["run", "null:1M", "qemu", "--", "qemu"], "'qemu' is not a parameter"),
        (["run", "null:1M", "--", "/nowhere/qemu"], "cannot start /nowhere/qemu: No such file or directory"),
        (["run", "null:1M", "--", "qemu", "-m", "x"], "-m x: cannot tell"),
    ],
)
def test_mistakes_of_the_user_are_one_line_and_status_2(
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No traceback, no usage text: one line that says what to do."""
    monkeypatch.chdir(tmp_path)
    assert status_of_main(*arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "added to QEMU" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("vmmblk: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(("socket", "message"), [("/nowhere/s", "/nowhere"), ("s" * 200, "too long")])
def test_a_socket_that_cannot_be_made_is_one_line_and_status_2(socket: str, message: str) -> None:
    """The server's own refusal reaches the user in the same way."""
    command = [*VMMBLK, "serve", "--socket", socket, "null:1M"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert message in ended.stderr


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Both are printed on standard output."""
    assert status_of_main("--help") == 0
    assert "serve" in capsys.readouterr().out
    assert status_of_main("run", "--help") == 0
    assert "qemu-system-x86_64" in capsys.readouterr().out


def test_the_command_line_imports_nothing_heavy() -> None:
    """Help and mistakes are answered before the server, cffi or rich are loaded."""
    script = "import sys, vmmblk.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert not {"asyncio", "cffi", "rich", "vmmblk.server", "vmmblk._core", "vmmblk._vfu"} & set(loaded)


# -- serve


def test_serve_hands_the_options_to_disk_and_server(server: type[FakeServer], tmp_path: Path) -> None:
    """Every option arrives where it belongs; the server is stopped with the time it has."""
    server.failure = RuntimeError("over")
    cpu = min(os.sched_getaffinity(0))
    options = (
        "--read-only --block-size 4096 --serial s1 --queue-size 64 --cache writethrough --stop-timeout 3"
        " --queues 7 --features suspend=on,discard=off --features in_order=on"
        f" --engine python --poll-us 7 --io-threads 3 --cpus {cpu} --irq-coalesce 8,50"
    )
    assert status_of_main("serve", "--socket", tmp_path / "s", *options.split(), "memory:1M", "max=2M") == 1
    [made] = server.made
    assert made.socket == tmp_path / "s"
    assert (made.block.info.read_write, made.block.info.sector_size) == (False, 4096)
    assert (made.options.serial, made.options.queue_size, made.options.cache) == ("s1", 64, "writethrough")
    assert made.options.queues == 7
    assert made.options.features == {"suspend": True, "discard": False, "in_order": True}
    assert made.options.engine == "python"
    assert made.options.io == EngineOptions(poll_us=7, adaptive=False, threads=3, cpus=(cpu,))
    assert made.options.coalesce == (8, 50)
    assert made.calls == ["start", ("stop", 3.0)]


@pytest.mark.parametrize(
    ("text", "microseconds", "adaptive"),
    [("auto", EngineOptions().poll_us, True), ("busy", None, False), ("0", 0, False)],
)
def test_how_to_poll(server: type[FakeServer], text: str, microseconds: int | None, adaptive: bool) -> None:
    """For a while that adapts, for ever, or never."""
    server.failure = RuntimeError("over")
    assert status_of_main("serve", "--socket", "s", "--poll-us", text, "null:1M") == 1
    io = server.made[0].options.io
    assert (io.poll_us, io.adaptive) == (microseconds, adaptive)


@pytest.mark.parametrize(
    "option",
    [
        *("--poll-us=-1", "--poll-us=soon", "--poll-us=1000001", "--cpus=x", "--cpus=1-0", "--cpus=1023", "--cpus=,"),
        *("--irq-coalesce=8", "--irq-coalesce=8,", "--irq-coalesce=0,50", "--irq-coalesce=8,100001"),
        *("--irq-coalesce=8,50us", "--irq-coalesce=32769,1", "--irq-coalesce=on", "--irq-coalesce=8,5,0"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    """With one line that names the option, and exit status 2."""
    assert status_of_main("serve", "--socket", "s", option, "null:1M") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert option.partition("=")[0] in line


def test_serve_tells_its_engine(server: type[FakeServer], capsys: pytest.CaptureFixture[str]) -> None:
    """After QEMU's arguments."""
    server.failure = RuntimeError("over")
    status_of_main("serve", "--socket", "s", "null:1M")
    assert capsys.readouterr().out.splitlines()[-1] == "engine: a fake one"


@pytest.mark.parametrize(("cpus", "features", "queues"), [(1, "", 1), (3, "", 3), (16, "", 4), (16, "mq=off", 1)])
def test_there_is_a_queue_for_each_cpu(
    server: type[FakeServer], monkeypatch: pytest.MonkeyPatch, cpus: int, features: str, queues: int
) -> None:
    """Without --queues: as many as CPUs, at most 4; one without mq."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    server.failure = RuntimeError("over")
    arguments = ["--features", features] if features else []
    assert status_of_main("serve", "--socket", "s", *arguments, "null:1M") == 1
    assert server.made[0].options.queues == queues


def test_help_names_every_feature(capsys: pytest.CaptureFixture[str]) -> None:
    """``serve --help`` tells which features are on by default and which are not."""
    assert status_of_main("serve", "--help") == 0
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert set(SWITCHES) <= set(words)


def test_serve_says_why_the_server_failed(
    server: type[FakeServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit status 1."""
    server.failure = RuntimeError("the wheels came off")
    assert status_of_main("serve", "--socket", tmp_path / "s", "null:1M") == 1
    assert "vmmblk: error: the server failed: the wheels came off" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_cleanly_on_signals(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals
) -> None:
    """Listening is told with QEMU's arguments; then exit status 0, nothing said, no socket left."""
    socket = tmp_path / "disk.sock"
    process = start("serve", "--socket", socket, "memory:1M")
    assert process.stdout is not None
    process.stdout.readline()
    printed = shlex.split(process.stdout.readline())
    assert socket.is_socket()
    assert printed[:2] == ["-m", "1G"]
    assert printed[2:6] == backend(1 << 30)
    assert json.loads(printed[7])["socket"]["path"] == str(socket)
    assert process.stdout.readline() == "engine: native\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0
    assert not socket.exists()


def test_serve_prints_a_path_that_works_from_anywhere(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative socket is printed as an absolute one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    process = start("serve", "--socket", "s", "null:1M")
    assert process.stdout is not None
    process.stdout.readline()
    assert str(tmp_path / "s") in process.stdout.readline()


HUNG = """
import threading
from vmmblk import Block, BlockInfo

class Disk(Block):
    info = BlockInfo(read_write=True, sector_size=512, size_sectors=8)

    def read(self, sector_start, buffers):
        pass

    def disconnect(self):
        threading.Event().wait()
"""


@pytest.mark.parametrize("command", ["serve", "run"])
def test_a_disk_that_hangs_at_the_end_is_left_after_the_stop_timeout(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, command: str
) -> None:
    """With exit status 1 and a word about it."""
    disk = tmp_path / "hung.py"
    disk.write_text(HUNG)
    if command == "serve":
        process = start("serve", "--stop-timeout", "0.2", "--socket", tmp_path / "s", disk)
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
    else:
        process = start("run", "--stop-timeout", "0.2", disk, "--", "true")
    error = process.communicate(timeout=30)[1]
    assert "vmmblk: error: the disk did not finish within 0.2 s" in error
    assert process.returncode == 1


# -- run


def script(tmp_path: Path, text: str) -> Path:
    """A program that stands for QEMU."""
    path = tmp_path / "qemu"
    path.write_text(f"#!{sys.executable}\nimport json, os, signal, sys\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("ending", "status"), [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 137)]
)
def test_run_ends_with_the_status_of_qemu(tmp_path: Path, ending: str, status: int) -> None:
    """As a shell tells it, 128 and the signal when QEMU was killed."""
    ended = subprocess.run([*VMMBLK, "run", "null:1M", "--", script(tmp_path, ending)], check=False, timeout=60)
    assert ended.returncode == status


def test_run_starts_qemu_with_a_live_socket_in_a_private_folder(tmp_path: Path) -> None:
    """The user is told what was added, and nothing is left behind."""
    qemu = script(
        tmp_path,
        "device = json.loads(sys.argv[-1]); path = device['socket']['path']\n"
        "mode = os.stat(os.path.dirname(path)).st_mode & 0o777\n"
        "blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "print(json.dumps([sys.argv[1:], path, mode, os.path.exists(path), len(blocked)]))",
    )
    command = [*VMMBLK, "run", "--bootindex", "1", "null:1M", "--", qemu, "-m", "1G"]
    ended = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    arguments, path, mode, live, blocked = json.loads(ended.stdout)
    assert arguments[:6] == ["-m", "1G", *backend(1 << 30)]
    assert (mode, live, blocked) == (0o700, True, 0)
    assert shlex.join(arguments[2:]) in ended.stderr
    assert not Path(path).parent.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_passes_signals_on_to_qemu(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals
) -> None:
    """QEMU decides what they mean; vmmblk ends when QEMU does."""
    waiting = (
        "def got(number, frame):\n    print(number, flush=True)\n    os._exit(3)\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n    signal.signal(number, got)\n"
        "print('ready', flush=True)\nwhile True:\n    signal.pause()"
    )
    process = start("run", "null:1M", "--", script(tmp_path, waiting))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"{number.value}\n"
    assert process.returncode == 3


def test_run_takes_options_after_the_disk_too(tmp_path: Path) -> None:
    """Everything before -- is for vmmblk."""
    command = [
        *VMMBLK,
        "run",
        "memory:1M",
        "--read-only",
        "max=2M",
        "--",
        script(tmp_path, "sys.exit(0)"),
        "--read-only",
    ]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


def test_run_says_that_the_server_failed_and_waits_for_qemu(
    server: type[FakeServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guest may go on without the disk; the status is QEMU's."""
    server.failure = RuntimeError("the wheels came off")
    ending = f"os.kill({os.getpid()}, signal.SIGTERM); signal.sigwait([signal.SIGTERM]); sys.exit(4)"
    qemu = script(tmp_path, f"signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); {ending}")
    assert status_of_main("run", "null:1M", "--", qemu) == 4
    assert capsys.readouterr().err.count("the server failed, the guest's disk is gone: the wheels came off") == 1
    assert server.made[0].calls == ["start", ("stop", 10.0)]
