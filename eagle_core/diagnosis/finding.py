"""What one check of a run found, what it expected, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["problem", "notice", "ok", "unknown"]
"""`problem`: lowers acceptance. `notice`: may, or limits it. `unknown`: not checked."""
_ORDER: tuple[State, ...] = ("problem", "notice", "unknown", "ok")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    """Its name, such as `vocabulary`."""
    state: State
    found: str
    expected: str = ""
    what_to_do: str = ""
    """Empty for `ok`; for `unknown`, what provides the missing input."""


def not_checked(check: str, why: str, what_to_do: str) -> Finding:
    """Return the finding of a check that lacks its input: it is never `ok`."""
    return Finding(check=check, state="unknown", found=f"not checked: {why}", what_to_do=what_to_do)


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return problems first, then notices, unknowns and what is in order; each as given."""
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.state)))
