"""How well a draft could do with other aux layers or another vocabulary, before any training.

The target's final state after token t + 1 is regressed on the aux states of token t and on the
embedding of token t + 1, as for a closed-form start. The sums over all captured layers contain
those of every triple: each is one solution of a part of them. On held-out positions, the share
where the solution and the target propose the same token is the accuracy of step 0. A trained draft
does better, with every triple; what counts is the ranking.

All triples are solved. They are ranked with the smallest vocabulary, and the best are measured with
that of the draft: with many tokens, the product with the head takes longer than the solution.

Shapes: R rows, L captured layers, H target hidden size, V target vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagle_core.bfloat16 import widened
from eagle_core.closed_form.moments import Moments
from eagle_core.closed_form.state_rows import CHUNK_ROWS, MOST_FEATURES, FeatureMap, StateRows
from eagle_core.closed_form.state_sizes import add_norms, final_gain
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError

LEAST_POSITIONS = 200
"""Fewer positions, to solve or to measure on, tell nothing."""
MOST_MEASURED = 10
_WIDTH_OF_95_PERCENT = 1.96

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TripleResult:
    """One choice of aux layers."""

    layers: Triple
    accuracy: float
    """Share of the held-out positions where prediction and target propose the same token."""
    difference: float
    """From the accuracy of the configured triple."""
    margin: float | None
    """Half of the 95 % interval of this difference over conversations; None for a single one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyResult:
    """One size of the draft vocabulary, with the configured aux layers."""

    size: int
    coverage: float
    """Share of the supervised tokens of the held-out split that the draft can propose."""
    accuracy: float
    """A proposal of the target that is not in the vocabulary is a miss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Candidates, measured on the same positions."""

    layers: tuple[int, ...]
    """Those that were captured."""
    num_positions: int
    """To solve on."""
    num_held_out: int
    """Positions to measure on."""
    num_conversations: int
    """Held out."""
    features_per_layer: int
    """Fewer than the hidden size for a wide target."""
    num_triples: int
    triples: tuple[TripleResult, ...]
    """The best ones, and those that were asked for; best first."""
    vocabularies: tuple[VocabularyResult, ...]
    """In the order in which they were given."""
    is_held_out: bool = True
    """Whether it was measured on a held-out split; else on training samples set apart."""


def require_positions(num_positions: int, what: str) -> None:
    """Raise ConfigError if so few positions tell nothing; `what` names them."""
    if num_positions < LEAST_POSITIONS:
        raise ConfigError(
            f"candidates cannot be compared on {num_positions} supervised {what} positions; at "
            f"least {LEAST_POSITIONS} are needed: raise dataset.max_conversations, "
            "dataset.max_length or, for held-out ones, dataset.held_out_fraction"
        )


def candidate_layers(
    num_layers: int, required: Iterable[int], *, count: int = 10
) -> tuple[int, ...]:
    """Return up to `count` decoder layers, spread over the depth; `required` are among them.

    Each further layer is the one farthest from those chosen; of several, the last.
    """
    chosen = set(required) or {num_layers - 1}
    while len(chosen) < min(count, num_layers):
        others = set(range(num_layers)) - chosen
        chosen.add(max(others, key=lambda layer: (min(abs(layer - c) for c in chosen), layer)))
    return tuple(sorted(chosen))


def compare_candidates(
    train: StateRows,
    held_out: StateRows,
    *,
    layers: Sequence[int],
    configured: Triple,
    others: Iterable[Triple] = (),
    embedding: Tensor,
    head: Tensor,
    vocabulary: DraftVocabulary,
    vocabularies: Sequence[DraftVocabulary],
    held_out_counts: NDArray[np.int64],
    device: torch.device,
    most_features: int = MOST_FEATURES,
    on_solved: Callable[[], None] = lambda: None,
) -> Comparison:
    """Solve on the rows `train`, and measure on the rows `held_out`.

    Args:
        train: rows of conversations to solve on.
        held_out: rows of other conversations.
        layers: the captured layers, ascending, in the order of the rows.
        configured: the triple that all others are compared with.
        others: triples that are measured in any case.
        embedding: [V, H] the target's.
        head: [V, H] the target's.
        vocabulary: of the draft, for the triples.
        vocabularies: to compare, with the configured triple; the smallest one ranks all triples.
        held_out_counts: [V] supervised tokens of the held-out split.
        device: where to compute.
        most_features: of each layer; of wider states only the principal directions are read, which
            makes all accuracies a lower bound.
        on_solved: called after each triple.

    Raises:
        ConfigError: too few positions, or states that are not finite.

    """
    require_positions(len(train), "training")
    require_positions(len(held_out), "held-out")
    fits = _Fits(train, held_out, layers, embedding, device, most_features)
    judge = _Judge(held_out, head.to(device), fits.gain)
    triples = list(combinations(layers, 3))
    smallest = min((vocabulary, *vocabularies), key=len)
    scores = {}
    for triple in triples:
        scores[triple] = int(judge.hits(fits.predict(triple), smallest).sum())
        on_solved()
    best = sorted(triples, key=lambda triple: -scores[triple])[:MOST_MEASURED]
    hits = {
        triple: judge.hits(fits.predict(triple), vocabulary)
        for triple in {configured, *others, *best}
    }
    results = [
        _result(triple, found, hits[configured], held_out.conversation)
        for triple, found in hits.items()
    ]
    prediction = fits.predict(configured)
    return Comparison(
        layers=tuple(layers),
        num_positions=len(train),
        num_held_out=len(held_out),
        num_conversations=held_out.num_conversations,
        features_per_layer=fits.features_per_layer,
        num_triples=len(triples),
        triples=tuple(sorted(results, key=lambda result: (-result.accuracy, result.layers))),
        vocabularies=tuple(
            VocabularyResult(
                size=len(one),
                coverage=one.coverage(held_out_counts),
                accuracy=float(judge.hits(prediction, one).double().mean()),
            )
            for one in vocabularies
        ),
    )


class _Fits:
    """The regressions of all triples, from the same sums, and what they predict."""

    def __init__(
        self,
        train: StateRows,
        held_out: StateRows,
        layers: Sequence[int],
        embedding: Tensor,
        device: torch.device,
        most_features: int,
    ) -> None:
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._features = FeatureMap(train, embedding, device, most=most_features)
        hidden_size = embedding.shape[1]
        norms = Moments(hidden_size, 1, device)
        for chunk in train.chunks(device):
            add_norms(norms, chunk.final)
        self.gain = final_gain(norms).float()
        """[H] of the final norm"""
        self._moments = Moments(self._features.num_features, hidden_size, device)
        for chunk in train.chunks(device):
            self._moments.add(self._features(chunk), widened(chunk.final) / self.gain)
        self._held_out = torch.cat([self._features(chunk) for chunk in held_out.chunks(device)])

    @property
    def features_per_layer(self) -> int:
        return self._features.width

    def predict(self, triple: Triple) -> Tensor:
        """Return [R, H] the held-out final states as predicted, without the norm's gain."""
        columns = self._features.columns([self._place[layer] for layer in triple])
        return self._held_out[:, columns] @ self._moments.solve(columns).float()


class _Judge:
    """Compares predicted final states with those of the target, and their proposals."""

    def __init__(self, held_out: StateRows, head: Tensor, gain: Tensor) -> None:
        device = head.device
        self._head = head
        self._gain = gain
        self._argmax = held_out.argmax.to(device)

    def hits(self, prediction: Tensor, vocabulary: DraftVocabulary) -> Tensor:
        """Return [R] bool, on the CPU: where prediction [R, H] and target propose the same token.

        The prediction chooses from `vocabulary`, the target from all tokens.
        """
        ids = torch.from_numpy(vocabulary.target_ids).to(self._head.device)
        rows = self._head[ids].T
        chosen = [
            ids[(chunk * self._gain @ rows).argmax(dim=1)]
            for chunk in torch.split(prediction, CHUNK_ROWS)
        ]
        return (torch.cat(chosen) == self._argmax).cpu()


def _result(layers: Triple, hits: Tensor, reference: Tensor, conversation: Tensor) -> TripleResult:
    gained = hits.double() - reference.double()
    return TripleResult(
        layers=layers,
        accuracy=float(hits.double().mean()),
        difference=float(gained.mean()),
        margin=_margin(gained, conversation),
    )


def _margin(values: Tensor, conversation: Tensor) -> float | None:
    """Return half of the 95 % interval of the mean of `values` [R], drawn by conversation.

    The mean is a ratio of two sums over conversations, whose variance is linearised.
    """
    num_rows = conversation.bincount()
    num_conversations = int((num_rows > 0).sum())
    if num_conversations == 1:
        return None
    deviations = values.new_zeros(len(num_rows)).index_add_(0, conversation, values - values.mean())
    variance = deviations.square().sum() * num_conversations / (num_conversations - 1)
    return _WIDTH_OF_95_PERCENT * float(variance.sqrt()) / len(values)
