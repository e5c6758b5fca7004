"""The findings on a run as table rows: causes with all that is known, the rest in short."""

from collections.abc import Sequence

from eagle_core.diagnosis.finding import Finding
from flows.reports.table import Row


def cause_rows(findings: Sequence[Finding]) -> list[Row]:
    """Return a row for each problem and notice, in the given order."""
    return [
        (f"{finding.state}: {finding.check}", _text(finding))
        for finding in findings
        if finding.state in {"problem", "notice"}
    ]


def other_rows(findings: Sequence[Finding]) -> list[Row]:
    """Return a row for each check that found nothing, or was not done."""
    return [
        (finding.check, f"{finding.found} (to check it: {finding.what_to_do})")
        if finding.state == "unknown"
        else (finding.check, f"ok: {finding.found}")
        for finding in findings
        if finding.state not in {"problem", "notice"}
    ]


def verdict(findings: Sequence[Finding]) -> str:
    """Return how many problems there are, and of which checks."""
    problems = [finding.check for finding in findings if finding.state == "problem"]
    num_unknown = sum(finding.state == "unknown" for finding in findings)
    unknown = f"; {num_unknown} not checked" if num_unknown else ""
    if not problems:
        return f"no problem found{unknown}"
    noun = "problem" if len(problems) == 1 else "problems, most likely cause first"
    return f"{len(problems)} {noun}: {', '.join(problems)}{unknown}"


def _text(finding: Finding) -> str:
    lines = [finding.found]
    if finding.expected:
        lines.append(f"expected: {finding.expected}")
    if finding.what_to_do:
        lines.append(f"what to do: {finding.what_to_do}")
    return "\n".join(lines)
