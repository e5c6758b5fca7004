"""RoPE and the length of contexts: a draft knows the positions that it was trained on."""

from dataclasses import dataclass

from eagle_core.diagnosis.conversation_form import TOKENS_AGAIN
from eagle_core.diagnosis.draft_interface import Exports
from eagle_core.diagnosis.finding import Finding, not_checked

POSITIONS = "positions"


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionRange:
    """Positions in training, in decoding and in the configurations."""

    longest_trained: int | str
    """Tokens of the longest training sample, or why that is unknown."""
    longest_decoded: int | None
    """Tokens of the longest context that `evaluate` may decode, its longest prompt and
    `max_new_tokens`; None without one. What answers really reached is not recorded."""
    target_limit: int | None
    """`max_position_embeddings`; None if its configuration names none."""
    is_scaled: bool
    """Whether the target's RoPE is scaled; a draft's never is."""
    window: int | None = None
    """Tokens of the longest piece of a sample in training (`training.window_tokens`); None if no
    distance is longer in decoding either, because the draft has a sliding window."""


def check_positions(positions: PositionRange, exports: Exports | str) -> Finding:
    """Return whether decoding stays at positions that the draft was trained on."""
    trained = positions.longest_trained
    if isinstance(trained, str):
        return not_checked(POSITIONS, trained, TOKENS_AGAIN)
    differing = [
        one
        for one in (() if isinstance(exports, str) else exports.differences)
        if one.part == "positions"
    ]
    if differing:
        return Finding(
            check=POSITIONS,
            state="problem",
            found="; ".join(map(str, differing[:3])),
            expected="; ".join(f"{one.key} {one.expected}" for one in differing[:3]),
            what_to_do="export the run again (eyas run export RECIPE)",
        )
    decoded = positions.longest_decoded
    longer = "compute states of longer conversations (dataset.max_length), and train on them"
    pieces = ""
    if positions.window is not None and positions.window < trained:
        trained, pieces = positions.window, " at a time"
        longer = "train another run with a larger training.window_tokens, or draft.sliding_window"
    found = f"trained on up to {trained:,} tokens{pieces}" + (
        f", evaluate may decode up to {decoded:,}" if decoded is not None else ""
    )
    if decoded is not None and decoded > trained:
        return Finding(
            check=POSITIONS,
            state="notice",
            found=found,
            expected="contexts no longer than in training: the draft has never seen the positions "
            "behind",
            what_to_do=longer,
        )
    if positions.is_scaled:
        return Finding(
            check=POSITIONS,
            state="notice",
            found=f"{found}; the target's RoPE is scaled, the draft's is not",
            expected="no contexts longer than in training: in these, the draft's positions mean "
            "nothing",
            what_to_do=longer,
        )
    limit = positions.target_limit
    if limit is not None and trained < limit / 4:
        return Finding(
            check=POSITIONS,
            state="notice",
            found=f"{found}; the target takes {limit:,}",
            expected="acceptance to fall in contexts longer than in training",
            what_to_do=f"if you serve such contexts: {longer}",
        )
    return Finding(check=POSITIONS, state="ok", found=found)
