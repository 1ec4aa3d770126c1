"""The command: measure in rounds, keep what was measured, write the page."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.cells import COSTED, GUEST_DISKS, PARTS, Plan, Settings, planned_seconds, quick_plan, subjects
from benchmarks.guest import accelerator, fetch, in_guest
from benchmarks.measure import conditions, cost, guestless, image, machine
from benchmarks.page import Run, page
from benchmarks.plots import draw
from vmmblk.config import parse_size
from vmmblk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from benchmarks.cells import Subject

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "performance"
NOTES = ROOT / "benchmarks" / "notes.md"
TMPFS = Path("/dev/shm")  # noqa: S108 - it is measured as what it is


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=1.0)
@click.option("--size", default="1G")
@click.option("--only", type=click.Choice(PARTS), multiple=True)
@click.option("--raw", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path, file_okay=False))
def main(
    *, quick: bool, rounds: int, seconds: float, size: str, only: tuple[str, ...], raw: Path | None, output: Path | None
) -> None:
    """See benchmarks/run --help."""
    try:
        settings = Settings(rounds, seconds, parse_size(size))
    except ConfigError as exc:
        raise click.BadParameter(str(exc), param_hint="--size") from None
    run, kept = _earlier(raw), raw
    parts = only or (() if raw else PARTS)
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="file-", dir=KEPT) as folder:
        everything = subjects(Path(folder), TMPFS, ROOT / "benchmarks" / "disks")
        failures: dict[str, str] = {}
        if parts:
            kept = KEPT / time.strftime("%Y-%m-%d-%H%M%S.json")
            plan = quick_plan(everything) if quick else Plan(settings, everything)
            failures = Session(run, plan, Path(folder), kept).measure(parts)
    written = _write(run, everything, output or (KEPT if quick else ROOT / "docs"))
    click.echo(f"{written}, from {kept}")
    for what, why in failures.items():
        click.echo(f"Error: {what}: {why}", err=True)
    raise click.exceptions.Exit(1 if failures else 0)


def _earlier(raw: Path | None) -> Run:
    """What an earlier run has measured."""
    if raw is None:
        return Run({}, {}, [], [], [])
    try:
        return Run(**json.loads(raw.read_text()))
    except (ValueError, TypeError):
        raise click.BadParameter(f"{raw} is no file of an earlier run", param_hint="--raw") from None


class Session:
    """Measures parts of a run anew, and keeps in a file what there is by the end of each round."""

    def __init__(self, run: Run, plan: Plan, folder: Path, kept: Path) -> None:
        self._run = run
        self._plan = plan
        self._settings = plan.settings
        self._folder = folder
        self._kept = kept
        self._progress = Progress(console=Console(stderr=True))
        self._task = TaskID(0)
        self._failures: dict[str, str] = {}

    def measure(self, parts: Collection[str]) -> dict[str, str]:
        """Returns why, for the parts that could not be measured, or not whole; the others are measured all the same."""
        minutes = planned_seconds(self._plan, parts) / 60
        click.echo(f"this takes about {minutes:.0f} minutes", err=True)
        direct = [part for part in parts if part != "guest"]
        daemon: Path | None = None
        if "guest" in parts:
            with self._failing("guest"):
                daemon = fetch()  # what cannot be had is told at once, not after all the rest
        self._run.machine.update(machine((self._folder, TMPFS)))
        self._keep((), 0)
        with self._progress:
            if direct:
                with self._failing(" and ".join(direct)):
                    self._without_guest(direct)
            if daemon is not None:
                with self._failing("guest"):
                    self._in_guest(daemon)
        return self._failures

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as exc:
            # A server that ended may have said more; its last line tells what happened.
            self._failures[what] = (str(exc).splitlines() or [type(exc).__name__])[-1]

    def _without_guest(self, parts: Collection[str]) -> None:
        """All rounds, each with every cell and every cost once."""
        run, chosen = self._run, self._plan.subjects
        rounds, size = self._settings.rounds, self._settings.size
        steps = sum(len(each.cells) * ("guestless" in parts) + self._costed(each, parts) for each in chosen)
        self._begin(parts, steps * rounds)
        with contextlib.ExitStack() as stack:
            files = {
                each.name: stack.enter_context(image(each.folder, size, cached=not each.direct))
                for each in chosen
                if each.folder is not None
            }
            for number in range(rounds):
                for subject in chosen:
                    what = (subject, files.get(subject.name), size, self._settings.seconds)
                    for sample in guestless(*what) if "guestless" in parts else ():
                        run.samples.append({"round": number, **sample})
                        self._advance(f"round {number + 1}: {subject.title}")
                    if self._costed(subject, parts):
                        run.costs.append({"round": number, **cost(*what)})
                        self._advance(f"round {number + 1}: cost of {subject.title}")
                self._keep(parts, number + 1)

    def _in_guest(self, daemon: Path) -> None:
        """All rounds, in one guest."""
        cells, settings = self._plan.guest, self._settings
        self._run.machine.update(accelerator())
        self._begin(["guest"], settings.rounds * len(cells) * len(GUEST_DISKS))
        rounds = 0
        try:
            for sample in in_guest(cells, settings, daemon, self._folder):
                rounds = sample["round"] + 1
                self._run.guest.append(sample)
                self._advance(f"round {rounds}: in a guest")
        finally:  # not sooner: it would take processor time from the guest
            self._keep(["guest"], rounds)

    @staticmethod
    def _costed(subject: Subject, parts: Collection[str]) -> bool:
        return "cost" in parts and subject.name in COSTED

    def _begin(self, parts: Collection[str], steps: int) -> None:
        """Forget what these parts had of an earlier run."""
        for part in parts:
            {"guestless": self._run.samples, "cost": self._run.costs, "guest": self._run.guest}[part].clear()
            self._run.parts[part] = {**asdict(self._settings), **conditions()}
        self._task = self._progress.add_task("", total=steps)

    def _advance(self, what: str) -> None:
        self._progress.update(self._task, advance=1, description=what)

    def _keep(self, parts: Collection[str], rounds: int) -> None:
        for part in parts:
            self._run.parts[part]["rounds"] = rounds
        self._kept.write_text(json.dumps(asdict(self._run), indent=1) + "\n")


def _write(run: Run, everything: list[Subject], output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    try:
        plots = draw(run, everything, output / "performance")
    except ImportError:
        click.echo("no plots: matplotlib is missing (pip install 'vmmblk[plot]')", err=True)
        plots = []
    notes = NOTES.read_text() if NOTES.exists() else ""
    path = output / "performance.md"
    path.write_text(page(run, everything, [(title, f"performance/{name}") for title, name in plots], notes))
    return path


if __name__ == "__main__":
    main()
