"""Every rule has a test or a reason, and docs/conformance.md says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conformance import rows

REPO = Path(__file__).resolve().parents[1]


def test_every_rule_has_a_test_or_a_reason_and_the_page_says_so() -> None:
    """The rows, the tests that name them, the reasons and the page agree."""
    command = [sys.executable, "-m", "pytest", "-q", "-q", "--conformance-check"]
    checked = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, "\n".join(line for line in checked.stdout.splitlines() if "conformance:" in line)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("BLK-004: a", ["BLK-004"]),
        ("BLK-004, 006 and 007, RING-SPLIT-001", ["BLK-004", "BLK-006", "BLK-007", "RING-SPLIT-001"]),
        ("PCI-013..015, 026, -027.", ["PCI-013", "PCI-014", "PCI-015", "PCI-026", "PCI-027"]),
        ("STAT-009 to -011 and more", ["STAT-009", "STAT-010", "STAT-011"]),
        ("VQRST-001, 1024 bytes; XRST-001, RST-1000 and PRE-RST-001", ["VQRST-001"]),
    ],
    ids=["one", "several", "range", "range in words", "none"],
)
def test_rows_are_named_singly_or_in_ranges(text: str, named: list[str]) -> None:
    """What a docstring may say."""
    assert list(rows.ids(text)) == named


def test_what_is_wrong_with_rows_is_told() -> None:
    """Neither test nor reason, a test and a reason, a row that does not exist: each is a complaint."""
    without = {*rows.reasons(), *rows.still_open()}
    tests = {row: ["t"] for row in rows.rows() if row not in without}
    before = rows.complaints(tests)
    tests["LEGACY-004"] = ["t"]
    tests["STAT-999"] = ["t"]
    del tests["STAT-001"]
    assert [each for each in rows.complaints(tests) if each not in before] == [
        "STAT-999 does not exist, but t tests it",
        "STAT-001 has neither a test nor a reason",
        "LEGACY-004 has a test and a reason: one is enough",
    ]


def test_a_failing_test_fails_its_rows() -> None:
    """A row is passed if each of its tests is; a test that has not run is not passed, and what has not is bold."""
    tests = {"STAT-001": ["::a", "::b"], "STAT-002": ["::a"], "STAT-003": ["::a", "::c"]}
    page = rows.page(tests, {"::a": rows.PASSED, "::b": rows.FAILED})
    cells = [line.strip(" |").split(" | ")[3:] for line in page.splitlines() if line.startswith("| STAT-00")]
    assert cells[:3] == [[rows.FAILED, "::a **::b**"], [rows.PASSED, "::a"], [rows.NOT_RUN, "::a **::c**"]]
    assert cells[3][0].startswith(rows.OPEN_OUTCOME)
