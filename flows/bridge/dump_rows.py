"""Read the rows of a dump, and tell which of them can be used.

A row is used, or the ledger says why not. One that cannot be used never stops the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.data.ledger_writer import LedgerWriter
from eagle_core.dumps.agreement import Agreement, compare
from eagle_core.dumps.completion import (
    Completion,
    LastState,
    Limits,
    MaskSource,
    TargetShape,
)
from eagle_core.dumps.dump import Dump, DumpRow
from eagle_core.dumps.template import first_token, template_mask
from eagle_core.errors import ConfigError, CorruptError, MismatchError
from eagle_core.samples import HiddenStateSample
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.final_head import FinalHead
from eagle_core.target.layerwise.recompute_model import RecomputeModel
from eagle_core.target.model_config import aux_layers, read_model_config
from eagle_core.target.placement import load_target
from eagle_core.target.tokenizer import conversation_tokenizer
from flows.bridge.import_journal import ImportJournal
from flows.bridge.shard_filler import ShardFiller
from flows.bridge.stored_source import to_stored
from storage.errors import SampleRefusedError
from storage.records.identity import StoreIdentity
from storage.samples import require_storable

_ROWS_TRIED = 1 << 4
"""Rows across the dump of which usable ones are looked for, to check them."""
_STRUCTURAL = frozenset({Reason.WRONG_KEYS, Reason.WRONG_SHAPE, Reason.NO_MASK})
"""Reasons that, if all tried rows share them, all others will, too."""


def require_same_layers(dump: Dump, target: TargetConfig) -> None:
    """Raise MismatchError if the dump records other aux layers than the target's."""
    num_layers = read_model_config(target, weights.locate(target)).num_hidden_layers
    layers = aux_layers(target, num_layers)
    if dump.aux_layers is not None and tuple(dump.aux_layers) != layers:
        raise MismatchError(
            f"the dump has the states of layers {list(dump.aux_layers)}, but target {target.name} "
            f"those of {list(layers)}; give --set target.aux_layers={list(dump.aux_layers)}"
        )


def completion_for(
    target: TargetConfig,
    dump: Dump,
    limits: Limits,
    *,
    mask: MaskSource,
    last_state: LastState,
    checks_every_row: bool,
) -> Completion:
    """Load what completes the rows of a dump: the target's norm and head.

    Its first and last layers, too, if the dump has no last states or every row is checked.

    Raises:
        ConfigError: the dump has no masks and `mask` says to take them from it; or the target has
            no final norm of a known name, or its layers cannot be run alone.

    """
    if mask == "dump" and not dump.has_masks:
        raise ConfigError(
            f"{dump.format} dumps have their loss masks in a data set, and there is none "
            f"({dump.origin}). Put the states back into its folder, or give --mask template to "
            "derive masks from the target's chat template, or --mask all to train on every token"
        )
    needs_layers = checks_every_row or not dump.has_last
    cure = "omit --check-every-row" if dump.has_last else f"{dump.format} dumps need that"
    model = read_model_config(target, weights.locate(target))
    tokenizer = conversation_tokenizer(target)
    pad = model.pad_token_id
    shape = TargetShape(
        aux_layers=aux_layers(target, model.num_hidden_layers),
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        padding_ids=frozenset({0} if pad is None else {0, int(pad)}) - tokenizer.stop_ids,
        stop_ids=frozenset(tokenizer.stop_ids),
        first_id=first_token(tokenizer),
    )
    return Completion(
        shape=shape,
        limits=limits,
        end=FinalHead.load(target, cure="states of this target cannot be imported"),
        mask=mask,
        template_mask=lambda ids: template_mask(tokenizer, ids),
        last_state=last_state,
        recompute_model=RecomputeModel.load(target, cure=cure) if needs_layers else None,
        checks_every_row=checks_every_row,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReader:
    """Reads rows as samples that the store takes."""

    completion: Completion
    identity: StoreIdentity

    def read(
        self,
        row: DumpRow,
        *,
        on_change: Callable[[Change, str], None] = lambda _change, _text: None,
    ) -> HiddenStateSample:
        """Return the sample of a row; RejectedRecord says why there is none."""
        sample = self.completion.complete(row.read(), row.location, on_change=on_change)
        try:
            require_storable(to_stored(sample), self.identity)
        except SampleRefusedError as error:
            raise RejectedRecord(Reason.BAD_STATES, row.location, str(error)) from error
        return sample


def check_dump(
    dump: Dump, reader: RowReader, target: TargetConfig, *, num_checked: int
) -> list[Agreement]:
    """Return how some rows, from across the dump, agree with the target's own states.

    Raises:
        MismatchError: none does, or all rows that were tried have the same wrong structure.

    """
    samples: list[HiddenStateSample] = []
    locations: list[str] = []
    rejected: list[RejectedRecord] = []
    for row in _spread(dump):
        if len(samples) >= max(num_checked, 1):
            break
        try:
            samples.append(reader.read(row))
            locations.append(row.location)
        except RejectedRecord as reason:
            rejected.append(reason)
    if not samples and {one.reason for one in rejected} <= _STRUCTURAL:
        raise MismatchError(
            f"none of {len(rejected)} rows from across the dump fits target {target.name}; "
            f"first {rejected[0]}. Is it of this target (its hidden size and its number of aux "
            "layers), and of this format?"
        )
    if not samples or not num_checked:
        return []
    found = compare(load_target(target), samples, locations)
    if all(one.problem for one in found):
        raise MismatchError(
            f"the dump does not agree with target {target.name}: {found[0].location}: "
            f"{found[0].problem}. Name the recipe of its target, and the layers that it captured "
            "(--set target.aux_layers=[...]); nothing was imported"
        )
    return found


def _spread(dump: Dump) -> list[DumpRow]:
    """Return rows from across the dump, always the same; the first few are spread over it, too."""
    places = np.linspace(0, max(dump.num_rows - 1, 0), _ROWS_TRIED).astype(int).tolist()
    wanted = set(places)
    found = {number: row for number, row in enumerate(dump.rows) if number in wanted}
    halving = [int(f"{place:04b}"[::-1], 2) for place in range(_ROWS_TRIED)]
    ordered = dict.fromkeys(places[place] for place in halving)
    return [found[place] for place in ordered if place in found]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportCounts:
    """What came of the rows."""

    num_rows: int
    num_imported: int
    """Rows that were imported now."""
    num_before: int
    """Rows that an earlier import had brought."""


def import_rows(
    dump: Dump,
    reader: RowReader,
    journal: ImportJournal,
    filler: ShardFiller,
    ledger: LedgerWriter,
    *,
    refused: dict[str, str],
    on_row: Callable[[], None],
) -> ImportCounts:
    """Hand every usable row to `filler`, and enter the others into the ledger.

    `refused` are rows that are not to be used, by location, with the reason.
    """
    done, seen = set(journal.locations), set(journal.sample_ids)
    num_rows = num_imported = num_before = 0
    for row in dump.rows:
        num_rows += 1
        if row.location in journal.locations:
            num_before += 1
            on_row()
            continue
        try:
            sample = _usable(row, reader, ledger, done=done, seen=seen, refused=refused)
        except RejectedRecord as rejected:
            ledger.drop(rejected)
        else:
            done.add(row.location)
            seen.add(sample.sample_id)
            filler.add(sample, location=row.location)
            num_imported += 1
        on_row()
    return ImportCounts(num_rows=num_rows, num_imported=num_imported, num_before=num_before)


def _usable(
    row: DumpRow,
    reader: RowReader,
    ledger: LedgerWriter,
    *,
    done: set[str],
    seen: set[str],
    refused: dict[str, str],
) -> HiddenStateSample:
    longer = next((other for other in row.covered_by if other in done), None)
    if longer is not None:
        raise RejectedRecord(Reason.CONTAINED, row.location, f"{longer} begins with its tokens")
    if row.location in refused:
        raise RejectedRecord(Reason.NOT_REPRODUCED, row.location, refused[row.location])
    changes: list[tuple[Change, str]] = []
    sample = reader.read(row, on_change=lambda change, text: changes.append((change, text)))
    if sample.sample_id in seen:
        raise RejectedRecord(Reason.DUPLICATE, row.location, "the same tokens with the same mask")
    for change, text in changes:
        ledger.change(change, location=row.location, conversation_id="", detail=text)
    return sample


def require_some(counts: ImportCounts, ledger: LedgerWriter, path: Path) -> None:
    """Raise CorruptError if a dump had no row that could be used."""
    if counts.num_imported or counts.num_before:
        return
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(ledger.dropped.items()))
    raise CorruptError(
        f"none of the {counts.num_rows:,} rows of the dump can be used ({dropped}); {path} says "
        "what is wrong with each"
    )
