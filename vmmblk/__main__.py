"""``python -m vmmblk`` is the ``vmmblk`` command."""

from vmmblk.cli import main

main()
