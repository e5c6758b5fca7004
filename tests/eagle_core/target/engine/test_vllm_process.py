"""How the process of an engine is started, asked, and missed when it is gone."""

import sys
from pathlib import Path

import psutil
import pytest
import torch

from eagle_core.errors import ConfigError, CorruptError, TransientError
from eagle_core.samples import TokenizedSample
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.engine import vllm_process
from eagle_core.target.engine.vllm_process import VllmProcess, require_vllm, vllm_version
from eagle_core.target.engine.vllm_target import VllmTarget
from eagle_core.target.fingerprint import fingerprint_fields
from tests.eagle_core.target.engine.answering import DIES, FAILS, HIDDEN, LATE
from tests.eagle_core.target.test_streamed import samples
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
        vllm_python=sys.executable,
        vllm_version="0.1",
    )


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
    assert list(folder.iterdir()) == []
    number = process._process.pid
    process.close()
    assert not folder.exists()
    assert not psutil.pid_exists(number)


@pytest.mark.parametrize(
    ("prompt", "reason"), [([DIES], "killed by signal 9"), ([FAILS], "OSError: disk full")]
)
def test_a_process_that_dies_may_be_started_again(
    config: TargetConfig, tmp_path: Path, prompt: list[int], reason: str
) -> None:
    process = start(config)
    with pytest.raises(TransientError, match=f"target tiny: the process of vLLM ended .{reason}"):
        list(process.run([[3], prompt]))
    assert list(tmp_path.glob("eyas-vllm-*")) == []


def test_a_target_that_it_cannot_run_is_refused_with_its_reason(config: TargetConfig) -> None:
    impossible = config.model_copy(update={"quantization": "impossible"})
    with pytest.raises(ConfigError) as raised:
        start(impossible)
    assert str(raised.value) == (
        "target tiny: vLLM does not run it: ValueError: no such method; correct the cause, or set "
        "target.backend to transformers"
    )


def test_what_it_printed_last_is_quoted_if_it_dies_without_a_reason(config: TargetConfig) -> None:
    with pytest.raises(ConfigError, match=r"status 5; correct .*\n  no such library$"):
        start(config.model_copy(update={"quantization": "unsaid"}))


def test_it_ends_with_what_started_it(config: TargetConfig) -> None:
    process = start(config)
    number = process._process.pid
    del process
    wait_for(lambda: not psutil.pid_exists(number), what="its end")


def test_states_that_mean_something_else_to_vllm_are_refused(config: TargetConfig) -> None:
    """Its own log-probability of a token is far from that of the states."""
    target = VllmTarget.load(config)
    with pytest.raises(CorruptError, match=r"vLLM gives token 1 a log-probability of -90\.00"):
        list(capture_states(target, samples([5])))
    target.close()


def test_states_that_nobody_read_are_not_taken_for_later_ones(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle_core.target.engine.vllm_target._TOLERANCE_NATS", 1e9)
    target = VllmTarget.load(config)
    first = target.run_each([torch.tensor([[3, 3]]), torch.tensor([[4, 4]])])
    next(first)
    (_, aux), *more = target.run_each([torch.tensor([[5, 6]])])
    assert not more
    assert aux[0][0, :, 0].tolist() == [5, 6]
    target.close()


def test_a_sample_that_is_too_long_for_its_memory_is_named_before_it_runs(
    config: TargetConfig,
) -> None:
    target = VllmTarget.load(config)
    sample: TokenizedSample = samples([30])[0]
    with pytest.raises(ConfigError, match="a sample has 30 tokens, but vLLM has memory for 20"):
        list(capture_states(target, [sample]))
    target.close()


def test_its_version_is_part_of_the_fingerprint_and_may_be_given_where_it_is_not_installed(
    config: TargetConfig,
) -> None:
    fields = fingerprint_fields(config, Path(config.model))
    assert fields["backend"] == "vllm 0.1"
    assert fields["quantization"] == "as stored"
    assert "attention" not in fields
    quantized = config.model_copy(update={"quantization": "fp8"})
    assert fingerprint_fields(quantized, Path(config.model))["quantization"] == "fp8"
    plain = TargetConfig(name="tiny", model=config.model)
    assert "backend" not in fingerprint_fields(plain, Path(config.model))
    nowhere = config.model_copy(update={"vllm_version": None, "vllm_python": "no/such/python"})
    with pytest.raises(ConfigError, match="no/such/python is no Python with vLLM: make one"):
        vllm_version(nowhere)
    with pytest.raises(ConfigError, match="is no Python with vLLM"):
        require_vllm(config)  # a version is not enough to run it


def test_another_version_than_the_given_one_is_refused(
    config: TargetConfig, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.2\n")
    python.chmod(0o755)
    installed = config.model_copy(update={"vllm_python": str(python)})
    with pytest.raises(ConfigError, match=f"vllm_version is 0.1, but {python} has vLLM 0.2"):
        vllm_version(installed)
    assert vllm_version(installed.model_copy(update={"vllm_version": None})) == "0.2"


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"remove target\.placement"):
        TargetConfig(name="tiny", model="x", backend="vllm", placement="streamed")
    with pytest.raises(ValueError, match=r"set target\.backend to vllm"):
        TargetConfig(name="tiny", model="x", quantization="fp8")
