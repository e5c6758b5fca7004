"""All checks of a run, from measured figures alone: what is at fault first, then the rest.

The order of the checks is that of causes: what makes every other figure wrong comes before what
only limits it, and symptoms come last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eagle_core.diagnosis.agreement import (
    EngineLength,
    Length,
    OverfitResult,
    check_decoding,
    check_engine,
    check_overfit,
)
from eagle_core.diagnosis.conversation_form import ConversationForm, check_stop, check_template
from eagle_core.diagnosis.data_quality import (
    OWN_ANSWERS,
    Choices,
    check_answers,
    check_cut,
    check_vocabulary,
)
from eagle_core.diagnosis.draft_interface import (
    Exports,
    LayerError,
    NamedLayers,
    check_layers,
    check_norms,
    check_states,
    check_target,
    check_weights,
)
from eagle_core.diagnosis.finding import Finding, in_order
from eagle_core.diagnosis.learning import Accuracies, Seen, check_held_out, check_tokens_seen
from eagle_core.diagnosis.position_range import PositionRange, check_positions


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFigures:
    """Everything that the checks need. A text is the reason why a figure is unknown."""

    step: int
    """Of the checkpoint in use."""
    target_changes: tuple[str, ...]
    """What of the target differs from the run's, such as its weights."""
    form: ConversationForm | str
    layers: NamedLayers
    exports: Exports | str
    states_fault: str | None
    """Of the semantic probe; empty if it holds, None if it was not checked."""
    why_no_states: str
    """Why there are no figures from stored states; empty if there are."""
    layer_errors: tuple[LayerError, ...]
    """Empty unless the target was run."""
    training_choices: Choices | str
    held_out_choices: Choices | str
    vocabulary_size: int
    training_coverage: float
    """Share of the training answers' tokens in the draft vocabulary, as the run recorded it."""
    draft_tokens: int
    """K of the evaluation."""
    accuracies: Accuracies | str
    seen: Seen
    recorded_length: float | None
    """Held-out length of the checkpoint, as training recorded it."""
    recorded_prefixes: tuple[float, ...]
    """Joint-prefix accuracies behind that length; empty if they were not recorded."""
    num_cut: int | str
    num_samples: int
    max_length: int
    positions: PositionRange
    decoded: Length | None
    replayed: Length | str | None
    """What the estimate promises for K; None without one."""
    decoding_warning: str
    engine: EngineLength | str | None
    overfit: OverfitResult | str | None
    """None unless it was asked for."""


def diagnose(figures: RunFigures) -> Sequence[Finding]:
    """Return the findings of all checks, most likely cause first."""
    own_share = (
        None if isinstance(figures.training_choices, str) else (figures.training_choices.own_share)
    )
    measured = None if isinstance(figures.accuracies, str) else figures.accuracies
    length, prefixes = figures.recorded_length, figures.recorded_prefixes
    if length is None and measured is not None:
        length, prefixes = measured.held_out_length, measured.held_out_prefixes
    has_held_out = not isinstance(figures.held_out_choices, str)
    return in_order(
        [
            check_target(figures.target_changes),
            check_template(figures.form),
            check_stop(figures.form),
            check_layers(figures.layers, figures.exports),
            check_norms(figures.exports),
            check_weights(figures.exports, step=figures.step),
            check_states(
                figures.states_fault,
                why_unknown=figures.why_no_states,
                errors=figures.layer_errors,
            ),
            check_vocabulary(
                figures.held_out_choices if has_held_out else figures.training_choices,
                draft_tokens=figures.draft_tokens,
                size=figures.vocabulary_size,
                training_coverage=figures.training_coverage,
                of="held-out text" if has_held_out else "training text",
            ),
            check_answers(figures.training_choices),
            check_held_out(figures.accuracies, figures.seen),
            check_overfit(figures.overfit),
            check_decoding(
                figures.decoded,
                figures.replayed,
                held_out=1 + sum(prefixes[: figures.draft_tokens]) if prefixes else length,
                warning=figures.decoding_warning,
            ),
            check_engine(figures.engine),
            check_tokens_seen(
                figures.seen,
                length,
                has_own_answers=None if own_share is None else own_share >= OWN_ANSWERS,
            ),
            check_cut(figures.num_cut, figures.num_samples, max_length=figures.max_length),
            check_positions(figures.positions, figures.exports),
        ]
    )
