"""``vmmblk conform``: check a virtio-blk server against the rules of VIRTIO."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["conform"]


@click.command()
@click.option("--socket", "socket_path", required=True, type=click.Path(path_type=Path), help="Where the server is.")
def conform(socket_path: Path) -> int:
    """Check a vfio-user virtio-blk server, any, from the driver's side against the rules of VIRTIO 1.4."""
    from vmmblk.conform.check import Outcome, checks
    from vmmblk.conform.runner import kept, run
    from vmmblk.conform.target import Options

    options = Options()
    with kept(socket_path, options):
        outcomes = {result.outcome for result in run(socket_path, options, checks())}
    return int(Outcome.BROKEN in outcomes)
