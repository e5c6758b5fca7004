"""The draft of a run, served with its target by an engine on this machine, or the command for that.

The draft is exported into `served/` of the run's folder, once for each checkpoint. Draft length and
p_min are what `bench` found best on this engine; if nothing pays, the target is served alone.
"""

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from eagle_core.atomic_files import atomic_folder, file_digest
from eagle_core.data.config import DatasetConfig
from eagle_core.draft.export import ExportConfig, export
from eagle_core.errors import ConfigError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.engine_report import DraftSetting
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
from flows.reports.engine_tables import concurrency_text, serve_text
from flows.reports.run_record import RunRecord
from flows.tasks.served_draft import served_target
from flows.tasks.trained_run import TrainedRun, open_run
from flows.workspace import DEFAULT_HOME

ServeEngine = Literal["vllm", "llamacpp", "sglang"]
FOLDER_NAME = "served"
DEFAULT_MAX_LENGTH = 4096
_TEMPLATE_NAME = "chat_template.jinja"
_DIGITS = 12
_KEYS = ("VLLM_API_KEY", "LLAMA_API_KEY")
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
        ConfigError: the run has no checkpoint, no engine is installed, or it does not have what
            `options` ask for.
        MismatchError: the run was trained for another target, tokenizer or template.

    """
    engine = options.engine or _default_engine(evaluation, target)
    trained = open_run(
        target, dataset, training, home, run, evaluation.checkpoint, prepare=check_weights
    )
    setting, reason = _setting(trained.path, _step(trained), engine, evaluation, options)
    folder = _exported(trained)
    template = configured_text(target.template)
    if template is not None and engine == "sglang":  # takes a file
        (folder / _TEMPLATE_NAME).write_text(template, encoding="utf-8")
        template = str(folder / _TEMPLATE_NAME)
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
        chat_template=template,
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
        files += [] if served.draft is None else [draft_path(served.draft)]
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
    if options.p_min and engine != "llamacpp":
        raise ConfigError(
            f"--p-min is llama.cpp's: {engine} has no such setting; choose --engine llamacpp, or "
            "omit --p-min"
        )
    if options.draft_tokens is not None:
        found, reason = DraftSetting(draft_tokens=options.draft_tokens), "--draft-tokens"
    else:
        found, reason = _measured(run_path, step, engine, evaluation, options.slots)
    if not found.draft_tokens:
        return None, reason
    return (found if options.p_min is None else replace(found, p_min=options.p_min)), reason


def _measured(
    run_path: Path, step: int, engine: ServeEngine, evaluation: EvaluationConfig, slots: int
) -> tuple[DraftSetting, str]:
    """Return the fastest setting that was measured; 0 drafted tokens if none pays."""
    default = DraftSetting(draft_tokens=evaluation.draft_tokens)
    by_engine = {one.evaluation.engine: one for one in RunRecord.read(run_path).by_engine}
    summary = None if engine == "sglang" else by_engine.get(engine)
    if summary is None or summary.engine is None:
        return default, f"evaluation.draft_tokens; not measured on {engine}"
    if summary.checkpoint_step != step:
        return default, (
            f"evaluation.draft_tokens; on {engine}, step {summary.checkpoint_step:,} was measured, "
            f"and this is step {step:,}: run eyas bench again"
        )
    best = summary.engine.best()
    concurrency = max(number for number in best if number <= slots)
    fastest = best[concurrency]
    reason = f"measured with {concurrency_text(concurrency)}: {serve_text(fastest)}"
    if fastest.speedup > 1:
        return fastest.setting, reason
    return DraftSetting(draft_tokens=0), reason


def _exported(trained: TrainedRun) -> Path:
    """Return the folder of the checkpoint's export in the dtype it is decoded in; make it once.

    Exports of other checkpoints are removed: servers have loaded theirs.
    """
    dtype = for_decoding(trained.target).dtype
    digest = file_digest(trained.checkpoint_path / checkpoint.WEIGHTS_NAME)[:_DIGITS]
    name = f"{trained.checkpoint_path.name}-{digest}"
    folder = (trained.path / FOLDER_NAME / f"{name}-{dtype}").resolve()
    if folder.exists():
        return folder
    setup, _ = trained.load_draft()
    config = ExportConfig(layouts=("serving",), dtype=cast("Literal['float32', 'bfloat16']", dtype))
    with atomic_folder(folder) as partial:
        export(setup.draft, served_target(trained.target), partial, config)
    for other in folder.parent.glob("step-*"):
        if not other.name.startswith(name):
            shutil.rmtree(other)
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
    keys = {name: os.environ[name] for name in _KEYS if name in os.environ}
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
