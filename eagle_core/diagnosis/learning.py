"""What the draft has learnt: on held-out text against its own, and for the tokens it has seen."""

from dataclasses import dataclass

from eagle_core.diagnosis.finding import Finding, not_checked
from eagle_core.diagnosis.known_runs import MEASURED_ON, expected_after

HELD_OUT, TOKENS_SEEN = "held out", "tokens seen"
_OVERFITTED, _DRIFTING = 0.6, 0.85
_USUAL_GAP = 0.1
_FEW_TOKENS = 1_000_000
_FULL_DATA = "UltraChat and ShareGPT, the data of EAGLE-3, have about 375 million tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracies:
    """First-step accuracy of the draft on both splits."""

    training: float
    held_out: float
    held_out_length: float
    """Tokens per target forward, from joint prefixes."""
    held_out_prefixes: tuple[float, ...]
    """By training-time-test step; empty if an older version recorded the length alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """The tokens that a run was trained on."""

    num_tokens: int
    """With repetitions, prompts included, as far as the checkpoint in use."""
    num_data_tokens: int
    """Tokens of the training split."""
    is_solved: bool
    """Whether the draft began with solved weights or those of a given draft."""

    @property
    def passes(self) -> float:
        """How often each sample was seen."""
        return self.num_tokens / max(self.num_data_tokens, 1)


def check_held_out(accuracies: Accuracies | str, seen: Seen) -> Finding:
    """Return whether the draft predicts new text about as well as its training text."""
    if isinstance(accuracies, str):
        return not_checked(
            HELD_OUT, accuracies, "set dataset.held_out_fraction above 0, or name the store"
        )
    training, held_out = accuracies.training, accuracies.held_out
    found = f"{held_out:.1%} of first drafts on held-out text, {training:.1%} on training text"
    if training - held_out <= _USUAL_GAP or held_out >= _DRIFTING * training:
        return Finding(check=HELD_OUT, state="ok", found=found)
    is_overfitted = held_out < _OVERFITTED * training
    what = "it fits its samples, not new text" if is_overfitted else "it begins to fit its samples"
    return Finding(
        check=HELD_OUT,
        state="problem" if is_overfitted else "notice",
        found=f"{found}: {what}, after {seen.passes:.1f} passes over {seen.num_data_tokens:,} "
        "tokens",
        expected=f"held-out accuracy within {1 - _DRIFTING:.0%} of that on training text",
        what_to_do="train on more conversations, not longer on these (dataset.max_conversations, "
        "more dataset.sources); fewer training.epochs or training.max_steps",
    )


def check_tokens_seen(seen: Seen, length: float | None, *, has_own_answers: bool | None) -> Finding:
    """Return whether the held-out length is what known runs had after as many tokens.

    Args:
        seen: the tokens of the run.
        length: held-out length from joint prefixes; None if nothing was held out.
        has_own_answers: whether the target wrote the answers; None if that is unknown.

    """
    if length is None:
        return not_checked(
            TOKENS_SEEN,
            f"{seen.num_tokens:,} tokens were seen, but no length was measured on held-out text",
            "set dataset.held_out_fraction above 0",
        )
    known = expected_after(
        seen.num_tokens, has_own_answers=bool(has_own_answers), is_solved=seen.is_solved
    )
    is_beyond = seen.num_tokens > known.most_tokens
    at = f" at {known.most_tokens:,}, their most" if is_beyond else ""
    found = f"{length:.2f} tokens per target forward after {seen.num_tokens:,} training tokens"
    expected = f"about {known.length:.2f}{at}, as in known runs of {MEASURED_ON}"
    if length < known.lowest:
        return Finding(
            check=TOKENS_SEEN,
            state="problem",
            found=found,
            expected=f"{expected}, and not below {known.lowest:.2f}",
            what_to_do="this is too low for its tokens: look for the cause in the other checks, "
            "then in the learning rate (training.learning_rate) and the loss curve in report.html",
        )
    if seen.num_tokens >= _FEW_TOKENS:
        return Finding(check=TOKENS_SEEN, state="ok", found=found, expected=expected)
    return Finding(
        check=TOKENS_SEEN,
        state="notice",
        found=found,
        expected=expected,
        what_to_do=f"train on more data: {known.most_tokens:,} tokens gave "
        f"{known.most_length:.2f}; {_FULL_DATA}",
    )
