"""`import-store`: hidden states that another tool dumped become a store and a data set."""

import dataclasses
import time
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger

from eagle_core.data.config import DatasetConfig
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.dumps.agreement import Agreement
from eagle_core.dumps.completion import LastState, Limits, MaskSource
from eagle_core.dumps.dump import Dump, FormatName
from eagle_core.dumps.formats import open_dump
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from flows.bridge.dump_rows import (
    ImportCounts,
    RowReader,
    check_dump,
    completion_for,
    import_rows,
    refuse_rows,
    require_same_layers,
    require_some,
)
from flows.bridge.import_journal import ImportJournal, sole_import
from flows.bridge.recompute import TargetRecompute
from flows.bridge.shard_filler import ShardFiller
from flows.bridge.store_identity import as_in_store, store_identity
from flows.config.store import StoreConfig
from flows.orchestration.artifact_key import artifact_key
from flows.orchestration.credentials import store_root
from flows.orchestration.progress import stage_progress
from flows.orchestration.run_name import run_name
from flows.orchestration.stage_report import report_stage
from flows.reports import rows as report
from flows.summaries import HiddenStatesSummary, ImportSummary
from flows.tasks.prepare import prepare_dataset, prepare_weights
from flows.tasks.publish import publish
from flows.tasks.tokenize import tokenize
from flows.workspace import DEFAULT_HOME, Workspace
from storage.store import Store

LEDGER_NAME = "ledger.parquet"
ROWS_NAME = "rows.parquet"
_JOURNAL = "journal"


@flow(
    name="import-store",
    flow_run_name=run_name("import-store-{target.name}-{dataset.name}"),
    persist_result=False,
)
def import_store(  # noqa: PLR0917 (what a user may say)
    target: TargetConfig,
    dataset: DatasetConfig,
    format: FormatName,  # noqa: A002 (as users type it)
    path: str,
    store: StoreConfig = StoreConfig(),
    mask: MaskSource = "dump",
    last_state: LastState = "auto",
    num_checked: int = 4,
    check_every_row: bool = False,
    home: str = DEFAULT_HOME,
) -> ImportSummary:
    """Import a dump of hidden states as a data set and its store, which `train` then reads.

    An import that was interrupted goes on where it stopped, and one of more files adds them.

    Args:
        target: the target that the states are of.
        dataset: names the new data set. Of its other keys, `held_out_fraction`, `max_length` and
            `min_supervised_tokens` apply.
        format: of the dump.
        path: folder or file of the dump.
        store: where the states go.
        mask: where loss masks come from: the dump, the target's chat template, or all tokens.
        last_state: whether the dump's last states are those after the final norm; `auto` is what
            the format says.
        num_checked: rows that are compared with the target's own states; 0 loads no target.
        check_every_row: whether each row's states must agree with each other and with its tokens,
            by the target's first and last layers.
        home: folder for data, stores and runs.

    Raises:
        ConfigError: nothing of this format at `path`, no loss masks, or no weights of the target.
        MismatchError: the states are not the target's, the store holds others, or an earlier import
            into this data set had other settings.
        CorruptError: no row of the dump can be used.
        RunBusyError: another process imports into this data set.

    """
    started = time.monotonic()
    _refuse_recompute(store)
    space = Workspace.at(home, target=target.name, dataset=dataset.name)
    dump = open_dump(format, Path(path).expanduser(), with_masks=mask == "dump")
    prepare_weights(target)
    root = store_root(store, space)
    target = as_in_store(target, root)
    require_same_layers(dump, target)
    limits = Limits(
        max_length=dataset.max_length, min_supervised_tokens=dataset.min_supervised_tokens
    )
    completion = completion_for(
        target,
        dump,
        limits,
        mask=mask,
        last_state=last_state,
        checks_every_row=check_every_row,
    )
    identity = store_identity(target, store, conversation_tokenizer(target))
    reader = RowReader(completion=completion, identity=identity)
    agreements = check_dump(dump, reader, target, num_checked=num_checked)
    refused = _refused(agreements)
    ledger_path = space.import_path / LEDGER_NAME
    with sole_import(space.import_path):
        opened = Store.create(root, identity)
        settings = {
            "mask": mask,
            "last_state": last_state,
            **dataclasses.asdict(limits),
            "check_every_row": check_every_row,
            "store.root": store.root,
            "store identity": identity.identity_id,
        }
        journal = ImportJournal(space.import_path / _JOURNAL, opened, settings)
        refuse_rows(dump, journal, refused)
        if journal.has_refused:
            reader = reader.strict(target)
        recompute = TargetRecompute(completion.end.lm_head, None)
        filler = ShardFiller(opened, journal, recompute, shard_tokens=store.shard_tokens)
        with LedgerWriter(ledger_path) as ledger:
            counts = _import(dump, reader, journal, filler, ledger, target.name)
        require_some(counts, ledger, ledger_path)
        imported = _as_dataset(dataset, space.import_path / ROWS_NAME)
        journal.write_rows(Path(imported.source))
        states = _published(
            imported, space, target, opened, shards_made=filler.num_shards, started=started
        )
    summary = ImportSummary(
        states=states,
        dataset=imported,
        num_rows=counts.num_rows,
        num_imported=counts.num_imported,
        num_before=counts.num_before,
        dropped=dict(sorted(ledger.dropped.items())),
        changed=dict(sorted(ledger.changed.items())),
        ledger_path=ledger_path,
        num_checked=len(agreements),
        largest_error=max(
            (error for one in agreements if not one.problem for error in one.errors), default=0.0
        ),
    )
    report_stage(
        f"Import: {dump.format} for {target.name} as {dataset.name}",
        report.import_rows(summary),
        key=artifact_key("import-store", target.name, dataset.name),
    )
    return summary


def _refuse_recompute(store: StoreConfig) -> None:
    if store.recompute:
        raise ConfigError(
            "store.recompute is true, but states that another tool computed cannot be recomputed "
            "here to the bit; give --set store.recompute=false"
        )


def _refused(agreements: list[Agreement]) -> dict[str, str]:
    """Return the checked rows that are not the target's, by location, and warn of them."""
    refused = {one.location: one.problem for one in agreements if one.problem}
    if refused:
        get_run_logger().warning(
            "%d of %d checked rows do not agree with the target, so every row is checked: %s",
            *(len(refused), len(agreements), "; ".join(refused)),
        )
    return refused


def _import(
    dump: Dump,
    reader: RowReader,
    journal: ImportJournal,
    filler: ShardFiller,
    ledger: LedgerWriter,
    target: str,
) -> ImportCounts:
    key = artifact_key("import-progress", target)
    with (
        stage_progress("import", key=key, total=dump.num_rows, unit="rows") as progress,
        filler,
    ):
        counts = import_rows(dump, reader, journal, filler, ledger, on_row=progress.advance)
    if counts.num_rows != dump.num_rows:
        get_run_logger().warning(
            "the dump says that it has %s rows, and %s are there: is it complete?",
            *(f"{dump.num_rows:,}", f"{counts.num_rows:,}"),
        )
    return counts


def _as_dataset(dataset: DatasetConfig, rows: Path) -> DatasetConfig:
    """Return the data set of the imported rows, which are token ids with masks."""
    return DatasetConfig(
        name=dataset.name,
        source=str(rows.resolve()),
        held_out_fraction=dataset.held_out_fraction,
        max_length=dataset.max_length,
        min_supervised_tokens=dataset.min_supervised_tokens,
        tokenize_processes=dataset.tokenize_processes,
    )


def _published(
    dataset: DatasetConfig,
    space: Workspace,
    target: TargetConfig,
    store: Store,
    *,
    shards_made: int,
    started: float,
) -> HiddenStatesSummary:
    """Build the data set and its tokens, and publish the snapshots of both splits."""
    prepare_dataset(dataset, space)
    tokens = tokenize(target, dataset, space)
    return publish(store, tokens, space, shards_made=shards_made, started=started)
