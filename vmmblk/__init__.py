"""vmmblk: a virtio-blk disk for userspace VMMs, in Python."""
