"""The rules of VIRTIO 1.4, checked from the driver's side against any vfio-user virtio-blk server.

A check (:mod:`check`) is a function that drives a :class:`target.Target` and raises when a rule is broken; the checks
themselves are in :mod:`checks`, one file per area.  :mod:`runner` runs them one by one and survives whatever the
server does; :mod:`report` tells the results.
"""
