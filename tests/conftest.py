"""What tests of a running server share: the server, and an eye on the log."""

from __future__ import annotations

import contextlib
import logging
import re
import select
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from disks import Disk

from vmmblk.filters import prepare
from vmmblk.server import Server, ServerOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmmblk.block import Block

pytest_plugins = ["conformance.plugin"]

STOP_SECONDS = 30.0
"""For what takes milliseconds, unless the machine is busy; a test that waits so long fails."""

on_both_engines = pytest.mark.parametrize("serve", ["python", "native"], indirect=True)
"""For tests that look at what the driver sees and the disk holds, and not at which calls the disk gets."""


class Logs(logging.Handler):
    """Every record of vmmblk (INFO and up) and of asyncio; what is not announced and is a warning fails the test."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []
        self._allowed: list[str] = []
        self._expected: list[str] = []
        self._arrived = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        with self._arrived:
            self.records.append(record)
            self._arrived.notify_all()

    def allow(self, pattern: str) -> None:
        """Warnings and errors that match ``pattern`` may occur."""
        self._allowed.append(pattern)

    def expect(self, pattern: str) -> None:
        """At least one warning or error that matches ``pattern`` must occur before the test ends."""
        self._expected.append(pattern)

    def matching(self, pattern: str) -> list[logging.LogRecord]:
        """The records so far that match."""
        return [record for record in list(self.records) if re.search(pattern, record.getMessage())]

    def wait(self, pattern: str, timeout: float = STOP_SECONDS) -> logging.LogRecord:
        """Wait for a record that matches, and return it."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self.matching(pattern), timeout), f"no record matches {pattern!r}"
        return self.matching(pattern)[0]

    def verdict(self) -> str:
        """What is wrong with the log, in words, or an empty string."""
        alarms = [record.getMessage() for record in self.records if record.levelno >= logging.WARNING]
        known = self._allowed + self._expected
        wrong = [f"unexpected: {text}" for text in alarms if not any(re.search(each, text) for each in known)]
        wrong += [f"missing: {each}" for each in self._expected if not any(re.search(each, text) for text in alarms)]
        return "\n".join(wrong)


@pytest.fixture(autouse=True)
def logs(request: pytest.FixtureRequest) -> Iterator[Logs]:
    """The log of this test.  It must hold no warning that was not allowed, unless the test looks at ``caplog``."""
    watched = [logging.getLogger(name) for name in ("vmmblk", "asyncio")]
    handler = Logs()
    for logger in watched:
        logger.addHandler(handler)
    level = watched[0].level
    watched[0].setLevel(logging.INFO)
    yield handler
    watched[0].setLevel(level)
    for logger in watched:
        logger.removeHandler(handler)
    if "caplog" not in request.fixturenames:
        assert not (verdict := handler.verdict()), verdict


@dataclass
class Served:
    """A server in this process, the socket it listens on, and the disk it serves as the test made it."""

    server: Server
    path: Path
    disk: Any

    def settle(self) -> None:
        """Return when whoever serves has seen every doorbell that the transport has passed on."""
        engine = self.server._engine
        if engine is not None and engine._options.poll_us is not None:
            until(lambda: not self._doorbells() and engine_sleeps(), "the engine is busy")
        for _ in range(3):
            turn = threading.Event()
            self.server._worker._loop.call_soon_threadsafe(turn.set)
            assert turn.wait(STOP_SECONDS)

    def _doorbells(self) -> bool:
        """Whether there are some that the engine has not taken."""
        bells = select.poll()
        for queue in self.server._queues:
            bells.register(queue.kick_fd, select.POLLIN)
            bells.register(queue.bell.heard_fd, select.POLLIN)
        return bool(bells.poll(0))


def engine_tasks() -> list[Path]:
    """What /proc tells of the threads of the native engine in this process."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (task / "comm").read_text() == "vmmblk-engine\n":
                found.append(task)
    return found


def engine_sleeps() -> bool:
    """Whether each of its threads waits for doorbells, in poll(2)."""
    return all((task / "syscall").read_text().startswith("7 ") for task in engine_tasks())


@pytest.fixture
def serve(request: pytest.FixtureRequest, tmp_path: Path, logs: Logs) -> Iterator[Callable[..., Served]]:
    """Start a server for a disk (default: a :class:`Disk`) with ServerOptions; it must stop cleanly after the test.

    With :data:`on_both_engines` the disk is one of ``disks``, and the engine that is asked for serves it, or it fails.
    """
    running: list[Served] = []
    engine = getattr(request, "param", None)

    def start(disk: Block | None = None, **options: Any) -> Served:
        disk = Disk() if disk is None else disk
        path = tmp_path / f"s{len(running)}"
        if engine is not None:
            assert isinstance(disk, Disk)
            disk.in_c = engine == "native"
            options["engine"] = engine
        server = Server(path, prepare(disk), ServerOptions(**options))
        assert engine is None or server.engine == engine
        server.start()
        running.append(Served(server, path, disk))
        return running[-1]

    yield start
    for served in running:
        assert served.server.stop(STOP_SECONDS)
        assert served.server.failed is None


def until(
    condition: Callable[[], object], complaint: str = "it does not happen", timeout: float = STOP_SECONDS
) -> None:
    """Look at ``condition`` until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.001)
