"""The frozen target model: hidden-state capture, and cached forwards for speculative decoding.

Conventions (docs/design.md, section 4): an aux layer id is the 0-based decoder layer whose *output*
is captured; `last` is the state after the final norm, so that `lm_head(last)` gives the logits.
Loading refuses a model for which that does not hold (logit soft-capping, logit scaling).

Shapes: B batch, T tokens, H hidden size, V vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
)

from eagle_core.bfloat16 import DTYPES, from_bfloat16_bits, to_bfloat16_bits
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig

OnUnusable = Callable[[TokenizedSample, str], None]
"""Takes a sample whose states cannot be stored, and why."""
CAPTURE_VERSION = 1
"""Raised whenever the same weights and ids could give other stored bytes."""
NORM_CONVENTION = "post_norm"
_LOGITS_CHUNK_TOKENS = 1024
_HEAD_CHUNK_ROWS = 16384


def aux_layers(config: TargetConfig, num_layers: int) -> tuple[int, int, int]:
    """Return the captured decoder layers, 0-based, low to high."""
    layers = config.aux_layers or (1, num_layers // 2 - 1, num_layers - 4)
    if not 0 <= layers[0] < layers[1] < layers[2] < num_layers:
        raise ConfigError(
            f"target {config.name}: aux layers {layers} must rise and lie in 0..{num_layers - 1} "
            f"(the model has {num_layers} layers); set target.aux_layers"
        )
    return layers


def resolve_device(device: str) -> torch.device:
    """Return the torch device, `auto` being CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def read_model_config(config: TargetConfig, folder: Path) -> PretrainedConfig:
    """Return the text model's configuration from the weights folder.

    Raises:
        ConfigError: transformers does not take it; says what it said.

    """
    text_config: PretrainedConfig = _whole_config(config, folder).get_text_config()
    return text_config


def _whole_config(config: TargetConfig, folder: Path) -> PretrainedConfig:
    try:
        loaded: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except (StrictDataclassError, OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"target {config.name}: transformers {transformers.__version__} does not take "
            f"{folder / 'config.json'}: {said}. Correct that file (a key that is null may be left "
            "out), or install a transformers that knows this model"
        ) from error
    return loaded


def read_stop_ids(config: TargetConfig, folder: Path) -> frozenset[int]:
    """Return the ids that end a turn, by the generation config of the weights folder."""
    try:
        found = GenerationConfig.from_pretrained(folder)
    except OSError:  # there is none: transformers derives it from the model's own configuration
        found = GenerationConfig.from_model_config(_whole_config(config, folder))
    return _stop_ids(found)


def _stop_ids(config: GenerationConfig) -> frozenset[int]:
    eos: int | list[int] | None = config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])


def fingerprint_fields(config: TargetConfig, folder: Path) -> dict[str, str]:
    """Return what decides the bytes of the hidden states, by a name a person can read."""
    model_config = read_model_config(config, folder)
    return {
        "aux_layers": json.dumps(aux_layers(config, model_config.num_hidden_layers)),
        "attention": config.attention,
        "capture_version": str(CAPTURE_VERSION),
        "dtype": config.dtype,
        "norm_convention": NORM_CONVENTION,
        "weights": json.dumps(weights.weight_digests(folder), sort_keys=True),
    }


def fingerprint(fields: Mapping[str, str]) -> str:
    """Return the sha256 over the sorted compact JSON of `fields`."""
    text = json.dumps(dict(fields), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class TargetModel:
    """A loaded causal language model, never trained, with hooks on its aux layers only."""

    def __init__(
        self, model: nn.Module, *, config: TargetConfig, model_config: PretrainedConfig
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.aux_layers = aux_layers(config, model_config.num_hidden_layers)
        self.device = next(model.parameters()).device
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # PreTrainedModel
        self._lm_head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._check_head()

    @classmethod
    def load(cls, config: TargetConfig) -> "TargetModel":
        """Load the target's weights onto its device.

        Raises:
            ConfigError: weights missing, or logits that are not `lm_head(last)`.

        """
        folder = weights.locate(config)
        model_config = read_model_config(config, folder)  # its errors before minutes of loading
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
        nn.Module.to(model, resolve_device(config.device))
        return cls(model, config=config, model_config=model_config)

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H] the head that turns `last` into logits."""
        weight: Tensor = self._lm_head.weight  # type: ignore[assignment]
        return weight

    @property
    def num_bytes(self) -> int:
        """Return the memory that the weights take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._model.parameters())

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a turn, by the model's generation config."""
        return _stop_ids(self._model.generation_config)  # type: ignore[arg-type]

    def logits(self, last: Tensor) -> Tensor:
        """Return the target's logits [..., V] for post-norm states [..., H]."""
        return self._lm_head(last)  # type: ignore[no-any-return]

    @property
    def decodes_batches(self) -> bool:
        """Whether texts of different lengths can share a cache: not where a window slides."""
        return not any(
            getattr(layer, "is_sliding", False)
            for layer in DynamicCache(config=self.model_config).layers
        )

    @torch.inference_mode()
    def forward_cached(
        self,
        input_ids: Tensor,
        past: DynamicCache | None,
        *,
        is_true: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, DynamicCache]:
        """Run ids [B, T] behind `past`; return (last [B, T, H], aux [B, T, 3H], grown cache).

        `is_true` [B, S + T] is False for entries that no token may see, `positions` [B, T] are the
        tokens' places in their texts; without them all S + T are tokens of texts of one length.
        """
        cache = DynamicCache(config=self.model_config) if past is None else past
        last, aux = self._run(
            input_ids,
            past_key_values=cache,
            use_cache=True,
            attention_mask=is_true,
            position_ids=positions,
        )
        return last, torch.cat(aux, dim=-1), cache

    def capture(
        self,
        samples: Sequence[TokenizedSample],
        *,
        recomputable: bool = False,
        on_unusable: OnUnusable | None = None,
    ) -> Iterator[HiddenStateSample]:
        """Yield the hidden states of `samples`, longest first, in batches of similar length.

        Batches are a pure function of the given samples: the same shard gives the same bytes.

        With `recomputable`, in the given order and one sequence at a time, the layers behind the
        last aux layer fed with its output as it is stored, in bfloat16: `PartialTarget` makes the
        early and the last states again from what is stored, bit for bit.

        A sample with a state that is not finite goes to `on_unusable`, with the reason.

        Raises:
            CorruptError: there is such a sample and nothing to take it; names it and the state.

        """
        batches: Iterable[Sequence[TokenizedSample]] = (
            ([sample] for sample in samples)
            if recomputable
            else batches_by_length(samples, batch_tokens=self.config.batch_tokens)
        )
        for batch in batches:
            yield from self._capture_batch(
                batch, on_unusable or self._refuse, round_late=recomputable
            )

    def _refuse(self, sample: TokenizedSample, reason: str) -> NoReturn:
        where = f" ({sample.location})" if sample.location else ""
        raise CorruptError(
            f"target {self.config.name}: sample {sample.sample_id}{where}: {reason}; check the "
            "weights, try dtype float32, or take this record out of the data set"
        )

    @torch.inference_mode()
    def _capture_batch(
        self, batch: Sequence[TokenizedSample], on_unusable: OnUnusable, *, round_late: bool
    ) -> Iterator[HiddenStateSample]:
        # Right padding needs no attention mask: under causal attention no real token sees it.
        ids = np.zeros((len(batch), max(len(sample) for sample in batch)), dtype=np.int64)
        for row, sample in enumerate(batch):
            ids[row, : len(sample)] = sample.input_ids
        last, aux = self._run(
            torch.from_numpy(ids).to(self.device), use_cache=False, round_late=round_late
        )
        stacked = torch.stack(aux, dim=2)
        for row, sample in enumerate(batch):
            argmax, logsumexp, logprob = self._teacher(last[row, : len(sample)])
            # As they are stored: what float32 holds can be too large for bfloat16.
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

    def _teacher(self, last: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return argmax (int32), logsumexp and log-probability of the argmax (float32), each [T].

        All are over the full vocabulary.
        """
        argmax, logsumexp, logprob = [], [], []
        for chunk in torch.split(last, _LOGITS_CHUNK_TOKENS):
            logits = self.logits(chunk).float()
            index = logits.argmax(dim=-1)
            argmax.append(index.to(torch.int32))
            logsumexp.append(logits.logsumexp(dim=-1))
            logprob.append(logits.gather(-1, index[:, None])[:, 0] - logsumexp[-1])
        return _joined(argmax), _joined(logsumexp), _joined(logprob)

    def _run(
        self,
        input_ids: Tensor,
        *,
        past_key_values: DynamicCache | None = None,
        use_cache: bool,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        round_late: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        with self._captured(round_late=round_late) as aux:
            outputs = self._decoder(
                input_ids=input_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
            )
        return outputs.last_hidden_state, [aux[layer] for layer in self.aux_layers]

    @contextmanager
    def _captured(self, *, round_late: bool) -> Iterator[dict[int, Tensor]]:
        """Collect the outputs of the aux layers of the forwards made inside, and nothing else.

        With `round_late`, the last of these layers hands its output on as bfloat16 holds it.
        """
        states: dict[int, Tensor] = {}
        layers: nn.ModuleList = self._decoder.layers  # type: ignore[assignment]

        def keep(
            layer: int, output: Tensor | tuple[Tensor, ...]
        ) -> Tensor | tuple[Tensor, ...] | None:
            state = output if isinstance(output, Tensor) else output[0]
            states[layer] = state
            if not round_late or layer != self.aux_layers[-1]:
                return None  # passes on as it is
            states[layer] = state.to(torch.bfloat16).to(state.dtype)
            return states[layer] if isinstance(output, Tensor) else (states[layer], *output[1:])

        hooks = [
            layers[layer].register_forward_hook(
                lambda _m, _i, output, layer=layer: keep(layer, output)
            )
            for layer in self.aux_layers
        ]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuse a model whose logits are not lm_head(last): the teacher would be wrong."""
        ids = torch.arange(1, 5, device=self.device).unsqueeze(0)
        expected = self._model(input_ids=ids, use_cache=False).logits
        last, _ = self._run(ids, use_cache=False)
        if not torch.allclose(self.logits(last), expected, rtol=1e-2, atol=1e-2):
            raise ConfigError(
                f"target {self.config.name}: its logits are not lm_head(last hidden state) (logit "
                "soft-capping or scaling?); this architecture is not supported yet"
            )


def _why_unusable(aux: Tensor, last: Tensor, logsumexp: NDArray[np.float32]) -> str:
    """Return what of a sample is NaN or infinite, empty if nothing is."""
    if not torch.isfinite(aux).all():
        return "its aux states are not finite"
    if not torch.isfinite(last).all():
        return "its last states are not finite"
    return "" if np.isfinite(logsumexp).all() else "its logits are not finite"


def _joined(chunks: Sequence[Tensor]) -> np.ndarray:
    joined: np.ndarray = torch.cat(list(chunks)).cpu().numpy()
    return joined


@torch.inference_mode()
def log_probabilities(
    lm_head: Tensor, last: NDArray[np.uint16], token_ids: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Return [K] log-probabilities (nats) of `token_ids` [K] after states `last` [K, H].

    In float32, from the head's bare weight [V, H], as training reads it, a slice of it at a time.
    """
    states = from_bfloat16_bits(last, dtype=torch.float32).to(lm_head.device)
    ids = torch.from_numpy(token_ids.astype(np.int64)).to(lm_head.device)
    wanted = (states * lm_head[ids].float()).sum(dim=-1)
    slices = [
        (states @ rows.float().T).logsumexp(dim=-1)
        for rows in torch.split(lm_head, _HEAD_CHUNK_ROWS)
    ]
    found: NDArray[np.float32] = (wanted - torch.stack(slices).logsumexp(dim=0)).cpu().numpy()
    return found


def batches_by_length(
    samples: Sequence[TokenizedSample], *, batch_tokens: int
) -> Iterator[list[TokenizedSample]]:
    """Yield batches, longest samples first, whose padded size stays within `batch_tokens`.

    A sample longer than the budget is a batch of its own. Ties are broken by sample id.
    """
    batch: list[TokenizedSample] = []
    for sample in sorted(samples, key=lambda sample: (-len(sample), sample.sample_id)):
        if batch and len(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch
