"""A target that vLLM runs: its kernels, its tensor parallelism, its quantized weights.

vLLM hands over the outputs of the captured layers and that of the last one, before the final norm.
Norm and head are the target's own, loaded here. For each sequence, vLLM's own prediction of the
next token shows that they read the states as vLLM does.

Shapes: B batch, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from eagle_core.errors import ConfigError, TransientError
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine.vllm_process import EngineStates, VllmProcess
from eagle_core.target.engine.vllm_python import vllm_version
from eagle_core.target.final_head import FinalHead
from eagle_core.target.length_rope import LengthRope
from eagle_core.target.model import Captured
from eagle_core.target.model_config import aux_layers, read_model_config

_TOLERANCE_NATS = 2.0
"""Between vLLM's log-probability of a token and ours. Logits in bfloat16 have steps of up to 0.5;
another norm or head is off by several."""


class VllmTarget:
    """A causal language model in a process with vLLM; norm and head are here."""

    def __init__(
        self,
        norm: nn.Module,
        lm_head: Tensor,
        *,
        config: TargetConfig,
        model_config: PretrainedConfig,
    ) -> None:
        """Use `VllmTarget.load` instead."""
        self.config = config
        self.model_config = model_config
        self.aux_layers = aux_layers(config, model_config.num_hidden_layers)
        self.rope = LengthRope()  # vLLM's frequencies do not depend on a batch
        self.device = lm_head.device
        self.version = vllm_version(config)
        self._norm, self._lm_head = norm, lm_head
        self._process: VllmProcess | None = None

    @classmethod
    def load(cls, config: TargetConfig) -> "VllmTarget":
        """Load norm and head onto the target's device; vLLM starts with the first states.

        Raises:
            ConfigError: no weights, no vLLM, or an architecture without one final norm.

        """
        whole = read_model_config(config, weights.locate(config))
        end = FinalHead.load(config, cure="set target.backend to transformers")
        return cls(end.norm, end.lm_head, config=config, model_config=whole)

    @property
    def batch_tokens(self) -> int:
        """1: each sample is a batch, and vLLM makes batches of its own."""
        return 1

    @property
    def pass_tokens(self) -> int:
        """1: all weights are in memory for each batch."""
        return 1

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H] the head that turns `last` into logits."""
        return self._lm_head

    def logits(self, last: Tensor) -> Tensor:
        """Return the target's logits [..., V] for post-norm states [..., H]."""
        return nn.functional.linear(last.to(self.device), self._lm_head)

    def close(self) -> None:
        """End vLLM and free its memory; it starts again with the next states."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def run_each(
        self,
        batches: Iterable[Tensor],
        *,
        round_late: bool = False,
        layers: Sequence[int] | None = None,
    ) -> Iterator[Captured]:
        """Yield the last state and those of `layers` for each batch of ids [1, T].

        The same batches give the same bits: vLLM gets them together.

        Raises:
            ConfigError: vLLM cannot run this target, or no sequence that is so long; or its own
                log-probabilities are not those of the states.
            DiskError: there is no room for its states.
            TransientError: its process died; the next call starts it again.

        """
        if round_late:
            raise ConfigError(recompute_obstacle(self.config))
        captured = self.aux_layers if layers is None else tuple(layers)
        prompts = [ids[0].tolist() for ids in batches]
        try:
            process = self._process_for(captured)
            self._require_short(max(map(len, prompts), default=0), process.max_length)
            for prompt, found in zip(prompts, process.run(prompts), strict=True):
                yield self._captured(prompt, found, captured, process.outputs)
        except TransientError:
            self.close()
            raise

    def _process_for(self, captured: Sequence[int]) -> VllmProcess:
        """Return a process that captures these layers and the last state."""
        num_layers = self.model_config.num_hidden_layers
        outputs = tuple(sorted({*(layer + 1 for layer in captured), num_layers}))
        process = self._process
        if process is None or not process.is_idle or process.outputs != outputs:
            self.close()
            process = self._process = VllmProcess(
                self.config, weights.locate(self.config), device=self.device, outputs=outputs
            )
        return process

    def _require_short(self, longest: int, limit: int) -> None:
        if longest > limit:
            raise ConfigError(
                f"target {self.config.name}: a sample has {longest:,} tokens, but vLLM takes at "
                f"most {limit:,} here, by the target's positions or the size of its cache; lower "
                "dataset.max_length, or raise target.gpu_memory_utilization (on a CPU, the "
                "variable VLLM_CPU_KVCACHE_SPACE, in GiB)"
            )

    @torch.inference_mode()
    def _captured(
        self,
        prompt: Sequence[int],
        found: EngineStates,
        captured: Sequence[int],
        outputs: Sequence[int],
    ) -> Captured:
        states = found.states.to(self.device)
        by_output = {output: states[None, :, place] for place, output in enumerate(outputs)}
        last: Tensor = self._norm(by_output[self.model_config.num_hidden_layers])
        logits = self.logits(last[0, -1]).float()
        logprob = float(logits[found.token] - logits.logsumexp(dim=-1))
        if not abs(logprob - found.logprob) <= _TOLERANCE_NATS and torch.isfinite(logits).all():
            raise ConfigError(
                f"target {self.config.name}: after {len(prompt)} tokens vLLM gives token "
                f"{found.token} a log-probability of {found.logprob:.2f}, but its states give "
                f"{logprob:.2f}: vLLM {self.version} reads norm or head of this architecture in "
                "another way; set target.backend to transformers"
            )
        return last, [by_output[layer + 1] for layer in captured]


def recompute_obstacle(config: TargetConfig) -> str:
    """Return why a store of such a target cannot omit states."""
    return (
        f"target {config.name}: states that vLLM computes cannot be recomputed to the bit by "
        "transformers; set store.recompute to false, or target.backend to transformers"
    )
