"""What a pytest session knows about the rows: the tests of each, and what they came to."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from . import rows

if TYPE_CHECKING:
    from collections.abc import Iterator


CHECK = "test_every_rule_has_a_test_or_a_reason_and_the_page_says_so"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two options."""
    group = parser.getgroup("conformance")
    group.addoption("--conformance-page", action="store_true", help="write docs/conformance.md from this run")
    group.addoption("--conformance-check", action="store_true", help="only tell what is wrong with rows and page")


def pytest_configure(config: pytest.Config) -> None:
    """Watch the tests if asked to."""
    if config.option.conformance_page or config.option.conformance_check:
        if config.args_source is pytest.Config.ArgsSource.ARGS:
            raise pytest.UsageError("the page is made of all tests: choose with -k, not with files")
        config.pluginmanager.register(_Observer(config))
    if config.option.conformance_check:
        config.option.collectonly = True


def named(item: pytest.Item) -> Iterator[str]:
    """The rows that a test names: in the docstring of its function or class, or in the id of its parameters."""
    for holder in (getattr(item, "function", None), getattr(item, "cls", None)):
        yield from rows.ids(inspect.getdoc(holder) or "" if holder else "")
    yield from rows.ids(item.nodeid.partition("[")[2])


class _Observer:
    """Collects, and writes or checks the page in the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._tests: dict[str, dict[str, None]] = {}
        self._outcomes: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """See every test, before any is deselected."""
        for item in items:
            for row in named(item):
                self._tests.setdefault(row, {})[_name(item.nodeid)] = None
        if self._config.option.conformance_page:
            items[:] = [item for item in items if item.originalname != CHECK]  # of the page that is being written

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """See what a test comes to."""
        name = _name(report.nodeid)
        if report.failed:
            self._outcomes[name] = rows.FAILED
        elif report.when == "call" and report.passed:
            self._outcomes.setdefault(name, rows.PASSED)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the page, or look at it."""
        if self._config.option.conformance_page:
            self._write()
        wrong = [*rows.complaints(self._tests), *self._stale()]
        if wrong:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self._wrong = wrong

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell what is wrong."""
        for text in self._wrong:
            terminalreporter.write_line(f"conformance: {text}", red=True)

    def _write(self) -> None:
        rows.PAGE.write_text(rows.page(self._tests, rows.passed() | self._outcomes))
        done = {*self._tests, *rows.reasons()}
        lines = rows.OPEN.read_text().splitlines(keepends=True)
        rows.OPEN.write_text("".join(line for line in lines if line.startswith("#") or line.strip() not in done))

    def _stale(self) -> Iterator[str]:
        passed = rows.passed()
        for name in sorted({name for names in self._tests.values() for name in names if name not in passed}):
            yield f"{name} has not passed: run python -m pytest --conformance-page -k {name.rpartition('::')[2]}"
        if rows.PAGE.read_text() != rows.page(self._tests, passed):
            yield "docs/conformance.md is stale: run python -m pytest --conformance-page (-k: only some tests)"


def _name(nodeid: str) -> str:
    return nodeid.partition("[")[0].removeprefix("tests/")
