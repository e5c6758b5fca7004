"""Drafting with every variant of a draft gives what the plain layer gives, without any cache."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from eagle_core.decoding.chain_drafter import ChainDrafter
from eagle_core.decoding.config import TreeConfig
from eagle_core.decoding.draft_tree import ROOT, DraftTree
from eagle_core.decoding.tree_drafter import TreeDrafter
from eagle_core.draft.model import DraftModel
from tests.eagle_core.training.plain_ttt import plain_layer
from tests.eagle_core.training.test_ttt import VARIANTS, random_case

NUM_TOKENS = 5
named = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: "-".join(variant) or "plain"
)


@torch.no_grad()
def logits_after(draft: DraftModel, ids: Sequence[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last logits [D], and the state [1, H] that the next token reads."""
    state = hidden
    for number in range(draft.config.num_hidden_layers):
        state = plain_layer(draft, number, torch.tensor(ids), state, 0, [], [])
    return draft.logits(state[-1]), draft.recurrent(state[-1:])


def plain_chain(
    draft: DraftModel, next_ids: Sequence[int], aux: Tensor, path: Sequence[int]
) -> list[Tensor]:
    """Return the logits before each token of `path` and after the last, computed from the start."""
    ids, hidden, found = list(next_ids), draft.fuse(aux), []
    for token in [*path, None]:
        logits, state = logits_after(draft, ids, hidden)
        found.append(logits)
        if token is not None:
            ids.append(token)
            hidden = torch.cat([hidden, state])
    return found


@named
@torch.no_grad()
def test_chains_of_a_batch_with_padding(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, batch, _ = random_case(7, [14, 9, 12], **variant)
    rows = [slice(a, b) for a, b in pairwise(batch.starts)]
    ids = [batch.input_ids[one].tolist() for one in rows]
    aux = [batch.aux_hidden_states[one] for one in rows]
    drafter = ChainDrafter(draft)
    for firsts, ends in (([0, 0, 0], [6, 2, 9]), ([6, 2, 9], [9, 3, 10])):
        parts = [slice(a, b) for a, b in zip(firsts, ends, strict=True)]
        drafter.observe(
            [one[part] for one, part in zip(ids, parts, strict=True)],
            [one[part] for one, part in zip(aux, parts, strict=True)],
        )
        drafter.propose(3)  # whose entries must leave no trace
    drafter.select([0, 2])
    drafter.observe([ids[0][9:], ids[2][10:]], [aux[0][9:], aux[2][10:]])
    seen: list[Tensor] = []

    def recorded(hidden: Tensor) -> Tensor:
        seen.append(DraftModel.logits(draft, hidden))
        return seen[-1]

    monkeypatch.setattr(draft, "logits", recorded)
    proposals = drafter.propose(NUM_TOKENS)
    monkeypatch.undo()
    for row, number in enumerate((0, 2)):
        path = proposals[row].tokens
        expected = plain_chain(draft, ids[number], aux[number], path[:-1])
        for found, logits in zip(seen, expected, strict=True):
            torch.testing.assert_close(found[row, 0], logits, rtol=1e-6, atol=1e-6)


@named
@torch.no_grad()
def test_trees(variant: dict[str, Any]) -> None:
    draft, batch, _ = random_case(8, [13], **variant)
    ids, aux = batch.input_ids.tolist(), batch.aux_hidden_states
    drafter = TreeDrafter(draft, TreeConfig(depth=4, top_k=3, nodes=14))
    drafter.observe(ids[:5], aux[:5])
    drafter.propose()
    drafter.observe(ids[5:], aux[5:])
    tree = drafter.propose()
    assert max(tree.depths) > 1
    for node in range(len(tree.tokens)):
        path = path_to(tree, node)
        chances = [
            one.log_softmax(-1)[_draft_id(draft, token)]
            for one, token in zip(plain_chain(draft, ids, aux, path[:-1]), path, strict=True)
        ]
        assert tree.scores[node] == pytest.approx(float(sum(chances)), rel=1e-5)


def _draft_id(draft: DraftModel, token: int) -> int:
    return int(draft.t2d[:token].sum())


def path_to(tree: DraftTree, node: int) -> list[int]:
    """Return the tokens from the root to a node, itself included."""
    before = [] if tree.parents[node] == ROOT else path_to(tree, tree.parents[node])
    return [*before, tree.tokens[node]]
