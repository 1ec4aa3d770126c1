"""The ``vmmblk`` command.  One file per command; whatever is heavy is imported when a command runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from vmmblk.cli.bench import bench
from vmmblk.cli.conform import conform
from vmmblk.cli.run import run
from vmmblk.cli.serve import serve
from vmmblk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vmmblk")
def vmmblk() -> None:
    """A virtio-blk disk for QEMU, with anything behind it."""


vmmblk.add_command(serve)
vmmblk.add_command(run)
vmmblk.add_command(conform)
vmmblk.add_command(bench)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 2 with one line for what the user can mend."""
    try:
        status = vmmblk.main(arguments, prog_name="vmmblk", standalone_mode=False)
    except click.UsageError as exc:
        command = exc.ctx.command_path if exc.ctx is not None else "vmmblk"
        status = _complain(f"{exc.format_message().rstrip('.')}; see {command} --help")
    except click.ClickException as exc:
        status = _complain(exc.format_message())
    except ConfigError as exc:
        status = _complain(str(exc))
    except click.Abort:
        status = 130
    sys.exit(status)


def _complain(message: str) -> int:
    click.echo(f"vmmblk: error: {' '.join(message.split())}", err=True)
    return 2
