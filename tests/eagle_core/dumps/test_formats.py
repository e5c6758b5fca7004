"""Dumps of the tiny target in every layout give the samples that Eyas would have captured."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.data.ledger import Change, Reason, RejectedRecord
from eagle_core.dumps.agreement import compare
from eagle_core.dumps.completion import Completion
from eagle_core.dumps.dump import Dump, FormatName
from eagle_core.dumps.formats import open_dump
from eagle_core.errors import ConfigError, CorruptError
from eagle_core.samples import HiddenStateSample
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from tests.dumped import (
    PADDING,
    Row,
    rows,
    specforge_document,
    tokenized,
    turn_ends,
    write_model_optimizer,
    write_nemo,
    write_specforge,
    write_speculators,
)

LAYERS = (1, 3, 4)
Write = Callable[[Path, Sequence[Row]], object]
WRITERS: dict[str, tuple[FormatName, Write]] = {
    "specforge": ("specforge", write_specforge),
    "specforge, padded": (
        "specforge",
        lambda path, dumped: write_specforge(path, dumped, padding=9),
    ),
    "specforge, gzip": (
        "specforge",
        lambda path, dumped: write_specforge(path, dumped, is_gzipped=True),
    ),
    "model-optimizer": ("model-optimizer", write_model_optimizer),
    "model-optimizer, before the norm": (
        "model-optimizer",
        lambda path, dumped: write_model_optimizer(path, dumped, is_prenorm=True),
    ),
    "nemo": ("nemo", lambda path, dumped: write_nemo(path, dumped, aux_layers=LAYERS)),
}


def _read(dump: Dump, completion: Completion) -> dict[str, HiddenStateSample]:
    """Return the samples by location, without those that a longer row covers."""
    found: dict[str, HiddenStateSample] = {}
    for row in dump.rows:
        if not any(other in found for other in row.covered_by):
            found[row.location] = completion.complete(
                row.read(), row.location, on_change=lambda _change, _text: None
            )
    return found


def _changes(path: Path, completion: Completion) -> list[Change]:
    changes: list[Change] = []
    for row in open_dump("specforge", path).rows:
        completion.complete(row.read(), "", on_change=lambda change, _text: changes.append(change))
    return changes


def _values(bits: np.ndarray) -> torch.Tensor:
    return from_bfloat16_bits(bits, dtype=torch.float32)


@pytest.mark.parametrize("name", WRITERS)
def test_samples_are_those_of_the_target(
    tmp_path: Path, name: str, dumped: list[Row], completion: Completion
) -> None:
    format_name, write = WRITERS[name]
    write(tmp_path, dumped)
    dump = open_dump(format_name, tmp_path)
    assert dump.num_rows == len(dumped)
    found = _read(dump, completion)
    assert len(found) == len(dumped)
    for sample, row in zip(found.values(), dumped, strict=True):
        own = row.own
        assert sample.sample_id == own.sample_id
        assert np.array_equal(sample.input_ids, own.input_ids)
        assert np.array_equal(sample.loss_mask, own.loss_mask)
        assert np.array_equal(sample.aux_hidden_states, own.aux_hidden_states)
        last, expected = _values(sample.last_hidden_state), _values(own.last_hidden_state)
        torch.testing.assert_close(last, expected, rtol=0.05, atol=0.05)
        if format_name == "specforge":
            assert np.array_equal(sample.last_hidden_state, own.last_hidden_state)
        assert (sample.target_argmax == own.target_argmax).mean() > 0.9
        np.testing.assert_allclose(sample.target_logsumexp, own.target_logsumexp, atol=0.05)


@pytest.mark.parametrize("is_float8", [False, True])
def test_rows_of_one_conversation_become_one_sample(
    tmp_path: Path, dumped: list[Row], completion: Completion, *, is_float8: bool
) -> None:
    """With the masks of all of them: each supervised its own answer."""
    paths = write_speculators(tmp_path, dumped, is_float8=is_float8)
    assert len(paths) > len(dumped)
    dump = open_dump("speculators", tmp_path)
    assert dump.has_masks
    found = _read(dump, completion)
    assert len(found) == len(dumped)
    for sample, row in zip(found.values(), dumped, strict=True):
        end = turn_ends(row.own)[-1]
        assert np.array_equal(sample.input_ids, row.own.input_ids[:end])
        assert np.array_equal(sample.loss_mask, row.own.loss_mask[:end])
        last, expected = _values(sample.last_hidden_state), _values(row.own.last_hidden_state)
        error = (last - expected[:end]).norm() / expected[:end].norm()
        assert error < (0.1 if is_float8 else 0.01)
        if not is_float8:
            assert np.array_equal(sample.aux_hidden_states, row.own.aux_hidden_states[:end])


def test_a_shorter_row_is_read_if_the_longest_is_damaged(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    paths = write_speculators(tmp_path, [row for row in dumped if len(turn_ends(row.own)) == 3][:1])
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    dump = open_dump("speculators", tmp_path)
    longest, _, damaged = dump.rows
    with pytest.raises(RejectedRecord) as found:
        damaged.read()
    assert found.value.reason is Reason.UNREADABLE
    sample = completion.complete(longest.read(), "", on_change=lambda _change, _text: None)
    assert len(turn_ends(sample)) == 2


def test_masks_of_the_template_where_the_data_set_is_lost(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    write_speculators(tmp_path, dumped, with_dataset=False)
    dump = open_dump("speculators", tmp_path / "hidden_states")
    assert not dump.has_masks
    with pytest.raises(RejectedRecord, match="no loss mask; --mask template"):
        _read(dump, completion)
    by_template = _read(dump, replace(completion, mask="template"))
    for sample, row in zip(by_template.values(), dumped, strict=True):
        assert np.array_equal(sample.loss_mask, row.own.loss_mask[: len(sample)])
    everything = _read(dump, replace(completion, mask="all"))
    assert all(sample.loss_mask.all() for sample in everything.values())


def test_a_damaged_data_set_is_named(tmp_path: Path, dumped: list[Row]) -> None:
    write_speculators(tmp_path, dumped[:1])
    arrow = tmp_path / "data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(CorruptError, match="cannot be read"):
        open_dump("speculators", tmp_path)


def test_ids_of_another_data_set_are_refused(
    tmp_path: Path, target: TargetConfig, dumped: list[Row], completion: Completion
) -> None:
    write_speculators(tmp_path / "a", dumped[:1])
    write_speculators(tmp_path / "b", rows(target, tokenized(target, 1, first=6)))
    (tmp_path / "a" / "hidden_states").rename(tmp_path / "b" / "old")
    dump = open_dump("speculators", tmp_path / "b" / "old")
    with pytest.raises(RejectedRecord, match="token_ids differ from row 0 of the data set"):
        _read(dump, completion)


def test_each_folder_of_states_has_its_own_data_set(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    """That of the first folder decided for all: rows of the second were lost as contained."""
    write_speculators(tmp_path / "run1", dumped[:3])
    write_speculators(tmp_path / "run2", dumped[3:])
    found = _read(open_dump("speculators", tmp_path), completion)
    assert len(found) == len(dumped)
    for sample, row in zip(found.values(), dumped, strict=True):
        end = turn_ends(row.own)[-1]
        assert np.array_equal(sample.loss_mask, row.own.loss_mask[:end])


def test_a_row_of_other_tokens_than_its_data_set_s_is_not_taken_for_contained(
    tmp_path: Path, dumped: list[Row]
) -> None:
    paths = write_speculators(tmp_path, [row for row in dumped if len(turn_ends(row.own)) == 3][:1])
    tensors = load_file(paths[0])
    tensors["token_ids"][1] += 1
    save_file(tensors, paths[0])
    row = next(one for one in open_dump("speculators", tmp_path).rows if one.file == paths[0])
    assert row.covered_by == ()
    with pytest.raises(RejectedRecord, match="token_ids differ from row 0"):
        row.read()


@pytest.mark.parametrize("mask", [[None], [[0, 1]], [[2] * 9], ["text"]])
def test_a_data_set_with_other_values_rejects_rows_not_the_dump(
    tmp_path: Path, dumped: list[Row], mask: list[object]
) -> None:
    write_speculators(tmp_path, dumped[:1])
    ids = dumped[0].own.input_ids[: turn_ends(dumped[0].own)[0]].tolist()
    table = pa.table({"input_ids": [ids], "loss_mask": mask})
    part = tmp_path / "data-00000-of-00001.arrow"
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    for row in open_dump("speculators", tmp_path).rows:
        with pytest.raises(RejectedRecord) as found:
            row.read()
        assert found.value.location == row.location


def test_a_data_set_does_not_decide_where_masks_come_from_elsewhere(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    write_speculators(tmp_path, dumped[:1])
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    dump = open_dump("speculators", tmp_path, with_masks=False)
    (sample,) = _read(dump, replace(completion, mask="all")).values()
    assert sample.loss_mask.all()


def test_what_no_format_foresees_is_a_row_of_the_ledger(tmp_path: Path, dumped: list[Row]) -> None:
    (path,) = write_model_optimizer(tmp_path, dumped[:1])
    document = torch.load(path, weights_only=True)
    torch.save(document | {"hidden_states_prenorm": torch.ones(2)}, path)
    (row,) = open_dump("model-optimizer", tmp_path).rows
    with pytest.raises(RejectedRecord, match="RuntimeError: Boolean value of Tensor") as found:
        row.read()
    assert found.value.reason is Reason.UNREADABLE


def test_a_cut_row_does_not_keep_the_whole_file_in_memory(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    write_specforge(tmp_path, dumped[:1], padding=500)
    (sample,) = _read(open_dump("specforge", tmp_path), completion).values()
    for states in (sample.aux_hidden_states, sample.last_hidden_state):
        tensor = torch.from_numpy(states.view(np.int16))
        owner = states
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        kept = owner.base if isinstance(owner.base, torch.Tensor) else tensor
        assert kept.untyped_storage().nbytes() == states.nbytes


def test_one_token_that_pads_may_be_text(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    write_specforge(tmp_path, dumped[:1], padding=1)
    assert _changes(tmp_path, completion) == []
    write_specforge(tmp_path, dumped[:1], padding=2)
    assert _changes(tmp_path, completion) == [Change.PADDING_CUT]


def test_zeros_pad_only_where_the_tool_or_the_tokenizer_writes_them(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    only_pad = replace(
        completion, shape=replace(completion.shape, padding_ids=frozenset({PADDING}))
    )
    document = specforge_document(dumped[0], length=len(dumped[0].own) + 4)
    document["input_ids"][-4:] = 0
    torch.save(document, tmp_path / "a.ckpt")
    assert _changes(tmp_path, only_pad) == [Change.PADDING_CUT]
    other = {
        "input_ids": document["input_ids"],
        "loss_mask": document["loss_mask"],
        "hidden_states": document["hidden_state"][0],
        "aux_hidden_states": document["aux_hidden_state"][0],
    }
    torch.save(other, tmp_path / "a.pt")
    (sample,) = _read(open_dump("model-optimizer", tmp_path), only_pad).values()
    assert len(sample) == len(document["input_ids"])


def test_one_shard_of_a_cache_and_layers_in_another_order(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    paths = write_nemo(tmp_path, dumped, aux_layers=(4, 1, 3))
    tensors = load_file(paths[0])
    aux = tensors["aux_hidden_states"].unflatten(2, (3, 64))[:, :, [2, 0, 1]]
    save_file(tensors | {"aux_hidden_states": aux.flatten(2).contiguous()}, paths[0])
    dump = open_dump("nemo", paths[0])
    assert dump.aux_layers == LAYERS
    found = list(_read(dump, completion).values())
    assert len(found) == 4
    assert np.array_equal(found[0].aux_hidden_states, dumped[0].own.aux_hidden_states)


def test_padding_is_cut_and_entered(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    write_specforge(tmp_path / "a", dumped[:2], padding=9)
    write_specforge(tmp_path / "b", dumped[:2])
    assert _changes(tmp_path / "a", completion) == [Change.PADDING_CUT] * 2
    assert _changes(tmp_path / "b", completion) == []


def test_a_row_is_cut_to_the_data_set_s_length(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    write_specforge(tmp_path, dumped[:1])
    short = replace(completion, limits=replace(completion.limits, max_length=30))
    assert _changes(tmp_path, short) == [Change.CUT_TO_MAX_LENGTH]
    (sample,) = _read(open_dump("specforge", tmp_path), short).values()
    assert len(sample) == 30
    assert np.array_equal(sample.aux_hidden_states, dumped[0].own.aux_hidden_states[:30])


def _with(key: str, change: Callable[[torch.Tensor], object]) -> Callable[[dict], None]:
    def apply(document: dict) -> None:
        document[key] = change(document[key])

    return apply


def _nan(states: torch.Tensor) -> torch.Tensor:
    states[0, 5, 7] = torch.nan
    return states


def _unknown(ids: torch.Tensor) -> torch.Tensor:
    ids[3] = 70_000
    return ids


BROKEN: dict[str, tuple[Callable[[dict], None], Reason, str]] = {
    "hidden size": (
        _with("hidden_state", lambda one: one[..., :32]),
        Reason.WRONG_SHAPE,
        r"last states are .*32\], expected \[tokens, 64\]",
    ),
    "aux layers": (
        _with("aux_hidden_state", lambda one: one[..., :128]),
        Reason.WRONG_SHAPE,
        r"aux states are .*128\], expected \[tokens, 192\] \(3 layers of 64\)",
    ),
    "tokens of states": (
        _with("aux_hidden_state", lambda one: one[:, :-2]),
        Reason.WRONG_SHAPE,
        "aux states of",
    ),
    "tokens of last states": (
        _with("hidden_state", lambda one: one[:, :-2]),
        Reason.WRONG_SHAPE,
        "last states of",
    ),
    "length of mask": (
        _with("loss_mask", lambda one: one[:-1]),
        Reason.BAD_TOKENS,
        "loss mask has",
    ),
    "values of mask": (_with("loss_mask", lambda one: one * 3), Reason.BAD_TOKENS, "has 3, not 0"),
    "no supervision": (
        _with("loss_mask", torch.zeros_like),
        Reason.TOO_FEW_SUPERVISED_TOKENS,
        "0 in the first",
    ),
    "float ids": (_with("input_ids", torch.Tensor.float), Reason.BAD_TOKENS, "token ids are"),
    "unknown id": (_with("input_ids", _unknown), Reason.UNKNOWN_TOKEN, "70000 at position 3"),
    "NaN in aux": (
        _with("aux_hidden_state", _nan),
        Reason.BAD_STATES,
        r"aux states are NaN or infinite at position 5 \(1 of",
    ),
    "NaN in last": (_with("hidden_state", _nan), Reason.BAD_STATES, "last states are NaN"),
    "integer states": (
        _with("hidden_state", torch.Tensor.int),
        Reason.WRONG_SHAPE,
        "last states are torch.int32",
    ),
    "half a mask": (
        _with("loss_mask", lambda one: one * 0.6),
        Reason.BAD_TOKENS,
        "other values than 0 and 1",
    ),
    "states without values": (
        _with("aux_hidden_state", lambda one: one.to("meta")),
        Reason.UNREADABLE,
        "aux_hidden_state is on the device meta",
    ),
    "no tensor": (_with("input_ids", lambda one: one.tolist()), Reason.WRONG_KEYS, "is no tensor"),
    "missing": (lambda one: one.pop("loss_mask"), Reason.WRONG_KEYS, "loss_mask is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_named(
    tmp_path: Path, name: str, dumped: list[Row], completion: Completion
) -> None:
    breaks, reason, message = BROKEN[name]
    document = specforge_document(dumped[0])
    breaks(document)
    torch.save(document, tmp_path / "a.ckpt")
    with pytest.raises(RejectedRecord, match=message) as found:
        _read(open_dump("specforge", tmp_path), completion)
    assert found.value.reason is reason
    assert found.value.location == str(tmp_path / "a.ckpt")


def test_padding_on_the_left_is_refused(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    document = specforge_document(dumped[0])
    document["attention_mask"] = torch.ones_like(document["input_ids"])
    document["attention_mask"][:3] = 0
    torch.save(document, tmp_path / "a.ckpt")
    with pytest.raises(RejectedRecord) as found:
        _read(open_dump("specforge", tmp_path), completion)
    assert found.value.reason is Reason.PADDED_ON_THE_LEFT


def test_an_empty_folder_and_another_format_are_named(tmp_path: Path, dumped: list[Row]) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        open_dump("specforge", tmp_path / "no")
    with pytest.raises(ConfigError, match=r"no \.ckpt or \.ckpt\.gz; it has no files"):
        open_dump("specforge", tmp_path)
    write_speculators(tmp_path, dumped[:1])
    with pytest.raises(ConfigError, match=r"it has .*1 .safetensors.*Name the folder"):
        open_dump("specforge", tmp_path)
    with pytest.raises(ConfigError, match="no shard-"):
        open_dump("nemo", tmp_path)


def test_a_manifest_that_is_missing_damaged_or_newer_is_named(
    tmp_path: Path, dumped: list[Row]
) -> None:
    write_nemo(tmp_path, dumped, aux_layers=LAYERS)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(ConfigError, match="format_version 3; this release reads 2"):
        open_dump("nemo", tmp_path)
    manifest.write_text(text[:20], encoding="utf-8")
    with pytest.raises(CorruptError, match="is damaged"):
        open_dump("nemo", tmp_path)
    manifest.unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        open_dump("nemo", tmp_path)


def test_a_cut_shard_is_one_row_of_the_ledger(tmp_path: Path, dumped: list[Row]) -> None:
    paths = write_nemo(tmp_path, dumped, aux_layers=LAYERS)
    paths[0].write_bytes(paths[0].read_bytes()[:-10])
    first, *others = open_dump("nemo", tmp_path).rows
    assert first.location == str(paths[0])
    with pytest.raises(RejectedRecord):
        first.read()
    assert [row.location for row in others] == [f"{paths[1]}#{n}" for n in range(2)]


def test_the_target_recognises_its_own_states(
    tmp_path: Path, target: TargetConfig, dumped: list[Row], completion: Completion
) -> None:
    model = TargetModel.load(target)
    for name, (format_name, write) in WRITERS.items():
        write(tmp_path / name, dumped)
        found = _read(open_dump(format_name, tmp_path / name), completion)
        agreements = compare(model, list(found.values()), list(found))
        assert [one.problem for one in agreements] == [""] * len(dumped), name


def test_other_layers_another_norm_and_another_target_are_told_apart(
    tmp_path: Path, target: TargetConfig, dumped: list[Row], completion: Completion
) -> None:
    write_model_optimizer(tmp_path / "normed", dumped[:2])
    write_model_optimizer(tmp_path / "unnormed", dumped[:2], is_prenorm=True)
    model = TargetModel.load(target)

    def problem(path: Path, expected: TargetModel, how: Completion) -> str:
        found = _read(open_dump("model-optimizer", path), how)
        return compare(expected, list(found.values()), list(found))[0].problem

    others = TargetModel.load(target.model_copy(update={"aux_layers": (1, 4, 6)}))
    text = problem(tmp_path / "normed", others, completion)
    assert "nearest to those of layers [1, 3, 4], not of [1, 4, 6]" in text
    unnormed = replace(completion, last_state="normed")
    assert "before the final norm" in problem(tmp_path / "unnormed", model, unnormed)
    right = replace(completion, last_state="unnormed")
    assert problem(tmp_path / "unnormed", model, right) == ""
    garbage = [replace(row, own=_with_random_aux(row.own)) for row in dumped[:1]]
    write_model_optimizer(tmp_path / "garbage", garbage)
    assert problem(tmp_path / "garbage", model, completion) != ""


@pytest.mark.parametrize("name", WRITERS)
def test_sound_rows_pass_the_check_of_every_row(
    tmp_path: Path, name: str, dumped: list[Row], completion: Completion
) -> None:
    format_name, write = WRITERS[name]
    write(tmp_path, dumped)
    checking = replace(completion, checks_every_row=True)
    assert len(_read(open_dump(format_name, tmp_path), checking)) == len(dumped)


def test_swapped_states_and_a_flipped_bit_are_found(
    tmp_path: Path, dumped: list[Row], completion: Completion
) -> None:
    checking = replace(completion, checks_every_row=True)

    def rejected(document: dict[str, torch.Tensor]) -> str:
        torch.save(document, tmp_path / "a.ckpt")
        assert _read(open_dump("specforge", tmp_path), completion)  # unnoticed
        with pytest.raises(RejectedRecord) as found:
            _read(open_dump("specforge", tmp_path), checking)
        assert found.value.reason is Reason.NOT_REPRODUCED
        return found.value.detail

    document = specforge_document(dumped[0])
    other = specforge_document(dumped[1])
    num = len(document["input_ids"])
    assert len(other["input_ids"]) > num
    swapped = {key: other[key][:, :num] for key in ("hidden_state", "aux_hidden_state")}
    assert "first aux state is not what the target has" in rejected(document | swapped)
    last = {"hidden_state": other["hidden_state"][:, :num]}
    assert "does not follow from its last aux state" in rejected(document | last)
    bits = document["aux_hidden_state"].view(torch.int16)
    bits[0, 9, 5] ^= 1 << 14  # the highest bit of the exponent
    assert "at position 9" in rejected(document)


def _with_random_aux(own: HiddenStateSample) -> HiddenStateSample:
    random = torch.randn(own.aux_hidden_states.shape).bfloat16().view(torch.uint16).numpy()
    last = torch.randn(own.last_hidden_state.shape).bfloat16().view(torch.uint16).numpy()
    return replace(own, aux_hidden_states=random, last_hidden_state=last)


def test_the_pad_token_is_that_of_the_tiny_tokenizer(completion: Completion) -> None:
    assert PADDING in completion.shape.padding_ids - completion.shape.stop_ids
