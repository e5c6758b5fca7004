"""The engines by name."""

from eagle_core.serving.engine import Engine
from eagle_core.serving.llamacpp.server import LlamaCppEngine
from eagle_core.serving.served import EngineName
from eagle_core.serving.vllm import VllmEngine
from eagle_core.target.config import TargetConfig


def find_engine(name: EngineName, config: TargetConfig) -> Engine:
    """Return an engine that is installed here, for a target.

    Raises:
        ConfigError: it is not; says how to install it.

    """
    return VllmEngine(config) if name == "vllm" else LlamaCppEngine(config)
