"""What a test run reports at its end: tests that did not run, and tests that passed only again.

The hooks are pytest's; `tests/conftest.py` brings them in. What `.ci/checks` reads is in pytest's
cache under `eyas/`.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest

from tests import needs

FAILED_BEFORE = pytest.StashKey[frozenset[str]]()
EXIT_STATUS_KEY = "eyas/exit_status"
FLAKY_KEY = "eyas/flaky"


def pytest_configure(config: pytest.Config) -> None:
    """Remember what `--last-failed` is about to run."""
    cache = _cache(config)
    if cache is not None and config.option.lf:
        config.stash[FAILED_BEFORE] = frozenset(cache.get("cache/lastfailed", {}))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail in CI where a program is missing; note how the run ended."""
    cache = _cache(session.config)
    if cache is None:
        return
    if os.environ.get("CI") == "true" and _missing(_skipped(session.config)):
        session.exitstatus = exitstatus = pytest.ExitCode.TESTS_FAILED
    cache.set(EXIT_STATUS_KEY, int(exitstatus))
    cache.set(FLAKY_KEY, _flaky(session.config))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name the tests that did not run by what they need, and the flaky ones."""
    skipped = _skipped(config)
    if skipped:
        terminalreporter.section("not run here", yellow=True)
        for line in not_run(skipped):
            terminalreporter.line(line)
    for name in _flaky(config):
        terminalreporter.line(f"FLAKY {name}", red=True)


def not_run(skipped: Iterable[tuple[str, str]]) -> Iterable[str]:
    """Yield lines from pairs of test and reason: a line per reason, then its files."""
    by_reason: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, reason in skipped:
        by_reason[reason][name.partition("::")[0]] += 1
    for reason, files in sorted(by_reason.items()):
        count = sum(files.values())
        yield f"{count} {'test' if count == 1 else 'tests'}: {reason}"
        for file, number in sorted(files.items()):
            yield f"    {file} ({number})"


def _cache(config: pytest.Config) -> pytest.Cache | None:
    """Return the cache of the process that reports; a worker of xdist's has no say."""
    return None if hasattr(config, "workerinput") else getattr(config, "cache", None)


def _reports(
    config: pytest.Config, kind: str
) -> Sequence[pytest.TestReport | pytest.CollectReport]:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    return reporter.stats.get(kind, []) if reporter else []


def _skipped(config: pytest.Config) -> list[tuple[str, str]]:
    found = []
    for report in _reports(config, "skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        found.append((report.nodeid, reason.removeprefix("Skipped: ")))
    return found


def _missing(skipped: Iterable[tuple[str, str]]) -> bool:
    programs = {program.reason for program in needs.PROGRAMS}
    return any(reason in programs for _, reason in skipped)


def _flaky(config: pytest.Config) -> list[str]:
    before = config.stash.get(FAILED_BEFORE, frozenset())
    failed = {report.nodeid for kind in ("failed", "error") for report in _reports(config, kind)}
    passed = {report.nodeid for report in _reports(config, "passed")}
    return sorted((passed & before) - failed)
