"""Read the rows of a dump, and tell which of them can be used.

A row is used, or the ledger says why not. One that cannot be used never stops the others.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Self

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
from flows.bridge.import_journal import ImportJournal, Note, content_of, stamp_of
from flows.bridge.shard_filler import ShardFiller
from flows.bridge.stored_source import to_stored
from storage.errors import SampleRefusedError
from storage.records.identity import StoreIdentity
from storage.samples import require_storable

_ROWS_TRIED = 1 << 4
"""Rows across the dump after which it is known whether any is of the right structure."""
_OMIT = "omit --check-every-row"
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
    cure = _OMIT if dump.has_last else f"{dump.format} dumps need that"
    model = read_model_config(target, weights.locate(target))
    tokenizer = conversation_tokenizer(target)
    pad = model.pad_token_id
    shape = TargetShape(
        aux_layers=aux_layers(target, model.num_hidden_layers),
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        padding_ids=frozenset({0 if pad is None else int(pad)}) - tokenizer.stop_ids,
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

    def strict(self, target: TargetConfig) -> Self:
        """Return a reader that runs the target's first and last layers on every row."""
        if self.completion.checks_every_row:
            return self
        layers = self.completion.recompute_model
        if layers is None:
            cure = "some rows are not the target's, so every row would have to be checked"
            layers = RecomputeModel.load(target, cure=cure)
        completion = replace(self.completion, checks_every_row=True, recompute_model=layers)
        return replace(self, completion=completion)


def check_dump(
    dump: Dump, reader: RowReader, target: TargetConfig, *, num_checked: int
) -> list[Agreement]:
    """Return how some rows, from across the dump, agree with the target's own states.

    Rows that cannot be used are passed over, until `num_checked` are found or all were read.

    Raises:
        ConfigError: rows have no loss mask, and `mask` says to take it from them.
        MismatchError: at least half do not, or all of the first rows have a wrong structure.

    """
    usable = _usable_rows(dump, reader, target, num_tried=None if num_checked else _ROWS_TRIED)
    if not num_checked:
        next(usable, None)
        return []
    found: list[Agreement] = []
    model = None
    for sample, location in islice(usable, num_checked):
        model = load_target(target) if model is None else model
        found += compare(model, [sample], [location])
    wrong = [one for one in found if one.problem]
    if wrong and 2 * len(wrong) >= len(found):
        raise MismatchError(
            f"the dump does not agree with target {target.name} in {len(wrong)} of {len(found)} "
            f"checked rows: {wrong[0].location}: {wrong[0].problem}. Name the recipe of its "
            "target, and the layers that it captured (--set target.aux_layers=[...]); nothing was "
            "imported"
        )
    return found


def _usable_rows(
    dump: Dump, reader: RowReader, target: TargetConfig, *, num_tried: int | None
) -> Iterator[tuple[HiddenStateSample, str]]:
    """Yield usable rows from across the dump, one at a time, with their locations."""
    rejected: list[RejectedRecord] = []
    rows = _spread(dump)
    is_any = False
    for tried, row in enumerate(islice(rows, num_tried), start=1):
        try:
            sample = reader.read(row)
        except RejectedRecord as reason:
            if tried <= _ROWS_TRIED:
                rejected.append(reason)
        else:
            is_any = True
            yield sample, row.location
        if tried == min(_ROWS_TRIED, len(rows)) and not is_any:
            _require_structure(rejected, target)


def _require_structure(rejected: list[RejectedRecord], target: TargetConfig) -> None:
    """Raise if all rows were rejected for what the others will share."""
    reasons = {one.reason for one in rejected}
    if reasons == {Reason.NO_MASK}:
        raise ConfigError(
            f"none of {len(rejected)} rows from across the dump has a loss mask; first "
            f"{rejected[0]}. Give --mask template to derive masks from the target's chat template, "
            "or --mask all to train on every token"
        )
    if reasons and reasons <= _STRUCTURAL:
        raise MismatchError(
            f"none of {len(rejected)} rows from across the dump fits target {target.name}; "
            f"first {rejected[0]}. Is it of this target (its hidden size and its number of aux "
            "layers), and of this format?"
        )


def _spread(dump: Dump) -> list[DumpRow]:
    """Return all rows, so that the first few of them are spread over the dump; always the same."""
    rows = list(dump.rows)
    bits = max(len(rows) - 1, 1).bit_length()
    halving = (int(f"{place:0{bits}b}"[::-1], 2) for place in range(1 << bits))
    return [rows[place] for place in dict.fromkeys((one * len(rows)) >> bits for one in halving)]


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
    on_row: Callable[[], None],
) -> ImportCounts:
    """Hand every usable row to `filler`, and enter the others into the ledger.

    Raises:
        MismatchError: a file that was imported has other states now.

    """
    known = _Known(journal=journal, done=set(journal.locations), seen=set(journal.sample_ids))
    num_rows = num_imported = num_before = 0
    for row in dump.rows:
        num_rows += 1
        try:
            if row.location in journal.locations:
                known.require_unchanged(row, reader)
                num_before += 1
            else:
                sample = known.usable(row, reader, ledger)
                note = Note(
                    location=row.location, stamp=stamp_of(row.file), content=content_of(sample)
                )
                filler.add(sample, note=note)
                num_imported += 1
        except RejectedRecord as rejected:
            ledger.drop(rejected)
        on_row()
    return ImportCounts(num_rows=num_rows, num_imported=num_imported, num_before=num_before)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """What is known of the rows so far."""

    journal: ImportJournal
    done: set[str] = field(default_factory=set)
    """Locations of rows whose tokens and masks the data set has."""
    seen: set[str] = field(default_factory=set)
    """Ids of its samples."""

    def require_unchanged(self, row: DumpRow, reader: RowReader) -> None:
        """Raise MismatchError if an imported row has other states now; read only if it may."""
        note, stamp = self.journal.notes.get(row.location), stamp_of(row.file)
        if note is None or note.stamp == stamp:
            return
        content = content_of(reader.read(row))
        if content != note.content:
            raise MismatchError(
                f"{row.location} was imported, and has other tokens or states now: the data set "
                "keeps the old ones. Restore the file, or import the dump with another --name"
            )
        self.journal.note([replace(note, stamp=stamp)])

    def usable(self, row: DumpRow, reader: RowReader, ledger: LedgerWriter) -> HiddenStateSample:
        """Return the sample of a row; RejectedRecord says why it is not used."""
        longer = next((other for other in row.covered_by if other in self.done), None)
        if longer is not None:
            self.done.add(row.location)
            raise RejectedRecord(Reason.CONTAINED, row.location, f"{longer} begins with its tokens")
        self._require_not_refused(row)
        changes: list[tuple[Change, str]] = []
        try:
            sample = reader.read(row, on_change=lambda change, text: changes.append((change, text)))
        except RejectedRecord as rejected:
            if rejected.reason is Reason.NOT_REPRODUCED:
                self.journal.note([_refusal(row, rejected.detail)])
            raise
        self.done.add(row.location)
        if sample.sample_id in self.seen:
            detail = "the same tokens with the same mask"
            raise RejectedRecord(Reason.DUPLICATE, row.location, detail)
        self.seen.add(sample.sample_id)
        for change, text in changes:
            ledger.change(change, location=row.location, conversation_id="", detail=text)
        return sample

    def _require_not_refused(self, row: DumpRow) -> None:
        note = self.journal.notes.get(row.location)
        if note is not None and note.refused and note.stamp in {"", stamp_of(row.file)}:
            raise RejectedRecord(Reason.NOT_REPRODUCED, row.location, note.refused)


def _refusal(row: DumpRow, reason: str) -> Note:
    return Note(location=row.location, stamp=stamp_of(row.file), refused=reason)


def refuse_rows(dump: Dump, journal: ImportJournal, refused: Mapping[str, str]) -> None:
    """Remember rows that are not the target's, by location, with the reason.

    Raises:
        MismatchError: one of them was imported before, unchecked.

    """
    if imported := sorted(journal.locations.intersection(refused)):
        raise MismatchError(
            f"{imported[0]} was imported earlier, and is not the target's: "
            f"{refused[imported[0]]}. Import the dump again with another --name"
        )
    rows = dump.rows if refused else ()
    journal.note([_refusal(row, refused[row.location]) for row in rows if row.location in refused])


def require_some(counts: ImportCounts, ledger: LedgerWriter, path: Path) -> None:
    """Raise CorruptError if a dump had no row that could be used, or that the data set has."""
    if counts.num_imported or counts.num_before or Reason.DUPLICATE in ledger.dropped:
        return
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(ledger.dropped.items()))
    raise CorruptError(
        f"none of the {counts.num_rows:,} rows of the dump can be used ({dropped}); {path} says "
        "what is wrong with each"
    )
