"""Capture the hidden states of samples as they are stored.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from eagle_core.bfloat16 import to_bfloat16_bits
from eagle_core.errors import CorruptError
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.config import TargetConfig
from eagle_core.target.embedded_tokens import require_embedded
from eagle_core.target.length_rope import LengthRope
from eagle_core.target.model import Captured

OnUnusable = Callable[[TokenizedSample, str], None]
"""Called with a sample whose states cannot be stored, and the reason."""
LOGITS_CHUNK_TOKENS = 1024
_CACHED_BYTES = 1 << 20
"""Of logits that several passes read: half of a core's second-level cache."""
_PLAIN_ROPE = LengthRope()


class CapturingTarget(Protocol):
    """A target of which states can be captured: whole, layer by layer, or in an engine."""

    @property
    def config(self) -> TargetConfig:
        """Its settings."""

    @property
    def model_config(self) -> PretrainedConfig:
        """The configuration of its text model."""

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Decoder layers that are captured by default, 0-based."""

    @property
    def rope(self) -> LengthRope:
        """Which lengths may share a batch."""

    @property
    def device(self) -> torch.device:
        """Where ids go and states come from."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch, padding included; a longer sample is a batch by itself."""

    @property
    def pass_tokens(self) -> int:
        """Tokens that are best captured together; 1 if that makes no difference."""

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H] the head that turns the last state into logits."""

    def logits(self, last: Tensor) -> Tensor:
        """Return the target's logits [..., V] for post-norm states [..., H]."""

    def run_each(
        self,
        batches: Iterable[Tensor],
        *,
        round_late: bool = False,
        layers: Sequence[int] | None = None,
    ) -> Iterator[Captured]:
        """Yield the last state and those of `layers` for each batch of ids."""


def capture_states(
    target: CapturingTarget,
    samples: Sequence[TokenizedSample],
    *,
    for_recompute: bool = False,
    layers: Sequence[int] | None = None,
    on_unusable: OnUnusable | None = None,
) -> Iterator[HiddenStateSample]:
    """Yield the hidden states of `samples`, longest first, in batches of similar length.

    Batches depend only on the given samples: the same shard gives the same bytes.

    With `for_recompute`, samples run one at a time in the given order, and the layers after the
    last aux layer get its output as it is stored, in bfloat16. `RecomputeModel` then recomputes the
    early and the last states bit-exactly from the stored ones.

    With `layers`, the aux states are those of these layers, in their order.

    A sample with a state that is not finite is passed to `on_unusable`, with the reason.

    Raises:
        CorruptError: there is such a sample and no `on_unusable`; names the sample and the state.
        ConfigError: a sample has a token that the target has no embedding for.

    """
    for states in _captured(target, [samples], for_recompute, layers, on_unusable):
        yield from states


def capture_groups(
    target: CapturingTarget,
    groups: Sequence[Sequence[TokenizedSample]],
    *,
    for_recompute: bool = False,
    layers: Sequence[int] | None = None,
    on_unusable: OnUnusable | None = None,
) -> Iterator[Iterator[HiddenStateSample]]:
    """Yield the states of each group, to be read before the next, as `capture_states` does.

    A target that runs layer by layer takes batches of several groups through one layer.
    """
    for states in _captured(target, groups, for_recompute, layers, on_unusable):
        yield states
        for _ in states:  # the next group's outputs come behind
            pass


def _captured(
    target: CapturingTarget,
    groups: Sequence[Sequence[TokenizedSample]],
    for_recompute: bool,
    layers: Sequence[int] | None,
    on_unusable: OnUnusable | None,
) -> Iterator[Iterator[HiddenStateSample]]:
    batches = [list(_batches(target, group, for_recompute=for_recompute)) for group in groups]
    refuse = on_unusable or partial(_refuse, target.config)
    for together in [batches] if target.pass_tokens > 1 else [[group] for group in batches]:
        outputs = target.run_each(
            (_padded_ids(target, batch) for group in together for batch in group),
            round_late=for_recompute,
            layers=layers,
        )
        for group in together:
            yield _states(target, zip(group, outputs, strict=False), refuse)


def _batches(
    target: CapturingTarget, samples: Sequence[TokenizedSample], *, for_recompute: bool
) -> Iterable[Sequence[TokenizedSample]]:
    if for_recompute:
        return ([sample] for sample in samples)
    return batches_by_length(samples, batch_tokens=target.batch_tokens, rope=target.rope)


def _refuse(config: TargetConfig, sample: TokenizedSample, reason: str) -> NoReturn:
    raise CorruptError(
        f"target {config.name}: {_where(sample)}: {reason}; check the weights, try "
        "dtype float32, or remove this record from the data set"
    )


def _where(sample: TokenizedSample) -> str:
    location = f" ({sample.location})" if sample.location else ""
    return f"sample {sample.sample_id}{location}"


def _padded_ids(target: CapturingTarget, batch: Sequence[TokenizedSample]) -> Tensor:
    # Right padding needs no attention mask: under causal attention no real token attends to it.
    ids = np.zeros((len(batch), max(len(sample) for sample in batch)), dtype=np.int64)
    for row, sample in enumerate(batch):
        ids[row, : len(sample)] = sample.input_ids
        require_embedded(
            sample.input_ids, target.model_config.vocab_size, target.config, where=_where(sample)
        )
    return torch.from_numpy(ids).to(target.device)


def _states(
    target: CapturingTarget,
    outputs: Iterable[tuple[Sequence[TokenizedSample], Captured]],
    on_unusable: OnUnusable,
) -> Iterator[HiddenStateSample]:
    for batch, (last, aux) in outputs:
        yield from _of_batch(target, batch, last, aux, on_unusable)


@torch.inference_mode()
def _of_batch(
    target: CapturingTarget,
    batch: Sequence[TokenizedSample],
    last: Tensor,
    aux: Sequence[Tensor],
    on_unusable: OnUnusable,
) -> Iterator[HiddenStateSample]:
    stacked = torch.stack(list(aux), dim=2)
    for row, sample in enumerate(batch):
        argmax, logsumexp, logprob = teacher(target.logits, last[row, : len(sample)])
        # As they are stored: a finite float32 value can be too large for bfloat16.
        sample_aux = stacked[row, : len(sample)].to(torch.bfloat16)
        sample_last = last[row, : len(sample)].to(torch.bfloat16)
        reason = _why_unusable(sample_aux, sample_last, logsumexp)
        if reason:
            on_unusable(sample, reason)
            continue
        yield HiddenStateSample(
            sample_id=sample.sample_id,
            input_ids=sample.input_ids,
            loss_mask=sample.loss_mask,
            aux_hidden_states=to_bfloat16_bits(sample_aux),
            last_hidden_state=to_bfloat16_bits(sample_last),
            target_argmax=argmax,
            target_logsumexp=logsumexp,
            argmax_logprob=logprob,
        )


def teacher(
    logits_of: Callable[[Tensor], Tensor], last: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return argmax (int32), logsumexp and log-probability of the argmax (float32), each [T].

    All are over the full vocabulary, of the logits of post-norm states `last` [T, H].
    """
    argmax, logsumexp, logprob = [], [], []
    for chunk in torch.split(last, LOGITS_CHUNK_TOKENS):
        logits = logits_of(chunk)
        for rows in torch.split(logits, _rows_together(logits)):
            values = rows.float()
            best, index = values.max(dim=-1)
            total = values.sub_(best[:, None]).exp_().sum(dim=-1).log_().add_(best)
            argmax.append(index.to(torch.int32))
            logsumexp.append(total)
            logprob.append(best - total)
    return _joined(argmax), _joined(logsumexp), _joined(logprob)


def _rows_together(logits: Tensor) -> int:
    """Return how many rows [V] to pass over at once: on a CPU, as many as stay in its cache."""
    if logits.device.type != "cpu":
        return len(logits)
    cached = _CACHED_BYTES * torch.get_num_threads()
    return max(1, cached // (logits.shape[-1] * torch.float32.itemsize))


def _why_unusable(aux: Tensor, last: Tensor, logsumexp: NDArray[np.float32]) -> str:
    """Return which states of a sample are NaN or infinite; empty if none are."""
    if not torch.isfinite(aux).all():
        return "its aux states are not finite"
    if not torch.isfinite(last).all():
        return "its last states are not finite"
    return "" if np.isfinite(logsumexp).all() else "its logits are not finite"


def _joined(chunks: Sequence[Tensor]) -> np.ndarray:
    joined: np.ndarray = torch.cat(list(chunks)).cpu().numpy()
    return joined


def batches_by_length(
    samples: Sequence[TokenizedSample], *, batch_tokens: int, rope: LengthRope = _PLAIN_ROPE
) -> Iterator[list[TokenizedSample]]:
    """Yield batches, longest samples first, whose padded size stays within `batch_tokens`.

    A sample longer than the budget is a batch by itself. Ties are broken by sample id. Samples for
    which `rope` has other frequencies are never in one batch.
    """
    batch: list[TokenizedSample] = []
    for sample in sorted(samples, key=lambda sample: (-len(sample), sample.sample_id)):
        is_full = batch and len(batch[0]) * (len(batch) + 1) > batch_tokens
        if is_full or (batch and rope.group(len(batch[0])) != rope.group(len(sample))):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch
