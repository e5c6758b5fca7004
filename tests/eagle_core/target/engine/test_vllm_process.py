"""How the process of an engine is started, asked, and missed when it is gone."""

import sys
from pathlib import Path

import psutil
import pytest
import torch

from eagle_core.errors import ConfigError, DiskError, TransientError
from eagle_core.samples import TokenizedSample
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine import vllm_process, vllm_python
from eagle_core.target.engine.vllm_process import VllmProcess
from eagle_core.target.engine.vllm_python import require_vllm, vllm_version
from eagle_core.target.engine.vllm_target import VllmTarget
from eagle_core.target.fingerprint import fingerprint_fields
from eagle_core.target.preflight import check_target
from tests.eagle_core.target.engine.answering import DIES, FAILS, FILLS, HIDDEN, LATE, SWELLS
from tests.eagle_core.target.layerwise.test_streamed import samples
from tests.tiny import write_target
from tests.waiting import wait_for

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TargetConfig:
    """A target whose engine is the program beside this file."""
    monkeypatch.setattr(vllm_process, "_PROGRAM", Path(__file__).with_name("answering.py"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return TargetConfig(
        name="tiny",
        model=str(write_target(tmp_path / "target")),
        dtype="float32",
        device="cpu",
        backend="vllm",
        vllm_python=str(python_with_vllm(tmp_path, "0.1")),
    )


def python_with_vllm(folder: Path, version: str) -> Path:
    """Write a program that says it has vLLM, and else is the Python of this process."""
    path = folder / f"python-{version}"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && {{ echo {version}; exit; }}\nexec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return path


def start(config: TargetConfig) -> VllmProcess:
    return VllmProcess(config, Path(config.model), device=CPU, outputs=(2, 4))


def test_states_come_in_the_order_of_their_prompts_and_leave_no_file(
    config: TargetConfig, tmp_path: Path
) -> None:
    process = start(config)
    (folder,) = tmp_path.glob("eyas-vllm-*")
    prompts = [[LATE, 2], [3, 4, 5], [LATE, 1, 1]]
    found = list(process.run(prompts))
    assert [one.states[:, 0, 0].tolist() for one in found] == prompts
    assert [one.states.shape for one in found] == [(2, 2, HIDDEN), (3, 2, HIDDEN), (3, 2, HIDDEN)]
    assert [(one.token, one.logprob) for one in found] == [(1, -90.0)] * 3
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    number = process._process.pid
    process.close()
    assert not folder.exists()
    assert not psutil.pid_exists(number)


@pytest.mark.parametrize(
    ("prompt", "kind", "reason"),
    [
        ([DIES], TransientError, r"killed by signal 9\); no committed shard is lost"),
        ([FAILS], TransientError, r"RuntimeError: a device failed\); no committed shard is lost"),
        ([FILLS], DiskError, r"its states cannot be written: full\); make room"),
        ([SWELLS], ConfigError, r"OutOfMemoryError: CUDA\); lower target\.gpu_memory_utilization"),
    ],
)
def test_what_ended_it_decides_what_to_do(
    config: TargetConfig, tmp_path: Path, prompt: list[int], kind: type[Exception], reason: str
) -> None:
    process = start(config)
    with pytest.raises(kind, match=f"target tiny: the process of vLLM ended .*{reason}"):
        list(process.run([[3], prompt]))
    assert list(tmp_path.glob("eyas-vllm-*")) == []


def test_a_reason_counts_also_if_the_process_then_dies_of_a_signal(config: TargetConfig) -> None:
    with pytest.raises(ConfigError, match="vLLM does not run it: ValueError: no such method"):
        start(config.model_copy(update={"quantization": "impossible, and aborts"}))


def test_a_first_prompt_that_fails_is_a_target_that_it_cannot_run(config: TargetConfig) -> None:
    """As of kernels that refuse the type of its weights: another try would fail as well."""
    process = start(config)
    with pytest.raises(ConfigError, match="vLLM does not run it: RuntimeError: a device failed"):
        list(process.run([[FAILS]]))


def test_a_killed_start_is_tried_again(config: TargetConfig) -> None:
    with pytest.raises(TransientError, match="killed by signal 9"):
        start(config.model_copy(update={"quantization": "killed"}))


def test_a_target_that_it_cannot_run_is_refused_with_its_reason(config: TargetConfig) -> None:
    impossible = config.model_copy(update={"quantization": "impossible"})
    with pytest.raises(ConfigError) as raised:
        start(impossible)
    assert str(raised.value) == (
        "target tiny: vLLM does not run it: ValueError: no such method; correct the cause, or set "
        "target.backend to transformers\n  see the log: some library is missing"
    )


def test_what_it_printed_last_is_quoted_if_it_dies_without_a_reason(config: TargetConfig) -> None:
    with pytest.raises(ConfigError, match=r"status 5; correct .*\n  no such library$"):
        start(config.model_copy(update={"quantization": "unsaid"}))


def test_it_ends_with_what_started_it(config: TargetConfig) -> None:
    process = start(config)
    number = process._process.pid
    del process
    wait_for(lambda: not psutil.pid_exists(number), what="its end")


def test_it_sees_the_gpu_of_its_target(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = vllm_python._visible_gpus
    name = vllm_python.VISIBLE_DEVICES
    monkeypatch.delenv(name, raising=False)
    assert visible(config, CPU) == {name: ""}
    assert visible(config, torch.device("cuda")) == {}
    assert visible(config, torch.device("cuda", 1)) == {name: "1"}
    monkeypatch.setenv(name, "4,GPU-7f")
    assert visible(config, torch.device("cuda", 1)) == {name: "GPU-7f"}
    spread = config.model_copy(update={"tensor_parallel": 2})
    with pytest.raises(ConfigError, match=r"set target\.device to cuda"):
        visible(spread, torch.device("cuda", 1))


def test_states_that_mean_something_else_to_vllm_are_refused(config: TargetConfig) -> None:
    """Its own log-probability of a token is far from that of the states."""
    target = VllmTarget.load(config)
    with pytest.raises(ConfigError, match=r"vLLM gives token 1 a log-probability of -90\.00"):
        list(capture_states(target, samples([5])))
    target.close()


def test_states_that_nobody_read_are_not_taken_for_later_ones(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle_core.target.engine.vllm_target._TOLERANCE_NATS", 1e9)
    target = VllmTarget.load(config)
    first = target.run_each([torch.tensor([[3, 3]]), torch.tensor([[4, 4]])])
    next(first)
    prompts = [[5, 6], [7, 8]]  # the second has the place of the unread one
    found = target.run_each([torch.tensor([prompt]) for prompt in prompts])
    assert [aux[0][0, :, 0].tolist() for _, aux in found] == prompts
    target.close()


def test_a_sample_that_is_too_long_for_its_memory_is_named_before_it_runs(
    config: TargetConfig,
) -> None:
    target = VllmTarget.load(config)
    sample: TokenizedSample = samples([30])[0]
    with pytest.raises(ConfigError, match="a sample has 30 tokens, but vLLM takes at most 20 here"):
        list(capture_states(target, [sample]))
    target.close()


def test_its_version_is_part_of_the_fingerprint(config: TargetConfig) -> None:
    fields = fingerprint_fields(config, Path(config.model))
    assert fields["backend"] == "vllm 0.1"
    assert fields["quantization"] == "as stored"
    assert "attention" not in fields
    quantized = config.model_copy(update={"quantization": "fp8"})
    assert fingerprint_fields(quantized, Path(config.model))["quantization"] == "fp8"
    plain = TargetConfig(name="tiny", model=config.model)
    assert "backend" not in fingerprint_fields(plain, Path(config.model))


def test_where_it_is_not_installed_a_version_is_enough_to_train_but_not_to_run(
    config: TargetConfig, tmp_path: Path
) -> None:
    nowhere = config.model_copy(update={"vllm_python": "no/such/python"})
    with pytest.raises(ConfigError, match="no/such/python is no Python with vLLM: make one"):
        vllm_version(nowhere)
    given = nowhere.model_copy(update={"vllm_version": "0.3"})
    assert vllm_version(given) == "0.3"
    target = VllmTarget.load(given)
    with pytest.raises(ConfigError, match="is no Python with vLLM"):
        list(capture_states(target, samples([5])))
    assert list(tmp_path.glob("eyas-vllm-*")) == []


def test_only_the_version_of_the_store_may_add_to_it(config: TargetConfig) -> None:
    made_by_another = config.model_copy(update={"vllm_version": "0.0"})
    assert vllm_version(made_by_another) == "0.0"
    with pytest.raises(ConfigError, match=r"vLLM 0\.0 is expected, .* has vLLM 0\.1: install"):
        require_vllm(made_by_another)


def test_a_target_is_checked_for_what_will_run_it(config: TargetConfig) -> None:
    """Decoding is by transformers: it needs no vLLM, and the kernels that are set."""
    nowhere = config.model_copy(update={"vllm_python": "no/such/python"})
    check_target(nowhere, rolls_back=True, captured=None)
    check_target(nowhere, max_length=64, captured="on workers")
    with pytest.raises(ConfigError, match="is no Python with vLLM"):
        check_target(nowhere, max_length=64)
    flash = config.model_copy(update={"attention": "flash_attention_2"})
    check_target(flash, max_length=64)
    with pytest.raises(ConfigError, match="flash"):
        check_target(flash, max_length=64, rolls_back=True)
    with pytest.raises(ConfigError, match="max_length"):
        check_target(config, max_length=512)  # of as many positions, with a token to write


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"remove target\.placement"):
        TargetConfig(name="tiny", model="x", backend="vllm", placement="streamed")
    for setting in ({"quantization": "fp8"}, {"tensor_parallel": 2}):
        with pytest.raises(ValueError, match=r"set target\.backend to vllm"):
            TargetConfig.model_validate({"name": "tiny", "model": "x", **setting})
