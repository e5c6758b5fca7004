"""What counts of a text that a server sent: the same as of one that Eyas decodes."""

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.trace import VerificationRound
from eagle_core.serving.sent_text import SentRound, to_trace

STOP = 9
CONFIG = DecodingConfig(max_new_tokens=6, draft_tokens=3)


def sent(tokens: tuple[int, ...], *, accepted: int, seconds: float = 1.0) -> SentRound:
    """Return a round with three drafted tokens."""
    return SentRound(tokens=tokens, accepted=accepted, drafted=3, seconds=seconds)


def test_rounds_after_the_limit_do_not_count_and_the_last_one_counts_in_full() -> None:
    rounds = [
        sent((2, 3), accepted=1, seconds=1.0),
        sent((4, 5, 6, 7), accepted=3, seconds=2.0),
        sent((8,), accepted=0, seconds=3.0),
    ]
    trace = to_trace((1,), rounds, CONFIG, {STOP}, first_seconds=0.5)
    assert trace.tokens == (1, 2, 3, 4, 5, 6)
    assert trace.rounds == (
        VerificationRound(verified=3, accepted=1, gained=2),
        VerificationRound(verified=3, accepted=3, gained=4),
    )
    assert (trace.prefill_seconds, trace.seconds) == (0.5, 2.0)


def test_a_drafted_stop_token_ends_the_text_and_its_round() -> None:
    trace = to_trace((1,), [sent((2, STOP), accepted=3)], CONFIG, {STOP}, first_seconds=0.5)
    assert trace.tokens == (1, 2, STOP)
    assert trace.rounds == (VerificationRound(verified=2, accepted=2, gained=2),)


def test_a_stop_token_of_the_target_itself_was_not_drafted() -> None:
    trace = to_trace((1,), [sent((2, STOP), accepted=1)], CONFIG, {STOP}, first_seconds=0.5)
    assert trace.rounds == (VerificationRound(verified=3, accepted=1, gained=2),)


def test_a_text_that_stops_at_once_has_no_rounds() -> None:
    trace = to_trace((STOP,), [sent((2,), accepted=0)], CONFIG, {STOP}, first_seconds=0.5)
    assert (trace.tokens, trace.rounds, trace.seconds) == ((STOP,), (), 0.5)
