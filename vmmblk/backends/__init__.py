"""Disks.  One file each; a backend knows the block contract and nothing else of vmmblk."""
