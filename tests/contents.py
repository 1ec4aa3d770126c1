"""What a disk may hold while requests are under way: for each sector, the contents that it may have.

A write that is in flight has happened or not.  When the last of the writes to a sector that were in flight together
has completed, the sector holds what one of them stored; if one of them failed or was forgotten, it may hold what it
held before just as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SECTOR = 512


@dataclass(eq=False)
class Access:
    """A request: what it stores in which sectors, and what it may find in which sectors."""

    stores: dict[int, bytes] = field(default_factory=dict)
    finds: dict[int, set[bytes]] = field(default_factory=dict)
    settled: dict[int, set[bytes]] = field(default_factory=dict)
    """Of a flush: what is stable when it completes, of sectors that nobody wrote to meanwhile."""


class Contents:
    """The sectors of a disk that holds ``data``."""

    def __init__(self, data: bytes) -> None:
        self._may = [{data[at : at + SECTOR]} for at in range(0, len(data), SECTOR)]
        self._flying: list[Access] = []
        self._bursts: dict[int, set[bytes]] = {}
        self._unsure: set[int] = set()

    def __len__(self) -> int:
        return len(self._may)

    def grow(self, sectors: int) -> None:
        """The disk is bigger now; what is new is zero."""
        self._may += [{bytes(SECTOR)} for _ in range(sectors - len(self._may))]

    def write(self, stores: dict[int, bytes]) -> Access:
        """A request begins that stores these contents in these sectors."""
        for sector, content in stores.items():
            self._may[sector] = self._may[sector] | {content}
            self._bursts.setdefault(sector, set()).add(content)
            for other in self._flying:
                if sector in other.finds:
                    other.finds[sector].add(content)
                other.settled.pop(sector, None)
        return self._begin(Access(stores))

    def read(self, sectors: range) -> Access:
        """A request begins that reads these sectors."""
        return self._begin(Access(finds={sector: set(self._may[sector]) for sector in sectors}))

    def flush(self) -> Access:
        """A flush begins."""
        quiet = (sector for sector in range(len(self)) if sector not in self._bursts)
        return self._begin(Access(settled={sector: set(self._may[sector]) for sector in quiet}))

    def nothing(self) -> Access:
        """A request begins that does nothing to the disk."""
        return self._begin(Access())

    def _begin(self, access: Access) -> Access:
        self._flying.append(access)
        return access

    def end(self, access: Access, *, done: bool) -> None:
        """A request has completed and is ``done``; otherwise it failed, or nobody will know."""
        self._flying.remove(access)
        for sector in access.stores:
            if not done:
                self._unsure.add(sector)
            if any(sector in other.stores for other in self._flying):
                continue
            burst = self._bursts.pop(sector)
            if sector in self._unsure:
                self._unsure.discard(sector)
            else:
                self._may[sector] = burst

    def check(self, data: bytes | bytearray | memoryview) -> None:
        """The disk holds what it may hold."""
        for sector, may in enumerate(self._may):
            found = bytes(data[sector * SECTOR : (sector + 1) * SECTOR])
            assert fits(found, may), f"sector {sector} holds {tell(found)}, not one of {sorted(map(tell, may))}"


def fits(found: bytes, may: set[bytes]) -> bool:
    """Whether a sector holds one of these, or a mixture of them: nobody keeps two queues from writing it at once."""
    return found in may or all(byte in choices for byte, *choices in zip(found, *may, strict=True))


def check_read(access: Access, data: bytes) -> None:
    """A read has found what it may find."""
    for position, (sector, may) in enumerate(access.finds.items()):
        found = data[position * SECTOR : (position + 1) * SECTOR]
        assert fits(found, may), f"sector {sector} reads {tell(found)}, not one of {sorted(map(tell, may))}"


def check_flush(access: Access, stable: bytearray) -> None:
    """A flush has made stable what it found."""
    for sector, may in access.settled.items():
        found = bytes(stable[sector * SECTOR : (sector + 1) * SECTOR])
        assert fits(found, may), f"sector {sector} is stable as {tell(found)}, not as one of {sorted(map(tell, may))}"


def tell(content: bytes) -> str:
    """A sector in few words."""
    return f"{content[0]:02x}..." if content == content[:1] * SECTOR else content[:8].hex() + "..."
