"""What tests of a running server share: the server, and an eye on the log."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from disks import Disk

from vmmblk.filters import prepare
from vmmblk.server import Server, ServerOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vmmblk.block import Block

pytest_plugins = ["conformance.plugin"]

STOP_SECONDS = 5.0


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

    def wait(self, pattern: str, timeout: float = 5.0) -> logging.LogRecord:
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
        """Return when the worker has seen every doorbell that the transport has passed on."""
        for _ in range(3):
            turn = threading.Event()
            self.server._worker._loop.call_soon_threadsafe(turn.set)
            assert turn.wait(STOP_SECONDS)


@pytest.fixture
def serve(tmp_path: Path, logs: Logs) -> Iterator[Callable[..., Served]]:
    """Start a server for a disk (default: a :class:`Disk`) with ServerOptions; it must stop cleanly after the test."""
    running: list[Served] = []

    def start(disk: Block | None = None, **options: Any) -> Served:
        disk = Disk() if disk is None else disk
        path = tmp_path / f"s{len(running)}"
        server = Server(path, prepare(disk), ServerOptions(**options))
        server.start()
        running.append(Served(server, path, disk))
        return running[-1]

    yield start
    for served in running:
        assert served.server.stop(STOP_SECONDS)
        assert served.server.failed is None


def until(condition: Callable[[], object], complaint: str = "it does not happen", timeout: float = 5.0) -> None:
    """Look at ``condition`` until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.001)
