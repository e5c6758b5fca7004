"""The draft of a run, served with its target by an engine on this machine, or the command for that.

The draft is exported into `served/` of the run's folder, once for each checkpoint. Draft length and
p_min are what `bench` found best on this engine; if nothing pays, the target is served alone. What
is given counts in any case, and what is not is the fastest that was measured with it.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from eagle_core.atomic_files import atomic_folder, file_digest
from eagle_core.data.config import DatasetConfig
from eagle_core.draft.export import export
from eagle_core.draft.export_config import ExportConfig
from eagle_core.errors import ConfigError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.engine_report import DraftSetting, EngineSpeed
from eagle_core.serving import sglang
from eagle_core.serving.engine import Launch
from eagle_core.serving.engines import find_any_engine, find_engine
from eagle_core.serving.llamacpp import gguf
from eagle_core.serving.llamacpp.server import draft_path
from eagle_core.serving.served import Served
from eagle_core.serving.server_process import ServerProcess, serving
from eagle_core.serving.vllm import VllmEngine
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import for_decoding, read_model_config
from eagle_core.target.positions import Positions
from eagle_core.target.preflight import check_weights
from eagle_core.tokenization.template_source import configured_text
from eagle_core.training import checkpoint
from eagle_core.training.config import TrainingConfig
from flows.reports.engine_tables import concurrency_text, serve_text, setting_text
from flows.reports.run_record import RunRecord, evaluation_name
from flows.tasks.served_draft import served_target
from flows.tasks.trained_run import TrainedRun, open_run
from flows.workspace import DEFAULT_HOME

ServeEngine = Literal["vllm", "llamacpp", "sglang"]
FOLDER_NAME = "served"
DEFAULT_MAX_LENGTH = 4096
_DIGITS = 12
KEY_VARIABLES: Mapping[ServeEngine, str] = {"vllm": "VLLM_API_KEY", "llamacpp": "LLAMA_API_KEY"}
"""Variables of the key that an engine's server asks of clients; SGLang has none."""
_LOG_LEVEL = "VLLM_LOGGING_LEVEL"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """How to serve; what is None is decided."""

    engine: ServeEngine | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 4
    """Texts decoded at a time."""
    max_length: int | None = None
    """Tokens of the longest text."""
    draft_tokens: int | None = None
    """K; 0 serves the target alone."""
    p_min: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """What will be served, and why so."""

    engine: ServeEngine
    served: Served
    setting: DraftSetting | None
    """None without the draft."""
    reason: str
    """Where the setting is from."""


def plan_serving(
    target: TargetConfig,
    dataset: DatasetConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    options: ServeOptions,
    *,
    home: str = DEFAULT_HOME,
    run: str = "main",
) -> Serving:
    """Export the draft of a run, unless that is done, and decide how it is served.

    Raises:
        ConfigError: the run has no checkpoint, no engine is installed, it does not have what
            `options` ask for, or they contradict each other.
        MismatchError: the run was trained for another target, tokenizer or template.

    """
    engine = options.engine or _default_engine(evaluation, target)
    trained = open_run(
        target, dataset, training, home, run, evaluation.checkpoint, prepare=check_weights
    )
    setting, reason = _setting(trained.path, _step(trained), engine, evaluation, options)
    folder = _exported(trained)
    served = Served(
        target=for_decoding(target),
        weights=weights.locate(target).resolve(),
        draft=None if setting is None else folder / "serving",
        draft_tokens=0 if setting is None else setting.draft_tokens,
        draft_p_min=0.0 if setting is None else setting.p_min,
        slots=options.slots,
        max_length=_max_length(target, options.max_length),
        host=options.host,
        is_measured=False,
        chat_template=configured_text(target.template),
    )
    return Serving(engine=engine, served=served, setting=setting, reason=reason)


def shell_command(planned: Serving, *, port: int) -> tuple[str, list[Path]]:
    """Return the command for a shell, and the files that are still to be made for it.

    Raises:
        ConfigError: llama.cpp is not installed.

    """
    served = planned.served
    if planned.engine == "sglang":
        return shlex.join(sglang.command(served, port=port)), []
    files = []
    if planned.engine == "vllm":
        launch = VllmEngine.launch(served, port=port)
    else:
        launch = find_engine("llamacpp", served.target).launch(served, port=port)
        files.append(gguf.target_path(served.target, served.weights))
        files += [] if served.draft is None else [draft_path(served)]
    variables = _changed_variables(_for_people(launch).environment)
    missing = [path for path in files if not path.exists()]
    return shlex.join([*variables, *launch.command]), missing


@contextmanager
def start(planned: Serving, *, port: int) -> Iterator[ServerProcess]:
    """Serve until the block ends, with the server's log on standard error.

    Raises:
        ConfigError: the engine is not installed, refuses target or draft, or does not start.
        TransientError: it ended within the block, which then failed.

    """
    served = planned.served
    if planned.engine == "sglang":
        raise ConfigError(
            "Eyas does not start SGLang: print its command with --print and run that where SGLang "
            "is installed, or choose --engine vllm or llamacpp"
        )
    engine = find_engine(planned.engine, served.target)
    engine.prepare(served)
    with serving(
        engine.title,
        lambda port: _for_people(engine.launch(served, port=port)),
        host=served.host,
        port=port,
        shows_log=True,
    ) as server:
        yield server


def key_variable(engine: ServeEngine) -> str | None:
    """Return the variable with the key that clients must send; None if it is not set."""
    name = KEY_VARIABLES.get(engine)
    return name if name is not None and os.environ.get(name) else None


def _default_engine(evaluation: EvaluationConfig, target: TargetConfig) -> ServeEngine:
    return find_any_engine(target) if evaluation.engine == "eyas" else evaluation.engine


def _step(trained: TrainedRun) -> int:
    return checkpoint.read(trained.checkpoint_path).step


def _setting(
    run_path: Path,
    step: int,
    engine: ServeEngine,
    evaluation: EvaluationConfig,
    options: ServeOptions,
) -> tuple[DraftSetting | None, str]:
    """Return the setting to serve with, or None to serve without a draft, and where it is from."""
    _require_possible(engine, options)
    if options.draft_tokens == 0:
        return None, "--draft-tokens"
    measured = _measured(run_path, step, engine, options.slots)
    given = _given(options)
    if given:
        setting, why = _setting_with(options, measured, evaluation.draft_tokens)
        return setting, f"{given}; {why}"
    if isinstance(measured, str):
        setting = DraftSetting(draft_tokens=evaluation.draft_tokens)
        return setting, f"evaluation.draft_tokens; {measured}"
    fastest = _fastest(measured)
    reason = f"measured with {concurrency_text(fastest.concurrency)}: {serve_text(fastest)}"
    return (fastest.setting if fastest.speedup > 1 else None), reason


def _require_possible(engine: ServeEngine, options: ServeOptions) -> None:
    """Raise ConfigError for options that the engine does not have, or that exclude each other."""
    if options.p_min is None:
        return
    if engine != "llamacpp":
        raise ConfigError(
            f"--p-min is llama.cpp's: {engine} has no such setting; choose --engine llamacpp, or "
            "omit --p-min"
        )
    if options.draft_tokens == 0:
        raise ConfigError(
            "--p-min is for a draft, and --draft-tokens 0 serves the target alone: omit one of them"
        )


def _given(options: ServeOptions) -> str:
    """Return the names of the options that overrule what was measured."""
    values = {"--draft-tokens": options.draft_tokens, "--p-min": options.p_min}
    return ", ".join(name for name, value in values.items() if value is not None)


def _setting_with(
    options: ServeOptions, measured: Sequence[EngineSpeed] | str, default_tokens: int
) -> tuple[DraftSetting, str]:
    """Return the fastest setting with what is given, whether or not it pays, and what is known.

    If none was measured with it, it goes with the draft length of the fastest one.
    """
    speeds = [] if isinstance(measured, str) else measured
    fitting = [
        one
        for one in speeds
        if options.draft_tokens in {None, one.setting.draft_tokens}
        and options.p_min in {None, one.setting.p_min}
    ]
    if fitting:
        one = _fastest(fitting)
        return one.setting, (
            f"measured with {concurrency_text(one.concurrency)}: {setting_text(one.setting)} "
            f"({one.speedup:.2f}x)"
        )
    fastest_tokens = _fastest(speeds).setting.draft_tokens if speeds else default_tokens
    setting = DraftSetting(
        draft_tokens=options.draft_tokens or fastest_tokens, p_min=options.p_min or 0.0
    )
    return setting, measured if isinstance(measured, str) else "not measured with that"


def _fastest(speeds: Sequence[EngineSpeed]) -> EngineSpeed:
    """Return the fastest setting; of several, the one that drafts least."""
    return max(speeds, key=lambda one: one.tokens_per_second)


def _measured(
    run_path: Path, step: int, engine: ServeEngine, slots: int
) -> tuple[EngineSpeed, ...] | str:
    """Return the speeds of all settings for at most so many texts at a time, or why there are none.

    They are those of the largest number of texts that was measured.
    """
    if engine == "sglang":
        return f"not measured on {engine}"
    record = RunRecord.read(run_path)
    name = evaluation_name(engine)
    if name in record.outdated:
        return f"{name} is of another version of Eyas: run eyas bench again"
    by_engine = {one.evaluation.engine: one for one in record.by_engine}
    summary = by_engine.get(engine)
    if summary is None or summary.engine is None:
        return f"not measured on {engine}"
    if summary.checkpoint_step != step:
        return (
            f"on {engine}, step {summary.checkpoint_step:,} was measured, and this is step "
            f"{step:,}: run eyas bench again"
        )
    speeds = summary.engine.speeds
    concurrency = max(one.concurrency for one in speeds if one.concurrency <= slots)
    return tuple(one for one in speeds if one.concurrency == concurrency)


def _exported(trained: TrainedRun) -> Path:
    """Return the folder of the checkpoint's export in the dtype it is decoded in; make it once.

    Exports of other checkpoints stay: a command that was printed may name them.
    """
    dtype = for_decoding(trained.target).dtype
    digest = file_digest(trained.checkpoint_path / checkpoint.WEIGHTS_NAME)[:_DIGITS]
    name = f"{trained.checkpoint_path.name}-{digest}-{dtype}"
    folder = (trained.path / FOLDER_NAME / name).resolve()
    if folder.exists():
        return folder
    setup, _ = trained.load_draft()
    config = ExportConfig(layouts=("serving",), dtype=cast("Literal['float32', 'bfloat16']", dtype))
    with atomic_folder(folder) as partial:
        export(setup.draft, served_target(trained.target), partial, config)
    return folder


def _max_length(target: TargetConfig, given: int | None) -> int:
    """Return the tokens of the longest text, for which memory is kept for each one."""
    positions = Positions.of(read_model_config(target, weights.locate(target)))
    if given is not None:
        positions.require(given, target, setting="--max-length")
        return given
    return min(DEFAULT_MAX_LENGTH, positions.limit or DEFAULT_MAX_LENGTH)


def _for_people(launch: Launch) -> Launch:
    """Return a launch with the keys that a user has set, and with all of the server's log."""
    keys = {name: os.environ[name] for name in KEY_VARIABLES.values() if name in os.environ}
    environment = {**launch.environment, **keys}
    if _LOG_LEVEL not in os.environ:
        environment.pop(_LOG_LEVEL, None)
    return replace(launch, environment=environment)


def _changed_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the command that sets what an engine's variables differ in from ours."""
    removed = [word for name in os.environ if name not in environment for word in ("-u", name)]
    changed = [
        f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value
    ]
    return ["env", *removed, *changed] if removed or changed else []
