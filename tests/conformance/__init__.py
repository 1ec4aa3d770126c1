"""Which rule of VIRTIO 1.4 is held by which test: rows.tsv, reasons.toml, open.txt, and the page made of them.

A test names the rows it holds in its docstring, as ``HOSTILE-002``, ``HOSTILE-081..092``, ``PCI-013..018, 026 and 027``
or ``HOSTILE-020 to -022``, or in the ids of its parameters.
"""
