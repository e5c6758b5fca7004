"""The engines by name."""

from eagle_core.errors import ConfigError
from eagle_core.serving.engine import Engine
from eagle_core.serving.llamacpp.server import LlamaCppEngine
from eagle_core.serving.served import EngineName
from eagle_core.serving.vllm import VllmEngine
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import resolve_device


def find_engine(name: EngineName, config: TargetConfig) -> Engine:
    """Return an engine that is installed here, for a target.

    Raises:
        ConfigError: it is not; says how to install it.

    """
    return VllmEngine(config) if name == "vllm" else LlamaCppEngine(config)


def find_any_engine(config: TargetConfig) -> EngineName:
    """Return the engine that is installed here; of both, llama.cpp for a CPU and vLLM for a GPU.

    Raises:
        ConfigError: none is; says how to install each.

    """
    is_on_cpu = resolve_device(config.device).type == "cpu"
    names: tuple[EngineName, ...] = ("llamacpp", "vllm") if is_on_cpu else ("vllm", "llamacpp")
    missing = []
    for name in names:
        try:
            find_engine(name, config)
        except ConfigError as error:
            missing.append(f"{name}: {error}")
        else:
            return name
    raise ConfigError("no engine is installed here. " + ". ".join(missing))
