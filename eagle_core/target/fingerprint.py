"""Fingerprint of everything that determines the bytes of a target's hidden states."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine.vllm_python import vllm_version
from eagle_core.target.model_config import aux_layers, read_model_config, with_dtype

CAPTURE_VERSION = 1
"""Incremented whenever the same weights and ids could give other states, rounding apart."""
NORM_CONVENTION = "post_norm"


def fingerprint_fields(config: TargetConfig, folder: Path) -> dict[str, str]:
    """Return the inputs that determine the bytes of the hidden states, by readable name.

    Raises:
        ConfigError: the backend is vLLM, and its version is not known here.

    """
    return {
        **_of_backend(config),
        "capture_version": str(CAPTURE_VERSION),
        "dtype": with_dtype(config).dtype,
        **fields_of_draft(config, folder),
    }


def fields_of_draft(config: TargetConfig, folder: Path) -> dict[str, str]:
    """Return the fields that must be those of the target that a draft was trained for.

    Others affect only states: a draft serves its target in any arithmetic, with any kernels.
    """
    model_config = read_model_config(config, folder)
    return {
        "aux_layers": json.dumps(aux_layers(config, model_config.num_hidden_layers)),
        "norm_convention": NORM_CONVENTION,
        "weights": json.dumps(weights.weight_digests(folder), sort_keys=True),
    }


def _of_backend(config: TargetConfig) -> dict[str, str]:
    if config.backend == "transformers":
        return {"attention": config.attention}
    return {
        "backend": f"vllm {vllm_version(config)}",
        "quantization": config.quantization or "as stored",
    }


def fingerprint(fields: Mapping[str, str]) -> str:
    """Return the sha256 over the sorted compact JSON of `fields`."""
    text = json.dumps(dict(fields), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
