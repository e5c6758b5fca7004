"""A target in float64: no two of its logits tie by rounding, so texts must be equal."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel


def load_float64_target(path: Path) -> TargetModel:
    """Load the model in `path` on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(path).double()
    config = TargetConfig(name="tiny", model=str(path), dtype="float32", device="cpu")
    return TargetModel(model, config=config, model_config=model.config)
