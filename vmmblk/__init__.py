"""vmmblk: a virtio-blk disk for userspace VMMs, in Python.

What is named here is all that a disk needs; see ``vmmblk.block`` for the contract.
"""

from vmmblk.block import (
    Block,
    BlockInfo,
    Buffers,
    Lifetime,
    SupportsDiscard,
    SupportsFlush,
    SupportsIdentify,
    SupportsLifetime,
    SupportsResize,
    SupportsSecureErase,
    SupportsWriteZeroes,
    Topology,
)
from vmmblk.errors import BlockError, Disconnected, IsReadOnly, Unimplemented, Unknown

__all__ = [
    "Block",
    "BlockError",
    "BlockInfo",
    "Buffers",
    "Disconnected",
    "IsReadOnly",
    "Lifetime",
    "SupportsDiscard",
    "SupportsFlush",
    "SupportsIdentify",
    "SupportsLifetime",
    "SupportsResize",
    "SupportsSecureErase",
    "SupportsWriteZeroes",
    "Topology",
    "Unimplemented",
    "Unknown",
]
