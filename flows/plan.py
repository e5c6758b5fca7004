"""`plan`: the cost estimate: shards, bytes per profile, time, and whether it fits.

On request it also compares candidates: other aux layers, and other sizes of the draft vocabulary.
"""

from prefect import flow

from eagle_core.data.config import DatasetConfig
from eagle_core.draft.settings import PLAIN_DRAFT, DraftSettings
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import aux_layers, read_model_config
from eagle_core.training.config import TrainingConfig
from flows.bridge.store_identity import as_in_store
from flows.config.runner import RunnerConfig
from flows.config.store import StoreConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.credentials import store_root
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports.candidate_tables import layer_rows, next_rows, vocabulary_rows
from flows.reports.cost import CostEstimate, require_fits
from flows.reports.store_tables import cost_rows
from flows.reports.training_memory import training_memory_row
from flows.summaries import TokensSummary
from flows.tasks.candidates import compare_on_sample, eagle3_layers
from flows.tasks.preflight import estimate_cost
from flows.tasks.prepare import prepare, prepare_undownloaded
from flows.workspace import DEFAULT_HOME


@flow(
    name="plan", flow_run_name=run_name("plan-{target.name}-{dataset.name}"), persist_result=False
)
def plan(
    target: TargetConfig,
    dataset: DatasetConfig,
    store: StoreConfig = StoreConfig(),
    runner: RunnerConfig = RunnerConfig(),
    training: TrainingConfig = TrainingConfig(),
    home: str = DEFAULT_HOME,
    candidates: bool = False,
    draft: DraftSettings = PLAIN_DRAFT,
) -> CostEstimate:
    """Estimate what `hidden-states` would compute and what it would cost; store nothing.

    Also say how much memory the training of `draft` needs.

    If the weights are not on this machine, they are not fetched: sizes are those of config.json,
    and the time is that of one layer of each kind with random weights.

    With `candidates`, fetch them in any case, run the target on about 40,000 tokens, and report how
    well linear predictions from other aux layers and with other draft vocabularies agree with it.
    Of `training` that uses only `draft_vocab_size`.

    Raises:
        ConfigError: the target cannot be run, such as for its architecture; or there is too little
            data to compare candidates.
        DoesNotFitError: the disk or `store.budget` is too small; states by how much, and remedies.

    """
    weights_are_here = candidates or weights.are_here(target)
    if weights_are_here:
        space, tokens = prepare(target, dataset, home, capture="here")
    else:
        space, tokens = prepare_undownloaded(target, dataset, home)
    root = store_root(store, space)
    target = as_in_store(target, root)
    estimate = estimate_cost(target, store, tokens, root, runner, weights_are_here=weights_are_here)
    rows = [*cost_rows(estimate), training_memory_row(target, draft, training)]
    title = f"Plan: {target.name} on {dataset.name}"
    report_stage(title, rows, key=artifact_key("plan", target.name, dataset.name))
    if candidates:
        _report_candidates(target, dataset, training, tokens)
    require_fits(estimate)
    return estimate


def _report_candidates(
    target: TargetConfig, dataset: DatasetConfig, training: TrainingConfig, tokens: TokensSummary
) -> None:
    comparison = compare_on_sample(target, training.draft_vocab_size, tokens)
    model = read_model_config(target, weights.locate(target))
    configured = aux_layers(target, model.num_hidden_layers)
    subject = f"{target.name} on {dataset.name}"
    report_stage(
        f"Candidates: aux layers of {subject}",
        layer_rows(
            comparison,
            configured=configured,
            eagle3=eagle3_layers(model.num_hidden_layers),
            hidden_size=model.hidden_size,
        ),
        key=artifact_key("candidates-layers", target.name, dataset.name),
        following=next_rows(comparison, configured=configured),
    )
    report_stage(
        f"Candidates: draft vocabulary of {subject}",
        vocabulary_rows(
            comparison, configured=min(training.draft_vocab_size, int(model.vocab_size))
        ),
        key=artifact_key("candidates-vocabulary", target.name, dataset.name),
    )
