"""What ``serve`` and ``run`` share: their options, signals, and bringing a server up and down."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from vmmblk.device import OFF_BY_DEFAULT, QUEUES_MAX, SWITCHES
from vmmblk.spec import QUEUE_SIZE_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Literal, TypeVar

    from vmmblk.server import Server

    Command = TypeVar("Command", bound=Callable[..., object])

__all__ = ["DiskOptions", "Signals", "disk_options", "leave", "say", "stop"]

POLL_SECONDS = 0.5
"""How soon a server that failed is noticed."""

_DEFAULT_QUEUES_MAX = 4
_POLL_MAX_US = 1_000_000
_CPUS_MAX = 1024
_COALESCE_MAX_US = 100_000


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """The options that tell what is served and how."""

    read_only: bool
    block_size: str | None
    serial: str
    queues: int | None
    queue_size: int
    features: dict[str, bool]
    engine: Literal["auto", "native", "python"]
    poll_us: int | Literal["auto", "busy"] | None
    doorbell: Literal["message", "mmap"]
    io_threads: int
    cpus: tuple[int, ...]
    irq_coalesce: tuple[int, int] | None
    cache: Literal["writeback", "writethrough"]
    no_lock: bool
    filters: tuple[str, ...]
    stop_timeout: float
    bootindex: int | None
    log_level: str

    def server(self, socket_path: Path, disk: str, parameters: tuple[str, ...]) -> Server:
        """Open the disk and make a server for it, not started yet.  Raises: ConfigError."""
        logging.basicConfig(format="vmmblk: %(levelname)s: %(message)s", level=self.log_level.upper())
        from vmmblk.config import open_disk
        from vmmblk.engine import EngineOptions
        from vmmblk.server import Server, ServerOptions

        block = open_disk(
            disk,
            parameters,
            read_only=self.read_only,
            block_size=None if self.block_size is None else int(self.block_size),
            lock=not self.no_lock,
            filters=self.filters,
        )
        poll_us = self.poll_us
        if poll_us is None:
            poll_us = "busy" if self.doorbell == "mmap" else "auto"
        io = EngineOptions(
            poll_us=None if poll_us == "busy" else EngineOptions().poll_us if poll_us == "auto" else poll_us,
            adaptive=poll_us == "auto",
            threads=self.io_threads,
            cpus=self.cpus,
        )
        options = ServerOptions(
            serial=self.serial,
            queues=self.queues or self._default_queues(),
            queue_size=self.queue_size,
            cache=self.cache,
            features=self.features,
            engine=self.engine,
            io=io,
            doorbell=self.doorbell,
            coalesce=self.irq_coalesce,
        )
        return Server(socket_path, block, options)

    def _default_queues(self) -> int:
        return min(len(os.sched_getaffinity(0)), _DEFAULT_QUEUES_MAX) if self.features.get("mq", True) else 1


def disk_options(command: Command) -> Command:
    """Add the options of :class:`DiskOptions` to a command, which receives them as keyword arguments."""
    options = [
        click.option("--read-only", is_flag=True, help="Let the guest read only."),
        click.option("--block-size", type=click.Choice(["512", "4096"]), help="Bytes per sector (512)."),
        click.option("--serial", default="", callback=_serial, help="Serial number: 20 ASCII characters at most."),
        click.option(
            "--queues",
            type=click.IntRange(1, QUEUES_MAX),
            help=f"Request queues (one for each CPU, {_DEFAULT_QUEUES_MAX} at most).",
        ),
        click.option("--queue-size", default=256, callback=_queue_size, help="Requests in the ring; a power of two."),
        click.option(
            "--engine",
            type=click.Choice(["auto", "native", "python"]),
            default="auto",
            help="Serve requests in C (native), if the disk is a file or memory, or call the disk (python).",
        ),
        click.option(
            "--poll-us",
            metavar="auto|busy|N",
            callback=_poll,
            help="Microseconds to look for more before sleeping (auto: while that pays; 0: none; busy: for ever).",
        ),
        click.option(
            "--doorbell",
            type=click.Choice(["message", "mmap"]),
            default="message",
            help="Let VMMs map the doorbells (mmap): no message, but with --poll-us busy only. Not good for QEMU.",
        ),
        click.option(
            "--io-threads",
            type=click.IntRange(1, QUEUES_MAX),
            default=QUEUES_MAX,
            help="Threads of the native engine (one for each queue).",
        ),
        click.option(
            "--cpus", default="", metavar="LIST", callback=_cpus, help="Processors for those threads, as in 0,2-3."
        ),
        click.option(
            "--irq-coalesce",
            default="off",
            metavar="off|N,US",
            callback=_irq_coalesce,
            help="One interrupt for up to N completions, held back for US microseconds at most, as in 8,50 (off).",
        ),
        click.option(
            "--cache",
            type=click.Choice(["writeback", "writethrough"]),
            default="writeback",
            help="Whether writes may wait for the guest's flush (writeback), if the disk can.",
        ),
        click.option(
            "--filter",
            "filters",
            multiple=True,
            metavar="NAME[:K=V,...]",
            help="Put a filter on the disk: readonly, or zoned:zone_size=64M. Repeatable; the first is on top.",
        ),
        click.option(
            "--features",
            metavar="NAME=on|off,...",
            multiple=True,
            callback=_features,
            help=f"Switch features of the device. {_switches()}",
        ),
        click.option("--no-lock", is_flag=True, help="Do not lock the image file."),
        click.option(
            "--stop-timeout",
            type=click.FloatRange(min=0),
            default=10,
            help="Seconds that the disk gets to finish at the end.",
        ),
        click.option("--bootindex", type=click.IntRange(min=0), help="Place in the guest's boot order."),
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="warning",
            help="What to log.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _serial(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not value.isascii() or not (value == "" or value.isprintable()) or len(value) > 20:
        raise click.BadParameter("use at most 20 printable ASCII characters")
    return value


def _queue_size(_context: click.Context, _parameter: click.Parameter, value: int) -> int:
    if not 4 <= value <= QUEUE_SIZE_MAX or value & (value - 1):
        raise click.BadParameter(f"use a power of two from 4 to {QUEUE_SIZE_MAX}")
    return value


def _poll(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | str | None:
    if value in {None, "auto", "busy"}:
        return value
    if not value.isascii() or not value.isdecimal() or int(value) > _POLL_MAX_US:
        raise click.BadParameter(f"use auto, busy, or microseconds up to {_POLL_MAX_US}")
    return int(value)


def _cpus(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    found: list[int] = []
    for each in value.split(",") if value else ():
        first, _, last = each.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) < _CPUS_MAX):
            raise click.BadParameter(f"{each!r} is no processor; write a list as in 0,2-3")
        found.extend(range(int(first), int(last or first) + 1))
    if missing := [cpu for cpu in found if cpu not in os.sched_getaffinity(0)]:
        raise click.BadParameter(f"processor {missing[0]} is not there, or not for this process")
    return tuple(found)


def _irq_coalesce(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, int] | None:
    if value == "off":
        return None
    count, _, microseconds = value.partition(",")
    for text, most in ((count, QUEUE_SIZE_MAX), (microseconds, _COALESCE_MAX_US)):
        if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= most):
            limits = f"up to {QUEUE_SIZE_MAX} completions and {_COALESCE_MAX_US} microseconds"
            raise click.BadParameter(f"use off, or {limits}, as in 8,50")
    return int(count), int(microseconds)


def _features(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, bool]:
    switches: dict[str, bool] = {}
    for each in ",".join(values).split(",") if values else ():
        name, _, value = each.partition("=")
        if value not in ("on", "off"):
            raise click.BadParameter(f"{each!r} is not a switch; write it as NAME=on or NAME=off")
        if name in switches:
            raise click.BadParameter(f"{name} is given twice; leave one out")
        switches[name] = value == "on"
    return switches


def _switches() -> str:
    """The names of all features that can be switched, and where they stand."""
    off = [name for name, feature in SWITCHES.items() if feature in OFF_BY_DEFAULT]
    on = [name for name in SWITCHES if name not in off]
    return f"On, where the disk can: {', '.join(on)}. Off: {', '.join(off)}."


def say(message: str) -> None:
    """One line for the user, on standard error."""
    click.echo(f"vmmblk: {message}", err=True)


class Signals:
    """The signals that arrived, for a main thread that waits for them.

    Handlers and a wake-up descriptor rather than a blocked mask: a child would inherit the mask.
    """

    def __init__(self, waker: socket.socket) -> None:
        self._waker = waker

    @classmethod
    @contextlib.contextmanager
    def caught(cls, *numbers: signal.Signals) -> Iterator[Signals]:
        """Catch ``numbers`` instead of dying of them; afterwards everything is as it was."""
        reader, writer = socket.socketpair()
        with reader, writer:
            reader.settimeout(0)
            writer.settimeout(0)
            handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
            descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            try:
                yield cls(reader)
            finally:
                signal.set_wakeup_fd(descriptor)
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def wait(self, seconds: float) -> list[signal.Signals]:
        """The signals that have arrived, waiting for the first at most ``seconds``."""
        select.select([self._waker], [], [], seconds)
        try:
            return [signal.Signals(number) for number in self._waker.recv(64)]
        except BlockingIOError:
            return []


def stop(server: Server, timeout: float) -> bool:
    """Stop the server; False, and a word to the user, if the disk hung for ``timeout`` seconds."""
    stopped: bool = server.stop(timeout)
    if not stopped:
        say(f"error: the disk did not finish within {timeout:g} s; what was not flushed may be lost")
    return stopped


def leave(status: int, *, stopped: bool) -> int:
    """The exit status to return; if the disk hangs the process ends right here instead, with status 1."""
    if stopped:
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # an ordinary exit would wait for the threads that wait for the disk
