"""Speculative decoding with drafted trees, as the papers of EAGLE-2 and EAGLE-3 measure it.

One round: the drafter proposes a tree, the target scores the last token and all nodes in one
cached forward, the longest path that its own choices confirm is kept with the choice after it, and
both caches keep the entries of that path alone. Invariant: the tokens are those of plain greedy
decoding, up to floating-point noise, as in `speculative`.

Shapes: T tokens, N nodes, H target hidden, V target vocabulary.
"""

import time
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from eagle_core.decoding.chain_drafter import DraftNetwork
from eagle_core.decoding.config import DecodingConfig, TreeConfig
from eagle_core.decoding.draft_tree import DraftTree, accepted_path, visible_nodes
from eagle_core.decoding.target_cache import CachedTarget, CacheT
from eagle_core.decoding.trace import GenerationTrace, VerificationRound, kept_round
from eagle_core.decoding.tree_drafter import TreeDrafter
from eagle_core.errors import ConfigError

_PROBED = DraftTree(tokens=(5, 6, 7), parents=(-1, -1, 0), scores=(0.0, 0.0, 0.0))
_PROBE_TEXT = (1, 2, 3, 4)
_TOLERANCE = 0.1
_FLOAT32_TOLERANCE = 1e-3
"""Of logits, relative to their spread: above rounding, below what another context makes of them."""


@torch.inference_mode()
def generate_tree(
    target: CachedTarget[CacheT],
    draft: DraftNetwork,
    prompt_ids: Sequence[int],
    config: DecodingConfig,
    tree: TreeConfig,
    stop_ids: Collection[int] = (),
) -> GenerationTrace:
    """Decode greedily with drafted trees until a stop token or `max_new_tokens`.

    Raises:
        ConfigError: the prompt is empty, the temperature is above 0, or the target cannot verify
            trees over texts of this length.

    """
    if not prompt_ids:
        raise ConfigError("cannot decode from an empty prompt: give at least one token")
    if config.temperature > 0:
        raise ConfigError("trees are drafted at temperature 0 only; set temperature to 0")
    target.require_tree(longest_with_tree(len(prompt_ids), config, tree))
    started = time.perf_counter()
    last, aux, past = target.forward_cached(_ids(prompt_ids, target), None)
    tokens = [int(target.logits(last[0, -1]).argmax())]
    rounds: list[VerificationRound] = []
    prefill_seconds = time.perf_counter() - started
    drafter = TreeDrafter(draft, tree)
    next_ids, aux = (*prompt_ids[1:], tokens[-1]), aux[0]
    while len(tokens) < config.max_new_tokens and tokens[-1] not in stop_ids:
        drafter.observe(next_ids, aux)
        drafted = drafter.propose()
        num_text = len(prompt_ids) + len(tokens) - 1
        last, aux, past = run_tree(target, past, tokens[-1], drafted, num_text=num_text)
        choices = target.logits(last).argmax(dim=-1).tolist()
        path = accepted_path(drafted, choices)
        rows = [0, *(1 + node for node in path)]
        target.keep_entries(past, rows, num_new=len(choices))
        next_ids = (*(drafted.tokens[node] for node in path), choices[rows[-1]])
        aux = aux[rows]
        kept, verification = kept_round(
            next_ids, accepted=len(path), drafted=tree.depth, stop_ids=stop_ids
        )
        tokens += kept
        rounds.append(verification)
    return GenerationTrace(
        tokens=tuple(tokens[: config.max_new_tokens]),
        rounds=tuple(rounds),
        seconds=time.perf_counter() - started,
        prefill_seconds=prefill_seconds,
    )


def longest_with_tree(num_prompt: int, config: DecodingConfig, tree: TreeConfig) -> int:
    """Return the most entries of the target's cache: the text, and a last tree with its root."""
    return num_prompt + config.max_new_tokens + tree.nodes + 1


def run_tree(
    target: CachedTarget[CacheT], past: CacheT, root: int, tree: DraftTree, *, num_text: int
) -> tuple[Tensor, Tensor, CacheT]:
    """Run root and nodes after `num_text` tokens of text.

    Returns (last [1 + N, H], aux [1 + N, 3H], extended cache).
    """
    positions = torch.tensor([[0, *tree.depths]], device=target.device) + num_text
    last, aux, past = target.forward_tree(
        _ids((root, *tree.tokens), target),
        past,
        visible=visible_nodes(tree).to(target.device),
        positions=positions,
    )
    return last[0], aux[0], past


@torch.inference_mode()
def require_tree_logits(target: CachedTarget[CacheT]) -> None:
    """Raise ConfigError unless a small tree has the logits of its paths, each run alone."""
    *text, root = _PROBE_TEXT
    _, _, past = target.forward_cached(_ids(text, target), None)
    last, _, _ = run_tree(target, past, root, _PROBED, num_text=len(text))
    for number, path in ((1, (0, 2)), (2, (1,))):
        tokens = [*_PROBE_TEXT, *(_PROBED.tokens[step] for step in path)]
        alone, _, _ = target.forward_cached(_ids(tokens, target), None)
        rows = [0, *(1 + step for step in path)]
        expected = target.logits(alone[0, len(text) :])
        found = target.logits(last[rows])
        error = _relative_error(found.double(), expected.double())
        is_coarse = torch.finfo(found.dtype).bits < torch.finfo(torch.float32).bits
        if not error < (_TOLERANCE if is_coarse else _FLOAT32_TOLERANCE):
            raise ConfigError(
                f"evaluation.tree cannot be used with this target: its logits on path {number} of "
                f"a small tree differ from those of the path alone by {error:.1%} of their spread; "
                "leave it out to draft chains"
            )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest root mean square error of a row [T, V], relative to its deviation."""
    errors = (found - expected).square().mean(dim=-1).sqrt()
    return float((errors / expected.std(dim=-1)).max())


def _ids(tokens: Sequence[int], target: CachedTarget[CacheT]) -> Tensor:
    return torch.tensor([[*tokens]], device=target.device)
