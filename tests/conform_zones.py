"""A zoned disk that has of everything: conventional zones, limits, a zone that is read-only and one that is offline.

``vmmblk serve ./tests/conform_zones.py`` serves it, host-managed; ``model=host-aware`` and ``read_write=off`` make it
what they say.  With ``max_active=3`` both limits are met at once.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from vmmblk.backends.memory import Memory
from vmmblk.block import ZoneState
from vmmblk.filters.readonly import ReadOnly
from vmmblk.filters.zoned import Zoned

_ZONE, _ZONES = 256 << 10, 32  # bytes, number
_READ_ONLY, _OFFLINE = 4, 5  # numbers of zones


class Disk(Zoned):
    """32 zones of 256 KiB, of which three quarters can be written, over memory."""

    def __init__(
        self,
        model: Literal["host-managed", "host-aware"] = "host-managed",
        max_active: int = 5,
        read_write: bool = True,
    ) -> None:
        memory = Memory(_ZONES * _ZONE // 512)
        super().__init__(
            memory if read_write else ReadOnly(memory),
            zone_size=_ZONE,
            zone_capacity=_ZONE * 3 // 4,
            conventional=2,
            max_open=3,
            max_active=max_active,
            max_append=64 << 10,
            write_granularity=4096,
            model=model,
        )
        for zone, state in ((_READ_ONLY, ZoneState.READ_ONLY), (_OFFLINE, ZoneState.OFFLINE)):
            asyncio.run(self.fail_zone(zone * _ZONE // 512, state))
