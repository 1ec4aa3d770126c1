"""Blocks on top of blocks.  One file each; they change what a disk means, never how fast it is measured to be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.filters.checked import Checked

if TYPE_CHECKING:
    from vmmblk.block import Block

__all__ = ["prepare"]


def prepare(block: Block) -> Block:
    """What the server is given for ``block``: every method is awaited, and the contract is enforced."""
    return block if isinstance(block, Checked) else Checked(block)
