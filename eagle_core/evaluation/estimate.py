"""Estimate the acceptance in serving from stored states, without running the target.

The rounds of speculative decoding are replayed along the stored answers: the drafter reads the
stored aux states, proposes a chain, and the stored argmax gives the verdict. Where an accepted
token is not the one in the text, the target's next predictions are unknown: the round is cut there
and has no verdict on deeper tokens, and the product of the shares by depth corrects for the cut
(the Kaplan-Meier estimator). On answers that the target itself generated nothing is cut, and the
estimate differs from real decoding only by the rounding of the stored states.

Shapes: T tokens, K drafted tokens, S samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.decoding.chain_drafter import ChainDrafter, DraftNetwork
from eagle_core.decoding.trace import VerificationRound
from eagle_core.errors import ConfigError
from eagle_core.evaluation.acceptance import FloatOrNan, depth_counts
from eagle_core.samples import HiddenStateSample, SampleSource

_RESAMPLES = 2000
_INTERVAL = (0.025, 0.975)


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptanceEstimate:
    """The acceptance in serving, estimated from stored states."""

    num_samples: int
    num_rounds: int
    acceptance_length: float
    """Expected tokens per verifying forward, 1..K+1, greedy."""
    acceptance_interval: tuple[float, float]
    """95 % bootstrap interval over samples."""
    acceptance_by_depth: tuple[FloatOrNan, ...]
    """[K] P(drafted token i is accepted | the tokens before it were); NaN where never reached."""
    on_policy: FloatOrNan
    """Share of the answers' tokens that are the target's argmax: the closer to 1, the more reliable
    the estimate."""


def estimate_acceptance(
    draft: DraftNetwork, source: SampleSource, *, draft_tokens: int, num_samples: int
) -> AcceptanceEstimate:
    """Replay the first `num_samples` samples of `source`, drafting `draft_tokens` (K) per round.

    Raises:
        ConfigError: no sample holds an answer of two tokens or more.

    """
    reached, accepted, on_policy = [], [], []
    num_rounds = 0
    for index in islice(range(len(source.lengths)), num_samples):
        sample = source.fetch(index)
        rounds = replay(draft, sample, draft_tokens=draft_tokens)
        num_rounds += len(rounds)
        sample_reached, sample_accepted = depth_counts(rounds, draft_tokens=draft_tokens)
        reached.append(sample_reached)
        accepted.append(sample_accepted)
        on_policy.append(own_choices(sample))
    if not num_rounds:
        raise ConfigError("no stored answer is long enough to replay; use more held-out samples")
    all_reached, all_accepted = np.stack(reached), np.stack(accepted)
    with np.errstate(invalid="ignore"):
        by_depth = all_accepted.sum(axis=0) / all_reached.sum(axis=0)
    return AcceptanceEstimate(
        num_samples=len(reached),
        num_rounds=num_rounds,
        acceptance_length=float(expected_length(by_depth)),
        acceptance_interval=_interval(all_reached, all_accepted),
        acceptance_by_depth=tuple(by_depth.tolist()),
        on_policy=float(np.concatenate(on_policy).mean()),
    )


def expected_length(by_depth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return expected tokens per verifying forward for conditional acceptances [..., K].

    Also converts the total-variation acceptances of training-time-test steps, means of
    sum(min(p, q)), to the length under sampling. A depth that was never reached ends the chain.
    """
    to_depth: NDArray[np.float64] = np.nan_to_num(by_depth).cumprod(axis=-1)
    lengths: NDArray[np.float64] = 1 + to_depth.sum(axis=-1)
    return lengths


@torch.inference_mode()
def replay(
    draft: DraftNetwork, sample: HiddenStateSample, *, draft_tokens: int
) -> list[VerificationRound]:
    """Return the rounds of decoding the answers of `sample`, each after its own prompt."""
    device, dtype = draft.fc.weight.device, draft.fc.weight.dtype
    aux = from_bfloat16_bits(sample.aux_hidden_states, dtype=dtype).flatten(1).to(device)
    ids: list[int] = sample.input_ids.tolist()
    choices: list[int] = sample.target_argmax.tolist()
    drafter = ChainDrafter(draft)
    rounds: list[VerificationRound] = []
    known = 0
    for start, end in _answers(sample):
        newest = start  # the prefill gives the first token of an answer, never a draft
        while newest < end - 1:
            drafter.observe([ids[known + 1 : newest + 1]], [aux[known:newest]])
            known = newest
            chain = drafter.propose(draft_tokens)[0].tokens
            verdict = judge(chain, choices[newest : end - 1], ids[newest + 1 : end])
            rounds.append(verdict)
            newest += verdict.gained
    return rounds


def judge(chain: Sequence[int], choices: Sequence[int], text: Sequence[int]) -> VerificationRound:
    """Return the verdict of the stored argmax on a drafted chain.

    `choices` are the target's argmax, `text` the stored tokens, both to the end of the answer.
    """
    for depth, (token, choice, stored) in enumerate(zip(chain, choices, text, strict=False)):
        if token != choice:
            return VerificationRound(verified=len(chain), accepted=depth, gained=depth + 1)
        if token != stored:  # accepted, but the text continues differently
            return VerificationRound(verified=depth + 1, accepted=depth + 1, gained=depth + 1)
    accepted = min(len(chain), len(text))
    gained = accepted + 1 if accepted < len(text) else accepted
    return VerificationRound(verified=accepted, accepted=accepted, gained=gained)


def _answers(sample: HiddenStateSample) -> list[tuple[int, int]]:
    """Return (first, one past last) of each run of the loss mask that has a prompt before it."""
    edges = np.flatnonzero(np.diff(sample.loss_mask.astype(np.int8), prepend=0, append=0))
    runs = list(pairwise(edges.tolist()))[::2]
    return [(start, end) for start, end in runs if start > 0]


def own_choices(sample: HiddenStateSample) -> NDArray[np.bool_]:
    """Return for each answer token whether it is the target's argmax."""
    is_argmax: NDArray[np.bool_] = sample.target_argmax[:-1] == sample.input_ids[1:]
    return is_argmax[sample.loss_mask[1:]]


def _interval(reached: NDArray[np.int64], accepted: NDArray[np.int64]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the expected length over the samples [S, K]."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(reached), size=(_RESAMPLES, len(reached)))
    with np.errstate(invalid="ignore"):
        by_depth = accepted[drawn].sum(axis=1) / reached[drawn].sum(axis=1)
    low, high = np.quantile(expected_length(by_depth), _INTERVAL)
    return (float(low), float(high))
