"""The memory that training a draft needs, for people who ask whether it fits."""

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.settings import DraftSettings
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.memory.free_memory import Memory
from eagle_core.target.model_config import read_model_config, resolve_device
from eagle_core.training.config import TrainingConfig
from eagle_core.training.precision import dtype_name, multiplying_dtype
from eagle_core.training.step_memory import TrainingMemory, training_memory
from flows.reports.table import Row
from flows.reports.units import human_bytes


def training_memory_row(
    target: TargetConfig, draft: DraftSettings, training: TrainingConfig
) -> Row:
    """Return what each process of a training needs on this machine, and whether there is as much.

    Raises:
        ConfigError: the settings of the draft contradict each other.

    """
    model = read_model_config(target, weights.locate_description(target))
    config = DraftConfig.from_target(
        model, draft_vocab_size=training.draft_vocab_size, settings=draft
    )
    device = resolve_device(target.device)
    dtype = multiplying_dtype(training.dtype, device)
    needed, light = (
        training_memory(config, training.model_copy(update=change), dtype, device)
        for change in ({}, {"gradient_checkpointing": True})
    )
    there = Memory.all(device).on_device
    return "memory for training", describe(
        needed, light, there, training=training, where=f"{dtype_name(dtype)} on {device}"
    )


def describe(
    needed: TrainingMemory,
    light: TrainingMemory,
    there: int,
    *,
    training: TrainingConfig,
    where: str,
) -> str:
    """Return a sentence about memory.

    Args:
        needed: of one process, with the settings as they are.
        light: the same with gradient checkpointing.
        there: bytes of the device.
        training: the settings.
        where: dtype and device.

    """
    parts = (
        f"weights {human_bytes(needed.weights)}, gradients {human_bytes(needed.gradients)}, "
        f"optimizer {human_bytes(needed.optimizer)}, a batch of {training.batch_tokens:,} tokens "
        f"{human_bytes(needed.batch)}"
    )
    text = f"at most {human_bytes(needed.total)} per process ({parts}; {where})"
    if needed.total <= there:
        return text
    text += f"; more than the {human_bytes(there)} there are: "
    if light.total - light.batch > there:
        return (
            f"{text}take a smaller draft (draft.hidden_size, training.draft_vocab_size), a larger "
            "device, or several with training.sharding=shard, which divides the optimizer"
        )
    smaller = "a smaller training.batch_tokens"
    if training.gradient_checkpointing or light.total > there:
        return (
            f"{text}set {smaller} (with training.gradient_checkpointing=true this one takes "
            f"{human_bytes(light.total)})"
        )
    return (
        f"{text}set training.gradient_checkpointing=true ({human_bytes(light.total)}), or {smaller}"
    )
