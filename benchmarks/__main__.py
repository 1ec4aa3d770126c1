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
from rich.progress import Progress

from benchmarks.cells import quick_subjects, subjects
from benchmarks.measure import cost, guestless, image, machine
from benchmarks.page import Run, page
from benchmarks.plots import draw
from vmmblk.config import parse_size
from vmmblk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.cells import Subject

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "performance"
NOTES = ROOT / "benchmarks" / "notes.md"
TMPFS = Path("/dev/shm")  # noqa: S108 - it is measured as what it is
COSTED = ("null", "ram", "file", "python")
QUICK = {"rounds": 1, "seconds": 0.2, "size": 16 << 20}


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=1.0)
@click.option("--size", default="1G")
@click.option("--raw", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path, file_okay=False))
def main(*, quick: bool, rounds: int, seconds: float, size: str, raw: Path | None, output: Path | None) -> None:
    """See benchmarks/run --help."""
    try:
        settings = QUICK if quick else {"rounds": rounds, "seconds": seconds, "size": parse_size(size)}
    except ConfigError as exc:
        raise click.BadParameter(str(exc), param_hint="--size") from None
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="file-", dir=KEPT) as folder:
        everything = subjects(Path(folder), TMPFS, ROOT / "benchmarks" / "disks")
        chosen = quick_subjects(everything) if quick else everything
        kept = raw or KEPT / time.strftime("%Y-%m-%d-%H%M%S.json")
        try:
            if raw is None:
                _measure(chosen, Path(folder), settings, kept)
        except (OSError, RuntimeError, ValueError) as exc:
            raise click.ClickException(str(exc)) from exc
    written = _write(Run(**json.loads(kept.read_text())), everything, output or (KEPT if quick else ROOT / "docs"))
    click.echo(f"{written}, from {kept}")


def _measure(chosen: list[Subject], folder: Path, settings: dict[str, float], kept: Path) -> None:
    """All rounds; what there is by the end of each is kept."""
    run = Run(machine((folder, TMPFS)), dict(settings), [], [], [])
    rounds, seconds, size = int(settings["rounds"]), settings["seconds"], int(settings["size"])
    steps = rounds * (sum(len(subject.cells) for subject in chosen) + len(COSTED))
    with contextlib.ExitStack() as stack:
        folders = {subject.folder for subject in chosen if subject.folder is not None}
        files = {place: stack.enter_context(image(place, size)) for place in folders}
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        task = progress.add_task("", total=steps)

        def tell(what: str) -> None:
            progress.update(task, advance=1, description=what)

        for number in range(rounds):
            _round(run, chosen, files, (number, size, seconds), tell)
            run.settings["rounds"] = number + 1
            kept.write_text(json.dumps(asdict(run), indent=1) + "\n")


def _round(
    run: Run,
    chosen: list[Subject],
    files: dict[Path, Path],
    settings: tuple[int, int, float],
    tell: Callable[[str], None],
) -> None:
    """Everything once."""
    number, size, seconds = settings
    for subject in chosen:
        file = files.get(subject.folder) if subject.folder is not None else None
        for sample in guestless(subject, file, size, seconds):
            run.samples.append({"round": number, **sample})
            tell(f"round {number + 1}: {subject.title}")
        if subject.name in COSTED:
            run.costs.append({"round": number, **cost(subject, file, size, seconds)})
            tell(f"round {number + 1}: cost of {subject.title}")


def _write(run: Run, everything: list[Subject], output: Path) -> Path:
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
