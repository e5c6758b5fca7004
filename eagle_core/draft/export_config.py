"""Settings for exporting a draft."""

from typing import Literal

from pydantic import Field

from eagle_core.config_model import ConfigModel

TensorLayout = Literal["serving", "speculators"]
ExportLayout = Literal["serving", "speculators", "gguf"]


class ExportConfig(ConfigModel):
    """How to export a trained draft for serving."""

    layouts: tuple[ExportLayout, ...] = Field(
        default=("serving", "speculators"),
        min_length=1,
        description="serving: for SGLang, vLLM and TensorRT-LLM; speculators: for the speculators "
        "library; gguf: for llama.cpp, whose converter writes it. Each layout is written to a "
        "folder of that name.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Dtype of the exported weights; training keeps float32."
    )
    with_embedding: bool = Field(
        default=False,
        description="Also write the target's embedding into the serving layout. Engines share the "
        "target's own, so this only makes the file larger. A draft of another width has its own, "
        "which is always written.",
    )
    speculative_tokens: int = Field(
        default=5,
        gt=0,
        description="Default number of drafted tokens per round, for the speculators config.",
    )
    verifier: str | None = Field(
        default=None,
        description="Hugging Face id or folder of the target, for the speculators config; empty "
        "means the target's own `model`.",
    )
