"""What a run decodes while it trains: refused early if it cannot, and announced with its cost."""

from pathlib import Path

from prefect.logging import get_run_logger

from eagle_core.draft.config import DraftConfig
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.placement import decoding_bytes
from eagle_core.target.preflight import CapturedWhere
from eagle_core.training.config import TrainingConfig
from flows.bridge.draft_decoder import (
    DraftsToDecode,
    drafts_to_decode,
    require_decoding_place,
)
from flows.reports.units import human_bytes
from flows.tasks.prepare import check_runnable


def require_decodable(
    target: TargetConfig,
    training: TrainingConfig,
    *,
    max_length: int | None = None,
    captured: CapturedWhere = None,
) -> None:
    """Refuse what could not be decoded while the draft trains, if it is to be.

    Raises:
        ConfigError: this machine cannot decode the target, or its cache cannot drop tokens.

    """
    if not training.decode_every:
        return
    try:
        require_decoding_place(target, training)
        check_runnable(target, max_length=max_length, rolls_back=True, captured=captured)
    except ConfigError as error:
        raise ConfigError(
            f"training.decode_every is {training.decode_every}, but the target cannot be decoded "
            f"while the draft trains; to train without that, set it to 0: {error}"
        ) from error


def decoding_of_run(
    target: TargetConfig, training: TrainingConfig, draft: DraftConfig, held_out: Path
) -> DraftsToDecode | None:
    """Return what a run decodes while it trains, and log where; see `drafts_to_decode`."""
    found = drafts_to_decode(target, training, draft, held_out)
    if found is not None:
        get_run_logger().info(
            "%d held-out prompts are decoded every %d steps on device %s, and training %s; the "
            "target's weights take %s there",
            *(len(found.prompts), training.decode_every, found.target.device),
            *("waits" if found.place.is_awaited else "goes on meanwhile",),
            human_bytes(decoding_bytes(found.target)),
        )
    return found
