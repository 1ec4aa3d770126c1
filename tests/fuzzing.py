"""How long the tests look that make up what they do: a little with everything else, for hours when asked to."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

FACTOR = int(os.environ.get("VMMBLK_FUZZ", "0"))
"""How many times as many examples as usual are tried, and other ones each time; 0: the usual ones, always the same."""


def effort(examples: int, steps: int = 50) -> settings:
    """Settings for ``examples`` runs of at most ``steps`` steps."""
    return settings(
        max_examples=examples * max(FACTOR, 1),
        stateful_step_count=steps,
        derandomize=not FACTOR,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=bool(FACTOR),
    )
