"""How fast vmmblk is on this machine, and what it costs: ``benchmarks/run`` makes docs/performance.md of it."""
