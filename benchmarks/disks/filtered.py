"""A filter over memory: every request passes through Python, the data does not."""

from vmmblk.backends.memory import Memory
from vmmblk.filters.base import Filter


class Filtered(Filter):
    """It forwards everything."""

    def __init__(self, size: int) -> None:
        super().__init__(Memory(size // 512))
