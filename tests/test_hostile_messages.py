"""A VMM that says almost the right thing: whole sessions of a legal client, with a few of their messages changed.

The session is recorded from a real driver: the handshake, questions, memory, interrupts, the registers up to a live
device, requests, memory that goes and comes back, resets.  Played back, with the memory that the driver left, it makes
the device serve the same requests again.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import on_both_engines, until
from fuzzing import effort
from hypothesis import given
from hypothesis import strategies as st

from vmmblk.client import wire
from vmmblk.client.connection import Connection
from vmmblk.client.driver import SUPPORTED, VirtioBlk, attach
from vmmblk.client.memory import GuestMemory
from vmmblk.client.wire import Command, IrqIndex
from vmmblk.spec import Feature, RequestType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from conftest import Logs, Served

    Serve = Callable[..., Served]

LIVE = 15
MEMORY = 1 << 20
RECORDS_MAX = 40
"""Lines that one session may leave in the log."""

ANSWER = 0.05
"""Seconds that a VMM waits for an answer that does not come."""

KINDS = ("memory", "event", "file", "pipe", "socket", "folder")
INTERESTING = (0, 1, 2, 3, 7, 8, 15, 16, 17, 20, 32, 64, 0xFF, 0x100, 4095, 4096, 0xFFFF, 1 << 20, 0x7FFFFFFF, 1 << 31)
values = (
    st.sampled_from(INTERESTING)
    | st.sampled_from([(1 << 32) - 1, 1 << 32, 1 << 52, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1])
    | st.integers(0, (1 << 64) - 1)
)


@dataclass(frozen=True)
class Sent:
    """A message as it was sent, and the kinds of descriptors that went with it."""

    data: bytes
    fds: tuple[str, ...] = ()


@dataclass
class Session:
    """All that a client sent, and the memory that its driver left."""

    messages: list[Sent] = field(default_factory=list)
    image: bytes = b""


class Recorder(socket.socket):
    """A socket that keeps what is sent."""

    def __init__(self, path: Path, session: Session) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connect(os.fspath(path))
        self._session = session

    def sendmsg(self, buffers: Any, ancdata: Any = (), *rest: Any) -> int:
        """Keep a message."""
        data = b"".join(buffers)
        kind = "memory" if wire.decode_header(data).command == Command.DMA_MAP else "event"
        self._session.messages.append(Sent(data, (kind,) * sum(len(fds) for _, _, fds in ancdata)))
        return super().sendmsg(buffers, ancdata, *rest)


def record(path: Path, features: int) -> Session:
    """What a driver does in its life."""
    session = Session()
    with GuestMemory(MEMORY) as memory, Connection(Recorder(path, session)) as connection:
        connection.get_info()
        for region in range(9):
            connection.region_info(region)
        for fd in connection.region_io_fds(4, argsz=4096).fds:
            os.close(fd)
        memory.map_all(connection)
        v = VirtioBlk(connection, memory, features=features, queues=2, queue_size=16)
        requests = [v.submit(RequestType.OUT, 1, b"r" * 1024), v.submit(RequestType.IN, 0, data_in=2048)]
        requests += [v.submit(RequestType.OUT, 4, bytes(512), queue=1), v.submit(RequestType.FLUSH, queue=1)]
        for queue in v.queues:
            queue.publish()
        session.image = memory.read(0, MEMORY)  # before the device has looked
        v.ring_doorbell(0)
        v.ring_doorbell(1)
        assert v.status == LIVE  # an answer, after which the doorbells have been passed on
        v.wait_all(requests)
        memory.unmap_all(connection)
        memory.map_all(connection)
        v.flush()
        connection.unmask_irqs(IrqIndex.INTX)
        connection.disable_irqs(IrqIndex.MSIX)
        v.reset_queue(1)
        connection.device_reset()
        v.close()
    return session


# What is done to it.  Each edit makes a list of messages from a list, at a place that it has chosen.


@dataclass(frozen=True)
class Edit:
    """Change the message at ``place`` (of as many as there are)."""

    place: int

    def __call__(self, messages: list[Sent]) -> list[Sent]:
        """The session, changed."""
        if not messages:
            return messages
        at = self.place % len(messages)
        return messages[:at] + self.change(messages[at]) + messages[at + 1 :]

    def change(self, message: Sent) -> list[Sent]:
        """What is sent instead."""
        raise NotImplementedError


@dataclass(frozen=True)
class Repeat(Edit):
    """Leave it out, or send it several times."""

    times: int

    def change(self, message: Sent) -> list[Sent]:
        """As often as chosen."""
        return [message] * self.times


@dataclass(frozen=True)
class Field(Edit):
    """Store a number anywhere, the header included."""

    offset: int
    width: int
    value: int

    def change(self, message: Sent) -> list[Sent]:
        """With the number in it."""
        at = self.offset % len(message.data)
        stored = self.value.to_bytes(8, "little")[: self.width]
        return [replace(message, data=(message.data[:at] + stored + message.data[at + self.width :]))]


@dataclass(frozen=True)
class Length(Edit):
    """Make it longer or shorter, and maybe say so in its header."""

    length: int
    honest: bool

    def change(self, message: Sent) -> list[Sent]:
        """Cut or filled up."""
        data = message.data[: self.length].ljust(self.length, b"\x5a")
        if self.honest and self.length >= wire.HEADER.size:
            data = data[:4] + struct.pack("<I", self.length) + data[8:]
        return [replace(message, data=data)]


@dataclass(frozen=True)
class Descriptors(Edit):
    """Other descriptors."""

    kinds: tuple[str, ...]

    def change(self, message: Sent) -> list[Sent]:
        """With these."""
        return [replace(message, fds=self.kinds)]


@dataclass(frozen=True)
class Before(Edit):
    """Something else first."""

    command: int
    flags: int
    body: bytes

    def change(self, message: Sent) -> list[Sent]:
        """Both."""
        return [Sent(wire.encode(0x7777, self.command, self.body, self.flags)), message]


@dataclass(frozen=True)
class Move(Edit):
    """At another time."""

    to: int

    def __call__(self, messages: list[Sent]) -> list[Sent]:
        """The session, in another order."""
        rest = list(messages)
        if rest:
            rest.insert(self.to % len(rest), rest.pop(self.place % len(rest)))
        return rest


places = st.integers(0, 400)
edits = st.one_of(
    st.builds(Repeat, places, st.sampled_from([0, 0, 2, 3, 40])),
    st.builds(Field, places, st.integers(0, 60), st.sampled_from([1, 2, 4, 8]), values),
    st.builds(Field, places, st.sampled_from([16, 20, 24, 32, 40]), st.sampled_from([4, 8]), values),
    st.builds(Length, places, st.integers(0, 80) | st.just(9000), st.booleans()),
    st.builds(Descriptors, places, st.lists(st.sampled_from(KINDS), max_size=20).map(tuple)),
    st.builds(
        Before, places, st.integers(0, 16) | st.just(0xFFFF), st.sampled_from([0, 1, 16, 32]), st.binary(max_size=60)
    ),
    st.builds(Move, places, places),
)


def expects_answer(message: Sent) -> bool:
    """Whether a VMM waits after such a message."""
    if len(message.data) < wire.HEADER.size:
        return False
    header = wire.decode_header(message.data)
    return header.size == len(message.data) and not header.flags & wire.HeaderFlag.NO_REPLY


def _nothing() -> None:
    pass


class Vmm:
    """Plays sessions back; a context manager that owns the descriptors it sends."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._memory = os.memfd_create("played back")
        read_end, write_end = os.pipe()
        file = folder / "file"
        file.write_bytes(bytes(5000))
        ours, theirs = socket.socketpair()
        self._fds = {
            "memory": self._memory,
            "event": os.eventfd(0, os.EFD_NONBLOCK),
            "file": os.open(file, os.O_RDONLY),
            "pipe": write_end,
            "socket": theirs.detach(),
            "folder": os.open(folder, os.O_RDONLY),
        }
        self._others = [read_end, ours.detach()]

    def close(self) -> None:
        """Close them."""
        for fd in [*self._fds.values(), *self._others]:
            os.close(fd)

    def play(
        self, messages: Sequence[Sent], image: bytes, *, linger: bool, after_answers: Callable[[], None] = _nothing
    ) -> None:
        """Send everything, as far as the server listens; then vanish, or wait for it to hang up first."""
        os.ftruncate(self._memory, len(image))
        os.pwrite(self._memory, image, 0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as vmm:
            vmm.connect(os.fspath(self._path))
            vmm.settimeout(10)
            with contextlib.suppress(ConnectionError):
                for message in messages:
                    self._send(vmm, message)
                    patience = ANSWER if expects_answer(message) else 0
                    while select.select([vmm], [], [], patience)[0] and self._drain(vmm):
                        patience = 0
                    if expects_answer(message):
                        after_answers()
                if linger:
                    vmm.shutdown(socket.SHUT_WR)
                    while self._drain(vmm):
                        pass

    def _send(self, vmm: socket.socket, message: Sent) -> None:
        if message.data:
            fds = array.array("i", [self._fds[kind] for kind in message.fds])
            sent = vmm.sendmsg([message.data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
            vmm.sendall(message.data[sent:])

    @staticmethod
    def _drain(vmm: socket.socket) -> int:
        data, fds, *_ = socket.recv_fds(vmm, 1 << 16, 32)
        for fd in fds:
            os.close(fd)
        return len(data)


def open_files() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def serves(served: Served, tag: int) -> None:
    """A client that keeps to the rules gets everything."""
    with attach(served.path) as v:
        v.write(9, bytes([tag]) * 512)
        assert v.read(9, 512) == bytes([tag]) * 512
    until(lambda: not served.server._transport._connected)  # type: ignore[union-attr]


@contextlib.contextmanager
def playing(served: Served, folder: Path) -> Iterator[Vmm]:
    """Somebody who plays sessions back, and leaves nothing behind."""
    serves(served, 1)
    before = open_files()
    vmm = Vmm(served.path, folder)
    try:
        yield vmm
    finally:
        vmm.close()
    until(lambda: open_files() == before, "descriptors or threads have leaked")
    assert served.server.failed is None


@on_both_engines
def test_sessions_with_mistakes(serve: Serve, logs: Logs, tmp_path: Path) -> None:
    """Messages that are lost, doubled, moved, cut, filled up, or wrong in any field, and descriptors of other things.

    However it ends the server lives, says little, keeps nothing, and serves the next client.
    """
    logs.allow(".")
    served = serve(queues=2)
    sessions = [record(served.path, SUPPORTED), record(served.path, SUPPORTED | Feature.RING_PACKED.mask)]
    turns = count()

    @effort(120)
    @given(
        which=st.sampled_from([0, 1]),
        changes=st.lists(edits, min_size=1, max_size=6),
        end=st.none() | st.integers(1, 400),
        linger=st.booleans(),
        patient=st.booleans(),
    )
    def play(which: int, changes: list[Edit], end: int | None, linger: bool, patient: bool) -> None:
        records = len(logs.records)
        messages = sessions[which].messages
        messages = messages if end is None else messages[: 1 + end % len(messages)]
        for change in changes:
            messages = change(messages)
        after_answers = served.settle if patient else _nothing
        vmm.play(messages, sessions[which].image, linger=linger, after_answers=after_answers)
        serves(served, next(turns) % 256)
        assert len(logs.records) - records < RECORDS_MAX

    with playing(served, tmp_path) as vmm:
        play()


@on_both_engines
def test_a_session_that_ends_anywhere(serve: Serve, logs: Logs, tmp_path: Path) -> None:
    """A client that is gone after any of its messages, or in the middle of it: the next one is served."""
    logs.allow("libvfio-user: |a client was refused: ")
    served = serve(queues=2)
    session = record(served.path, SUPPORTED)
    with playing(served, tmp_path) as vmm:
        for end in range(len(session.messages)):
            *whole, last = session.messages[: end + 1]
            cut = replace(last, data=last.data[: 1 + end * 7 % len(last.data)])
            vmm.play([*whole, last if end % 2 else cut], session.image, linger=bool(end % 3))
        serves(served, 2)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_recorded_is_served_again(serve: Serve, packed: bool, tmp_path: Path) -> None:
    """A session that is not changed at all makes the device do the same requests again, so the others reach deep."""
    served = serve(queues=2)
    session = record(served.path, SUPPORTED | (Feature.RING_PACKED.mask if packed else 0))
    calls = set(served.disk.calls)
    with playing(served, tmp_path) as vmm:
        served.disk.calls.clear()
        vmm.play(session.messages, session.image, linger=True, after_answers=served.settle)
        assert set(served.disk.calls) == calls
