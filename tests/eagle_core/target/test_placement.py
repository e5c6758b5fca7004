"""Which targets stay whole, and how many tokens pass through a streamed layer together."""

from pathlib import Path

import pytest
import torch
from transformers import DiffLlamaConfig

from eagle_core.errors import ConfigError
from eagle_core.safetensors_files import TensorHeader, read_headers
from eagle_core.target.config import TargetConfig
from eagle_core.target.layerwise.streamed import StreamedTarget
from eagle_core.target.memory import free_memory
from eagle_core.target.memory.free_memory import Memory, MemoryShare
from eagle_core.target.memory.target_bytes import TargetBytes
from eagle_core.target.model import TargetModel
from eagle_core.target.model_config import read_model_config
from eagle_core.target.placement import (
    Chosen,
    choose_placement,
    load_decoding_target,
    load_target,
    placement_of,
    why_not_decoded,
)
from tests.eagle_core.target.layerwise.test_streamed import SIZES, write_model

GIB = 2**30
LLAMA_70B = TargetBytes(
    ends=4 * GIB,
    layers=(int(1.594 * GIB),) * 80,
    layers_on_disk=128 * GIB,
    state=16384,
    logits=GIB,
)
LAYER, STATE, BATCH = 1.594, 16384 / GIB, 4.0
"""In GiB; a batch has 8,192 tokens of 24 states each, and logits."""


def choose(*gpus: float, main: float = 512, **settings: object) -> Chosen:
    config = TargetConfig(name="big", model="org/big").model_copy(update=settings)
    free = Memory(main=int(main * GIB), gpus=tuple(int(gpu * GIB) for gpu in gpus))
    return choose_placement(config, LLAMA_70B, free)


def test_a_target_that_fits_stays_whole() -> None:
    assert choose(180).placement == "whole"
    assert choose(main=180).placement == "whole"
    assert choose(180).reason == "its weights and a batch take 135.5 GiB, and 162.0 GiB may be used"


def test_one_that_fits_on_several_gpus_is_spread() -> None:
    assert choose(80, 80).placement == "spread"
    assert choose(76, 76).placement == "streamed"
    assert choose(24).placement == "streamed"
    assert choose(24, 24, placement="spread").placement == "spread"


@pytest.mark.parametrize("gpus", [(), (80,)])
def test_spread_needs_gpus(gpus: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="spread needs two or more"):
        choose(*gpus, placement="spread")


def test_a_streamed_pass_has_as_many_tokens_as_fit() -> None:
    small, large = choose(24), choose(80)
    assert small.pass_bytes == 128 * GIB
    assert 80_000 < small.group_tokens < large.group_tokens
    assert choose(24, stream_tokens=50_000).group_tokens == 50_000
    assert large.group_tokens == 524_288
    assert choose(80, stream_tokens=600_000).group_tokens == 600_000
    # Main memory holds three layers, and three aux states and the last one of each token.
    assert choose(24, main=10).group_tokens == pytest.approx((9 - 3 * LAYER) / (4 * STATE), abs=1)
    # The CPU's has all.
    room = 0.9 * 24 - (4 + 3 * LAYER + BATCH)
    assert choose(main=24).group_tokens == pytest.approx(room / (6.5 * STATE), abs=1)


def test_states_wait_in_main_memory_if_the_gpu_holds_few_tokens() -> None:
    assert not choose(24).states_wait_in_main
    small = choose(14)
    assert small.states_wait_in_main
    room = 0.9 * 14 - (4 + 2 * LAYER + BATCH)
    assert small.group_tokens == pytest.approx(room / (1.5 * STATE), abs=1)
    more = choose(24, stream_tokens=400_000)
    assert more.states_wait_in_main
    assert more.group_tokens == 400_000
    # Each token takes more of main memory then: not if that is what there is least of.
    assert not choose(14, main=6.3).states_wait_in_main


def test_what_is_set_is_done() -> None:
    assert choose(180, placement="streamed").placement == "streamed"
    assert choose(24, placement="whole").placement == "whole"


def test_a_device_without_room_for_two_layers_is_named_with_the_figures() -> None:
    said = (
        r"not even .* take 11\.2 GiB, and 7\.2 GiB .*; in main memory .* 5\.3 GiB, and 460\.8 GiB"
    )
    with pytest.raises(ConfigError, match=said):
        choose(8)


@pytest.fixture
def tiny_target(tiny_target_path: Path) -> TargetConfig:
    return TargetConfig(name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu")


def test_decoding_needs_the_whole_target(tiny_target: TargetConfig) -> None:
    assert why_not_decoded(tiny_target) == ""
    streamed = tiny_target.model_copy(update={"placement": "streamed"})
    with pytest.raises(ConfigError, match="placement streamed would load again each time"):
        load_decoding_target(streamed)
    spread = tiny_target.model_copy(update={"placement": "spread"})
    with pytest.raises(ConfigError, match="may use no GPU: spread needs two or more"):
        load_decoding_target(spread)


def test_decoding_goes_by_the_memory_that_there_is(
    tiny_target: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "free", lambda *_args, **_named: Memory(main=2**17))
    assert isinstance(load_decoding_target(tiny_target), TargetModel)
    monkeypatch.setattr(Memory, "all", lambda *_args, **_named: Memory(main=2**17))
    with pytest.raises(ConfigError, match="all layers for each token, but they do not fit"):
        load_decoding_target(tiny_target)
    monkeypatch.setattr(Memory, "all", lambda *_args, **_named: Memory(main=1, gpus=(2**40,)))
    assert why_not_decoded(tiny_target) == ""


def test_decoding_in_float32_on_a_cpu_takes_the_memory_of_float32(
    tiny_target: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dtype that is left open is bfloat16 for states here, and float32 to decode."""
    units = "eagle_core.target.model_config.multiplies_bfloat16"
    monkeypatch.setattr(units, lambda _device: True)
    undecided = tiny_target.model_copy(update={"dtype": "auto"})
    folder = Path(undecided.model)
    in_bfloat16 = TargetBytes.of(
        undecided, read_model_config(undecided, folder), read_headers(folder, remedy="")
    )
    room = Memory(main=int(1.5 * in_bfloat16.whole))
    monkeypatch.setattr(Memory, "all", lambda *_args, **_named: room)
    assert "they do not fit" in why_not_decoded(undecided)
    assert why_not_decoded(undecided.model_copy(update={"dtype": "bfloat16"})) == ""


def _memory_that_lacks_a_little(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(config.model)
    model_config = read_model_config(config, folder)
    sizes = TargetBytes.of(config, model_config, read_headers(folder, remedy=""))
    free = int((sizes.whole + sizes.batch(config.batch_tokens)) / 0.9) - 100
    monkeypatch.setattr(Memory, "free", lambda *_args, **_named: Memory(main=free))


def test_by_itself_a_target_is_streamed_where_it_does_not_fit(
    tiny_target: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_target.model_copy(update={"batch_tokens": 64})
    assert isinstance(load_target(config), TargetModel)
    _memory_that_lacks_a_little(config, monkeypatch)
    assert isinstance(load_target(config), StreamedTarget)


def test_one_that_cannot_be_streamed_is_tried_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_model(DiffLlamaConfig(**SIZES), tmp_path).model_copy(
        update={"attention": "eager"}
    )
    _memory_that_lacks_a_little(config, monkeypatch)
    assert isinstance(load_target(config), TargetModel)
    assert "target small may not fit: its weights and a batch take" in caplog.text


def test_the_other_gpus_are_not_asked_if_the_first_suffices(
    tiny_target: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    gpus = (2**40, 2**40)

    def free(*_args: object, most_gpus: int | None = None) -> Memory:
        asked.append(most_gpus)
        return Memory(main=2**40, gpus=gpus[:most_gpus])

    monkeypatch.setattr(Memory, "free", free)
    assert placement_of(tiny_target).placement == "whole"
    assert asked == [1]
    gpus = (2**22, 2**40)
    assert placement_of(tiny_target).placement == "spread"
    assert asked == [1, 1, None]


def test_a_process_takes_its_share() -> None:
    cpu = torch.device("cpu")
    alone, there = Memory.free(cpu), Memory.all(cpu)
    assert 0 < alone.main <= there.main
    assert alone.gpus == ()
    assert alone.on_device == alone.main
    assert Memory.free(cpu, MemoryShare(main=1000)).main == 1000


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    assert free_memory._within_limit(50, 100, tmp_path) == (50, 100)
    (tmp_path / "memory.max").write_text("40\n")
    (tmp_path / "memory.current").write_text("30\n")
    (tmp_path / "memory.stat").write_text("anon 10\ninactive_file 11\nactive_file 4\n")
    assert free_memory._within_limit(50, 100, tmp_path) == (25, 40)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory._within_limit(50, 100, tmp_path) == (50, 100)


def test_sizes_are_those_in_memory() -> None:
    headers = {
        "model.embed_tokens.weight": TensorHeader(dtype="F32", shape=(100, 8)),
        "model.norm.weight": TensorHeader(dtype="BF16", shape=(8,)),
        "model.layers.0.mlp.up_proj.weight": TensorHeader(dtype="F32", shape=(16, 8)),
        "model.layers.1.mlp.up_proj.weight": TensorHeader(dtype="F8_E4M3", shape=(16, 8)),
        "model.layers.1.mlp.up_proj.weight_scale_inv": TensorHeader(dtype="F32", shape=(1, 1)),
    }

    class Config:
        hidden_size = 8
        vocab_size = 100

    config = TargetConfig(name="small", model="org/small", dtype="bfloat16")
    sizes = TargetBytes.of(config, Config(), headers)  # type: ignore[arg-type]
    assert sizes == TargetBytes(
        ends=1616, layers=(256, 130), layers_on_disk=644, state=16, logits=1024 * 100 * 12
    )
    assert sizes.whole == 2002
