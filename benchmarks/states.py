"""Real hidden states for benchmarks: those of a recipe's target on real conversations."""

from pathlib import Path

from deployments.recipe import load_recipe
from eagle_core.target.capture import capture_states
from eagle_core.target.model import TargetModel
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.stored_source import to_stored
from flows.workspace import Workspace
from storage.profiles import ProfileName
from storage.records.identity import OmittedStates, StoreIdentity
from storage.samples import StoredSample


def load_target(recipe: str) -> TargetModel:
    """Return the target of a recipe, in float32 on the CPU: fast and the same everywhere."""
    config = load_recipe(recipe, ["target.dtype=float32", "target.device=cpu"]).target
    return TargetModel.load(config)


def token_file(recipe: str, home: Path) -> TokenFile:
    """Return the training tokens that `eyas run hidden-states RECIPE --home HOME` wrote.

    Raises:
        SystemExit: there are none.

    """
    loaded = load_recipe(recipe)
    space = Workspace(home=home, target=loaded.target.name, dataset=loaded.dataset.name)
    paths = sorted(space.tokens_path.glob("train-*.arrow"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise SystemExit(
            f"no tokens in {space.tokens_path}; run: eyas run hidden-states {recipe} --home {home}"
        )
    return TokenFile(paths[-1])


def capture(target: TargetModel, tokens: TokenFile, num_samples: int) -> list[StoredSample]:
    """Return the first samples of a token file, in its order, with the target's states."""
    wanted = list(tokens)[:num_samples]
    by_id = {state.sample_id: to_stored(state) for state in capture_states(target, wanted)}
    return [by_id[sample.sample_id] for sample in wanted]


def identity(
    sample: StoredSample, *, vocab_size: int, profile: ProfileName, recompute: bool = False
) -> StoreIdentity:
    """Return the identity of a benchmark's store; with `recompute` it omits states."""
    layers, hidden = sample.aux_hidden_states.shape[1:]
    omitted = OmittedStates(
        mode="one_sequence", early_layers=(0,), last_layers=(layers, layers + 1)
    )
    return StoreIdentity(
        target_fingerprint="benchmark",
        target_fields={},
        tokenizer_fingerprint="benchmark",
        template_fingerprint="benchmark",
        aux_layers=tuple(range(layers)),
        hidden_size=hidden,
        vocab_size=vocab_size,
        norm_convention="post_norm",
        profile=profile,
        omitted=omitted if recompute else None,
    )
