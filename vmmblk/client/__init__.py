"""The driver's side of vfio-user and virtio-blk, with no guest: for tests, conformance runs and benchmarks."""
