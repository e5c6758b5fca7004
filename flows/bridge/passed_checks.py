"""Checks that targets passed in this process: the stages of a flow do not repeat each other's."""

from collections import deque
from dataclasses import dataclass, replace

from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.folder_state import FolderState
from eagle_core.target.preflight import CapturedWhere, check_target
from eagle_core.tokenization.template_source import configured_text
from flows.bridge.draft_setup import require_draft_sizes

_MOST = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetCheck:
    """The arguments of `check_target`."""

    target: TargetConfig
    max_length: int | None
    runs_here: bool
    rolls_back: bool
    captured: CapturedWhere = "here"

    def includes(self, other: "TargetCheck") -> bool:
        """Return whether a target that passed this check passes the other."""
        longest = max(self.max_length or 0, other.max_length or 0)
        wider = replace(
            other,
            max_length=longest or None,
            runs_here=self.runs_here or other.runs_here,
            rolls_back=self.rolls_back or other.rolls_back,
            captured=self.captured if self.target.backend == "transformers" else other.captured,
        )
        return self == wider


_State = tuple[FolderState, str | None]
"""Of the target's folder, and the text of a template that may be in a file elsewhere."""
_passed: deque[tuple[_State, TargetCheck]] = deque(maxlen=_MOST)


def require_passed(check: TargetCheck) -> None:
    """Check the target, unless a check that includes this one passed and its files are the same.

    Raises:
        ConfigError: this target cannot be run, or no draft can be made for it; names the cause.
        CorruptError: its weights are incomplete; names the tensors.

    """
    folder = FolderState.of(weights.locate(check.target))
    state = (folder, configured_text(check.target.template))
    if any(before == state and passed.includes(check) for before, passed in list(_passed)):
        return
    check_target(
        check.target,
        max_length=check.max_length,
        runs_here=check.runs_here,
        rolls_back=check.rolls_back,
        captured=check.captured,
    )
    require_draft_sizes(check.target)
    _passed.append((state, check))
