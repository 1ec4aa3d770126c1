"""Latencies counted in buckets: what a histogram of them tells.  Pure.

A bucket is one of 64 for each power of two of nanoseconds (below 64 ns one for each), so no answer is off by more than
1.6 % (csrc/bench.c fills them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Latencies", "bucket_range"]

_PER_POWER = 64


def bucket_range(bucket: int) -> tuple[int, int]:
    """The first and the last nanosecond that are counted in ``bucket``."""
    power, step = divmod(bucket, _PER_POWER)
    if power == 0:
        return step, step
    first = (_PER_POWER + step) << power - 1
    return first, first + (1 << power - 1) - 1


@dataclass(frozen=True, slots=True)
class Latencies:
    """How long requests took, in nanoseconds; ``buckets`` has those that are not empty."""

    minimum: int = 0
    maximum: int = 0
    total: int = 0
    buckets: Mapping[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many requests there were."""
        return sum(self.buckets.values())

    @property
    def mean(self) -> float:
        """0 if there were none."""
        return self.total / self.count if self.buckets else 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation, each request taken as the middle of its bucket."""
        count = self.count
        if count < 2:
            return 0.0
        middle = {sum(bucket_range(bucket)) / 2: number for bucket, number in self.buckets.items()}
        mean = sum(value * number for value, number in middle.items()) / count
        return math.sqrt(sum((value - mean) ** 2 * number for value, number in middle.items()) / (count - 1))

    def percentile(self, percent: float) -> int:
        """What ``percent`` of a hundred requests did not exceed: the end of a bucket, and never above the maximum."""
        wanted = math.ceil(self.count * percent / 100)
        for bucket, so_far in self._ascending():
            if so_far >= wanted:
                return max(self.minimum, min(bucket_range(bucket)[1], self.maximum))
        return 0

    def shares(self, limits: list[int]) -> list[float]:
        """Of a hundred requests, those below the first limit (ns), below the second but not the first, and so on.

        A bucket counts where its first nanosecond belongs; the last number is for what reaches the last limit.
        """
        found = [0] * (len(limits) + 1)
        for bucket, number in self.buckets.items():
            first, _ = bucket_range(bucket)
            found[sum(limit <= first for limit in limits)] += number
        return [100 * number / (self.count or 1) for number in found]

    def __add__(self, other: Latencies) -> Latencies:
        """Both together."""
        if not self.buckets or not other.buckets:
            return self if self.buckets else other
        keys = self.buckets.keys() | other.buckets.keys()
        return Latencies(
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.total + other.total,
            {key: self.buckets.get(key, 0) + other.buckets.get(key, 0) for key in keys},
        )

    def _ascending(self) -> Iterator[tuple[int, int]]:
        so_far = 0
        for bucket in sorted(self.buckets):
            so_far += self.buckets[bucket]
            yield bucket, so_far
