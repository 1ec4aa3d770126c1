"""Which rule of VIRTIO 1.4 (vmmblk/conform/rules.tsv) is held by which test: reasons.toml, open.txt, and a page.

A test names the rows it holds in its docstring, as ``HOSTILE-002``, ``HOSTILE-081..092``, ``PCI-013..018, 026 and 027``
or ``HOSTILE-020 to -022``, or in the ids of its parameters.
"""
