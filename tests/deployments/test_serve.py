"""`eyas serve --print`: the command of each engine for a run, and what cannot be served.

Servers that really run are in tests/flows/test_engines.py.
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.engine_report import (
    DraftSetting,
    EngineReport,
    EngineSpeed,
    SettingAcceptance,
)
from flows.reports.run_record import RunRecord, evaluation_name, write_stage
from flows.tasks.serve import KEY_VARIABLES
from tests import tiny
from tests.deployments.cli.terminal import Ended, eyas_here

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def run_path(
    tmp_path_factory: pytest.TempPathFactory, tiny_target_path: Path, prefect_server: str
) -> Path:
    """The folder of a run of a few steps."""
    assert prefect_server
    folder = tmp_path_factory.mktemp("serve")
    source = tiny.write_conversations(folder / "tiny.json", 20)
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"""
target: {{name: tiny, model: {tiny_target_path}, dtype: float32, device: cpu}}
dataset: {{name: facts, source: {source}, held_out_fraction: 0.2, max_length: 256}}
training: {{draft_vocab_size: 300, max_steps: 2, batch_tokens: 512}}
evaluation: {{num_prompts: 2, max_new_tokens: 4}}
"""
    )
    ended = eyas_here("run", "offline", str(recipe), "--home", str(folder / "home"))
    assert ended.returncode == 0, ended.stderr
    return folder / "home" / "runs" / "tiny-facts-main"


def printed(run_path: Path, *options: str) -> tuple[list[str], Ended]:
    """Return the words of the printed command."""
    ended = eyas_here("serve", str(run_path), "--print", *options)
    assert ended.returncode == 0, ended.stderr
    return shlex.split(ended.stdout), ended


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def measure(run_path: Path, engine: str, rates: dict[tuple[int, int], float]) -> None:
    """Write what an engine made of the draft: tokens per second by K and concurrency, plain 10."""
    own = RunRecord.read(run_path).evaluation
    assert own is not None
    settings = [DraftSetting(draft_tokens=length) for length in sorted({k for k, _ in rates})]
    found = EngineReport(
        engine=engine,
        dtype="float32",
        acceptances=tuple(SettingAcceptance(setting=s, report=own.trained) for s in settings),
        speeds=tuple(
            EngineSpeed(
                setting=DraftSetting(draft_tokens=length),
                concurrency=concurrency,
                tokens_per_second=rate,
                plain_tokens_per_second=10.0,
                num_matching=None,
                acceptance_length=1.5,
                prefill_share=0.0,
            )
            for (length, concurrency), rate in rates.items()
        ),
    )
    summary = replace(own, evaluation=EvaluationConfig(engine="vllm"), untrained=None, engine=found)
    write_stage(run_path / evaluation_name("vllm"), summary)


def test_the_command_of_sglang(run_path: Path) -> None:
    words, ended = printed(run_path, "--engine", "sglang", "--draft-tokens", "3", "--slots", "2")
    draft = Path(option(words, "--speculative-draft-model-path"))
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    assert option(words, "--speculative-algorithm") == "EAGLE3"
    assert option(words, "--speculative-num-steps") == "3"
    assert option(words, "--speculative-num-draft-tokens") == "4"
    assert option(words, "--speculative-eagle-topk") == "1"
    assert option(words, "--max-running-requests") == "2"
    assert option(words, "--host") == "127.0.0.1"
    assert option(words, "--context-length") == "512"
    assert json.loads((draft / "config.json").read_text())["draft_vocab_size"] == 300
    assert str(draft) in ended.stderr


def test_the_command_of_vllm_which_need_not_be_installed(run_path: Path) -> None:
    words, _ = printed(
        *(run_path, "--engine", "vllm", "--port", "8123", "--max-length", "256"),
        *("--set", "target.vllm_python=/nowhere/python"),
    )
    assert words[0] == "env"
    assert "/nowhere/python" in words
    assert option(words, "--port") == "8123"
    assert option(words, "--max-model-len") == "256"
    draft = json.loads(option(words, "--speculative-config"))
    assert draft["num_speculative_tokens"] == EvaluationConfig().draft_tokens
    assert Path(draft["model"], "model.safetensors").exists()
    assert "--no-enable-prefix-caching" not in words
    assert "--generation-config" not in words


def test_a_template_of_the_run_is_served(run_path: Path) -> None:
    template = "{{ messages[0]['content'] }}"
    own = ("--set", f"target.template.chat_template={json.dumps(template)}")
    refused = eyas_here("serve", str(run_path), "--print", "--engine", "vllm", *own)
    assert refused.returncode == 1  # the run was trained with another one
    assert "template" in refused.stderr


def test_an_export_is_made_once_for_each_checkpoint(run_path: Path) -> None:
    first, _ = printed(run_path, "--engine", "sglang")
    draft = Path(option(first, "--speculative-draft-model-path"))
    written = (draft / "model.safetensors").stat().st_mtime_ns
    earlier = draft.parents[1] / "step-00000001-0123456789ab-float32"
    earlier.mkdir()
    again, _ = printed(run_path, "--engine", "sglang")
    assert again == first
    assert (draft / "model.safetensors").stat().st_mtime_ns == written
    (draft / "model.safetensors").unlink()
    (draft / "config.json").unlink()
    draft.rmdir()
    draft.parent.rmdir()
    printed(run_path, "--engine", "sglang")
    assert (draft / "model.safetensors").exists()
    assert earlier.exists(), "a command that was printed may name it"


def test_what_bench_found_fastest_is_served(run_path: Path) -> None:
    measure(run_path, "vLLM", {(1, 1): 11.0, (1, 4): 9.0, (2, 1): 12.0, (2, 4): 8.0})
    words, ended = printed(run_path, "--engine", "vllm", "--slots", "3")
    assert json.loads(option(words, "--speculative-config"))["num_speculative_tokens"] == 2
    assert "2 drafted (measured with 1 prompt at a time: 2 drafted (1.20x))" in ended.stderr
    words, ended = printed(run_path, "--engine", "vllm", "--slots", "4")
    assert "--speculative-config" not in words
    assert "without the draft (at best 0.90x, with 1 drafted)" in ended.stderr
    words, _ = printed(run_path, "--engine", "vllm", "--slots", "4", "--draft-tokens", "7")
    assert json.loads(option(words, "--speculative-config"))["num_speculative_tokens"] == 7
    words, ended = printed(run_path, "--engine", "sglang")
    assert option(words, "--speculative-num-steps") == "5"
    assert "not measured on sglang" in ended.stderr


def test_figures_of_another_checkpoint_are_not_used(run_path: Path) -> None:
    measure(run_path, "vLLM", {(1, 1): 11.0})
    path = run_path / evaluation_name("vllm")
    path.write_text(path.read_text().replace('"checkpoint_step": ', '"checkpoint_step": 9'))
    words, ended = printed(run_path, "--engine", "vllm")
    assert json.loads(option(words, "--speculative-config"))["num_speculative_tokens"] == 5
    assert "run eyas bench again" in ended.stderr


@pytest.mark.parametrize(
    ("engine", "key", "how"),
    [
        ("vllm", None, "set VLLM_API_KEY to ask for a key"),
        ("vllm", "LLAMA_API_KEY", "set VLLM_API_KEY to ask for a key"),
        ("vllm", "VLLM_API_KEY", None),
        ("sglang", "VLLM_API_KEY", "add --api-key to the command to ask for a key"),
    ],
)
def test_a_server_for_everybody_without_a_key_is_warned_of(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, key: str | None, how: str | None
) -> None:
    for name in KEY_VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    if key is not None:
        monkeypatch.setenv(key, "confidential")
    words, ended = printed(run_path, "--engine", engine, "--host", "0.0.0.0")  # noqa: S104
    if how is None:
        assert "whoever" not in ended.stderr
    else:
        assert f"whoever reaches 0.0.0.0 can use this server: {how}" in ended.stderr
    assert "confidential" not in " ".join(words) + ended.stderr
    _, ended = printed(run_path, "--engine", engine)
    assert "whoever" not in ended.stderr


def test_figures_of_another_version_are_named(run_path: Path) -> None:
    path = run_path / evaluation_name("vllm")
    path.write_text('{"of": "another version"}')
    _, ended = printed(run_path, "--engine", "vllm")
    assert "evaluation-vllm.json is of another version of Eyas: run eyas bench" in ended.stderr
    checked = eyas_here("doctor", str(run_path))
    assert "evaluation-vllm.json: of another version of Eyas" in checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--engine", "llamacpp", "--p-min", "0.5", "--draft-tokens", "0"), "omit one of them"),
        (("--engine", "vllm", "--p-min", "0"), "--p-min is llama.cpp's"),
        (("--engine", "tgi"), "there is no engine 'tgi'; known: vllm, llamacpp, sglang"),
        (("--engine", "sglang"), "Eyas does not start SGLang: print its command with --print"),
        (("--engine", "vllm", "--p-min", "0.5"), "--p-min is llama.cpp's"),
        (("--engine", "sglang", "--max-length", "513"), "--max-length is 513, but target tiny has"),
        (
            ("--engine", "vllm", "--set", "target.vllm_python=/nowhere/python"),
            "/nowhere/python is no Python with vLLM",
        ),
    ],
)
def test_what_cannot_be_served_is_one_message(
    run_path: Path, options: tuple[str, ...], expected: str
) -> None:
    ended = eyas_here("serve", str(run_path), *options)
    assert ended.returncode == 1
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    ended = eyas_here("serve", "smollm2", "--engine", "sglang", "--print", "--home", str(tmp_path))
    assert ended.returncode == 1
    assert "smollm2-sharegpt-sample-main has no checkpoint yet" in ended.stderr
