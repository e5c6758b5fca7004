"""Aux layers, norms and sizes: run, store, target and exports must name the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from eagle_core.diagnosis.export_config import Difference
from eagle_core.diagnosis.finding import Finding, not_checked

TARGET, LAYERS, NORMS, WEIGHTS, STATES = "target", "aux layers", "norms", "export", "states"
_EXPORT = "eyas run export RECIPE"
_EXPORT_AGAIN = "export the run again (eyas run export RECIPE) and serve that folder as it is"
_MOST_SHOWN = 3
_OTHER_STATES = 0.5
"""Relative error that no profile and no arithmetic causes; int4 has 0.12."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedLayers:
    """The aux layers as each part names them, 0-based; None where it names none."""

    run: tuple[int, ...]
    target: tuple[int, ...]
    """By today's settings and configuration."""
    store: tuple[int, ...] | None
    start: tuple[int, ...] | None = None
    """Of the draft that the run started from."""
    has_given_start: bool = False
    """Whether the run started from a given draft."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exports:
    """The exported folders of a run."""

    names: tuple[str, ...]
    differences: tuple[Difference, ...]
    stale: tuple[str, ...]
    """Names of those whose weights are not the checkpoint's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """The stored states of one aux layer against those that the target computes now."""

    layer: int
    relative_error: float
    """Norm of the difference over the norm of the computed states."""
    nearest: int
    """Layer whose computed states are the nearest to those stored."""


def check_target(changed: Sequence[str]) -> Finding:
    """Return whether the target has the weights of training; `changed` names what it has not."""
    if not changed:
        return Finding(check=TARGET, state="ok", found="its weights are those of the run")
    return Finding(
        check=TARGET,
        state="problem",
        found=f"the target's {' and '.join(changed)} are not those of the run",
        expected="the target that the run was trained for: another one, even fine-tuned from it, "
        "has other states",
        what_to_do="set target.model and target.revision as the run has them (run.json), or train "
        "a run for this target",
    )


def check_fit(misfit: str) -> Finding:
    """Return the finding on a target of other sizes, to which no other check applies."""
    return Finding(
        check=TARGET,
        state="problem",
        found=misfit,
        expected="a target of the sizes that the run's draft was trained for",
        what_to_do="set target.model and target.revision as the run has them (run.json); every "
        "other check needs that target",
    )


def check_layers(layers: NamedLayers, exports: Exports | str) -> Finding:
    """Return whether all parts read the layers that the run was trained on."""
    own = f"layers {_listed(layers.run)}, which the run was trained on"
    others = {"store": layers.store, "target's settings": layers.target}
    wrong = [
        f"the {name} has layers {_listed(found)}"
        for name, found in others.items()
        if found is not None and found != layers.run
    ]
    if wrong:
        return Finding(
            check=LAYERS,
            state="problem",
            found="; ".join(wrong),
            expected=own,
            what_to_do=f"set target.aux_layers to {list(layers.run)}, or train a run on the "
            "layers at hand",
        )
    exported = () if isinstance(exports, str) else _of_part(exports, "layers")
    if exported:
        return Finding(
            check=LAYERS,
            state="problem",
            found=_first(exported),
            expected=f"{exported[0].expected}: {own}, as this key counts them",
            what_to_do=_EXPORT_AGAIN,
        )
    if layers.has_given_start and layers.start != layers.run:
        return Finding(
            check=LAYERS,
            state="notice",
            found="the draft that the run started from "
            + (
                "does not name its aux layers"
                if layers.start is None
                else f"reads layers {_listed(layers.start)}"
            ),
            expected=own,
            what_to_do="find out its layers; training.refit=true solves its fusing matrix for "
            "others",
        )
    parts = ["run", *(() if layers.store is None else ("store",)), "settings"]
    if isinstance(exports, str):
        return not_checked(
            LAYERS, f"{_listed(layers.run)} in {', '.join(parts)}, but {exports}", _EXPORT
        )
    return Finding(
        check=LAYERS,
        state="ok",
        found=f"{_listed(layers.run)} in {', '.join([*parts, *exports.names])}",
    )


def check_norms(exports: Exports | str) -> Finding:
    """Return whether norms and sizes of the exports are those of the run."""
    if isinstance(exports, str):
        return not_checked(NORMS, exports, _EXPORT)
    wrong = (*_of_part(exports, "norms"), *_of_part(exports, "sizes"))
    if wrong:
        return Finding(
            check=NORMS,
            state="problem",
            found=_first(wrong),
            expected="; ".join(f"{one.key} {one.expected}" for one in wrong[:_MOST_SHOWN]),
            what_to_do=_EXPORT_AGAIN,
        )
    return Finding(check=NORMS, state="ok", found=f"as trained in {', '.join(exports.names)}")


def check_weights(exports: Exports | str, *, step: int) -> Finding:
    """Return whether the exports hold the checkpoint of `step`."""
    if isinstance(exports, str):
        return not_checked(WEIGHTS, exports, _EXPORT)
    if exports.stale:
        return Finding(
            check=WEIGHTS,
            state="problem",
            found=f"the weights in {', '.join(exports.stale)} are not those of step {step:,}",
            expected="the weights of the checkpoint that evaluate measures",
            what_to_do=_EXPORT_AGAIN,
        )
    return Finding(check=WEIGHTS, state="ok", found=f"those of step {step:,}")


def check_states(
    fault: str | None, *, why_unknown: str = "", errors: Sequence[LayerError] = ()
) -> Finding:
    """Return whether the store has the target's own states.

    Args:
        fault: of the semantic probe; empty if it holds, None if it was not checked.
        why_unknown: why it was not.
        errors: of aux layers against the target; empty if it was not run.

    """
    if fault:
        return Finding(
            check=STATES,
            state="problem",
            found=fault,
            expected="states that reproduce the target's log-probabilities",
            what_to_do="find the damaged shards (eyas run verify RECIPE) and recompute them (eyas "
            "repair RECIPE)",
        )
    wrong = [
        one for one in errors if one.nearest != one.layer or one.relative_error > _OTHER_STATES
    ]
    if wrong:
        named = "; ".join(
            f"layer {one.layer} differs by {one.relative_error:.0%}, nearest is layer {one.nearest}"
            for one in wrong
        )
        return Finding(
            check=STATES,
            state="problem",
            found=f"the aux states are not those of the layers that the store names: {named}",
            expected="each the nearest to the states of its own layer",
            what_to_do="compute the states again with hidden-states, in another store",
        )
    if fault is None:
        return not_checked(STATES, why_unknown, "name the store (--set store.root=...)")
    computed = ", and the aux states are those that the target computes now" if errors else ""
    return Finding(
        check=STATES, state="ok", found=f"they reproduce the recorded log-probabilities{computed}"
    )


def _of_part(exports: Exports, part: str) -> tuple[Difference, ...]:
    return tuple(one for one in exports.differences if one.part == part)


def _first(differing: Sequence[Difference]) -> str:
    shown = "; ".join(map(str, differing[:_MOST_SHOWN]))
    rest = len(differing) - _MOST_SHOWN
    return f"{shown}; and {rest} more" if rest > 0 else shown


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
