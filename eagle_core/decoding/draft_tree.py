"""A drafted tree of tokens, as EAGLE-2 and EAGLE-3 draft it: pure functions of scores and choices.

The nodes of a tree are in descending order of their score, the draft's log-probability of the whole
path to them. Invariant: the parent of a node stands before it; children of one node are of
different tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT = -1
"""Parent of the first drafted tokens: the text's last token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftTree:
    """A drafted tree of N tokens."""

    tokens: tuple[int, ...]
    """[N] target-vocabulary ids."""
    parents: tuple[int, ...]
    """[N] index of the token before it, or ROOT."""
    scores: tuple[float, ...]
    """[N] log-probability of the path from the root to the token."""

    @property
    def depths(self) -> tuple[int, ...]:
        """[N] number of drafted tokens on the path to a token, itself included."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)


def best_nodes(
    tokens: Sequence[int], parents: Sequence[int], scores: Tensor, *, num_nodes: int
) -> DraftTree:
    """Return the tree of the `num_nodes` candidates with the best scores.

    A candidate stands behind its parent, whose score is no lower: the best are a tree.
    """
    order = torch.sort(scores, descending=True, stable=True).indices[:num_nodes].tolist()
    places = {candidate: place for place, candidate in enumerate(order)}
    return DraftTree(
        tokens=tuple(tokens[candidate] for candidate in order),
        parents=tuple(places.get(parents[candidate], ROOT) for candidate in order),
        scores=tuple(scores[order].tolist()),
    )


def visible_nodes(tree: DraftTree) -> Tensor:
    """Return [1 + N, 1 + N] which of root and tokens each of them follows, itself included."""
    size = 1 + len(tree.tokens)
    visible = torch.eye(size, dtype=torch.bool)
    visible[:, 0] = True
    for node, parent in enumerate(tree.parents, start=1):
        visible[node] |= visible[1 + parent]
    return visible


def accepted_path(tree: DraftTree, choices: Sequence[int]) -> list[int]:
    """Return the nodes of the longest path that the target's choices confirm.

    `choices` [1 + N] are the target's own tokens after the root and after each node.
    """
    children = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True))
    }
    path: list[int] = []
    at = ROOT
    while (found := children.get((at, choices[1 + at]))) is not None:
        path.append(found)
        at = found
    return path
