"""FlexAttention's arithmetic in eager PyTorch, which torch does not offer for training on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from eagle_core.errors import ConfigError
from eagle_core.training.config import TttConfig
from eagle_core.training.flex_attention import require_agreement
from tests.eagle_core.training.test_trainer import run
from tests.eagle_core.training.test_ttt import require_equal_to_plain

pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore::UserWarning", "ignore::DeprecationWarning"
)
CPU = torch.device("cpu")
KERNEL = "eagle_core.training.flex_attention._compiled"


@pytest.fixture(autouse=True)
def eager_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(KERNEL, lambda: flex_attention.flex_attention)


def _changed(change: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]) -> Callable[..., Any]:
    """Return a kernel whose results are changed."""
    return lambda *args, **kwargs: change(*flex_attention.flex_attention(*args, **kwargs))


def _with_wrong_logsumexp(mixed: torch.Tensor, extra: Any) -> tuple[torch.Tensor, Any]:
    return mixed, extra._replace(lse=extra.lse * 1.05)


def _without_its_gradient(mixed: torch.Tensor, extra: Any) -> tuple[torch.Tensor, Any]:
    return mixed, extra._replace(lse=extra.lse.detach())


def _not_a_number(mixed: torch.Tensor, extra: Any) -> tuple[torch.Tensor, Any]:
    return mixed * float("nan"), extra


@pytest.mark.parametrize(
    ("seed", "variant"),
    [
        *((seed, {}) for seed in range(4)),
        (0, {"sliding_window": 2}),
        (1, {"sliding_window": 9, "num_hidden_layers": 2, "qk_norm": True}),
    ],
)
def test_it_equals_the_plain_formulation(
    seed: int, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle_core.training.ttt.fuses_attention", lambda *_: True)
    require_equal_to_plain(seed, [9, 2, 24, 7], TttConfig(), **variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("window", [None, 5000])
def test_a_right_kernel_is_taken(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, window: int | None
) -> None:
    require_agreement(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        dtype=dtype,
        device=CPU,
        window=window,
    )


@pytest.mark.parametrize("change", [_with_wrong_logsumexp, _without_its_gradient, _not_a_number])
def test_a_wrong_kernel_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]
) -> None:
    monkeypatch.setattr("eagle_core.training.optimizer_step.fuses_attention", lambda *_: True)
    monkeypatch.setattr(KERNEL, lambda: _changed(change))
    with pytest.raises(ConfigError, match=r"FlexAttention differs by .* set training\.compile"):
        run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
