"""The draft of a run: its vocabulary belongs to the data, its sizes to the first checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from eagle_core.draft.config import DraftConfig
from eagle_core.draft.settings import DraftSettings
from eagle_core.draft.vocabulary import Coverage, DraftVocabulary, SourceCoverage
from eagle_core.errors import ConfigError, MismatchError
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from eagle_core.training import checkpoint
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import LoaderState
from flows.bridge.draft_setup import (
    VOCABULARY_NAME,
    choose_vocabulary,
    require_start_fits,
    set_up_draft,
)

TRAINING = TrainingConfig(draft_vocab_size=10)


def token_file(path: Path, first: int) -> TokenFile:
    """Write one sample of the ids from `first` on."""
    ids = np.arange(first, first + 20, dtype=np.int32)
    mask = np.ones(20, dtype=np.bool_)
    sample = TokenizedSample(sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask)
    return write_token_file(path, [sample])


def test_a_vocabulary_of_other_data_or_size_counts_only_if_a_checkpoint_depends_on_it(
    tmp_path: Path, target: TargetConfig
) -> None:
    run_path = tmp_path / "run"
    old, new = token_file(tmp_path / "train-old.arrow", 100), token_file(tmp_path / "n.arrow", 200)

    def chosen(tokens: TokenFile, size: int = 10) -> set[int]:
        training = TRAINING.model_copy(update={"draft_vocab_size": size})
        choose_vocabulary(target, training, tokens, run_path)
        vocabulary = DraftVocabulary.load(run_path / VOCABULARY_NAME)
        return set(vocabulary.target_ids.tolist()) - {0, 1}  # control tokens are always in

    assert chosen(old) == set(range(100, 108))
    assert DraftVocabulary.load(run_path / VOCABULARY_NAME).source_id == "train-old"
    assert chosen(old, size=6) == set(range(100, 104))  # too large for the GPU, made smaller
    assert chosen(new) == set(range(200, 208))  # killed before the first checkpoint, other data
    record = checkpoint.Checkpoint(
        step=1,
        loader=LoaderState(source_id="s", seed=0, epoch=0, next_sample=0),
        identity={},
        figures={},
    )
    checkpoint.save(run_path, record, {}, {}, keep_last=1)
    assert chosen(old) == set(range(200, 208))


def test_special_tokens_without_an_embedding_are_not_in_the_vocabulary(
    tmp_path: Path, target: TargetConfig, tiny_target_path: Path
) -> None:
    folder = shutil.copytree(tiny_target_path, tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    num_rows = len(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<beyond>"})
    tokenizer.save_pretrained(folder)
    own = target.model_copy(update={"model": str(folder)})
    assert max(conversation_tokenizer(own).special_token_ids()) == num_rows
    choose_vocabulary(own, TRAINING, token_file(tmp_path / "train.arrow", 100), tmp_path / "run")
    vocabulary = DraftVocabulary.load(tmp_path / "run" / VOCABULARY_NAME)
    assert {0, 1} < set(vocabulary.target_ids.tolist()) <= set(range(num_rows))


def placed(first: int, num: int, location: str) -> TokenizedSample:
    """Return a sample of the ids from `first` on, the first of them not supervised."""
    ids = np.arange(first, first + num + 1, dtype=np.int32)
    mask = np.arange(num + 1) > 0
    return TokenizedSample(
        sample_id=sample_id(ids, mask), input_ids=ids, loss_mask=mask, location=location
    )


def test_each_source_has_its_share_of_the_vocabulary(tmp_path: Path, target: TargetConfig) -> None:
    samples = [
        placed(100, 3, "chat: a.jsonl, record 0"),
        placed(100, 2, "chat: a.jsonl, record 1"),
        placed(200, 5, "table: b.csv, record 0"),
    ]
    sources = {"chat": 2, "table": 1, "empty": 0}
    tokens = write_token_file(tmp_path / "train.arrow", samples, sources=sources)
    training = TRAINING.model_copy(update={"draft_vocab_size": 2 + 4})
    found = choose_vocabulary(target, training, tokens, tmp_path / "run")
    # Of 101 and 102 there are two each; 103 and the lowest of the others fill what is left.
    assert found.by_source == {
        "chat": SourceCoverage(num_samples=2, num_supervised=5, share=1.0),
        "table": SourceCoverage(num_samples=1, num_supervised=5, share=0.2),
        "empty": SourceCoverage(num_samples=0, num_supervised=0, share=1.0),
    }
    assert found.share == 0.6
    assert choose_vocabulary(target, training, tokens, tmp_path / "run") == found
    single = write_token_file(tmp_path / "single.arrow", samples)
    same = choose_vocabulary(target, training, single, tmp_path / "other")
    assert same == Coverage(share=0.6)
    both = [DraftVocabulary.load(tmp_path / run / VOCABULARY_NAME) for run in ("run", "other")]
    assert both[0].fingerprint == both[1].fingerprint


def changed_target(path: Path, folder: Path, **changes: object) -> TargetConfig:
    """Return a copy of a target in `folder` with another configuration."""
    shutil.copytree(path, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return TargetConfig(name="changed", model=str(folder), dtype="float32", device="cpu")


def begin(run_path: Path, draft: DraftConfig, *, version: str) -> None:
    """Write a checkpoint as this version does, or one that recorded only the first fields."""
    identity = draft.identity() if version == "this" else draft.model_dump(include=FIRST)
    checkpoint.save(
        run_path,
        checkpoint.Checkpoint(
            step=1,
            loader=LoaderState(source_id="s", seed=0),
            identity={"draft": identity},
            figures={},
        ),
        *({}, {}),
        keep_last=1,
    )


FIRST = {"hidden_size", "target_hidden_size", "intermediate_size", "num_attention_heads"}
FIRST |= {"num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size", "rms_norm_eps"}
FIRST |= {"rope_theta", "max_position_embeddings", "fc_norm", "norm_output"}
SCALING = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def test_a_run_keeps_the_draft_that_it_began_with(
    tmp_path: Path, target: TargetConfig, tiny_target_path: Path
) -> None:
    run_path = tmp_path / "run"
    choose_vocabulary(target, TRAINING, token_file(tmp_path / "train.arrow", 100), run_path)
    settings = DraftSettings(fc_norm=True)
    first = set_up_draft(target, TRAINING, run_path, settings).draft.config
    assert first.fc_norm
    begin(run_path, first, version="this")
    assert set_up_draft(target, TRAINING, run_path).draft.config == first
    others = set_up_draft(target, TRAINING, run_path, DraftSettings()).draft.config
    assert others != first  # for the trainer to refuse, field by field
    wide = changed_target(tiny_target_path, tmp_path / "wide", vocab_size=4096)
    with pytest.raises(MismatchError, match=r"is of a target with vocabulary \d+ \(now 4096\)"):
        set_up_draft(wide, TRAINING, run_path)


def test_a_run_keeps_heads_that_are_no_longer_chosen(tmp_path: Path, target: TargetConfig) -> None:
    run_path = tmp_path / "run"
    choose_vocabulary(target, TRAINING, token_file(tmp_path / "train.arrow", 100), run_path)
    heads = DraftSettings(num_attention_heads=2, num_key_value_heads=1)
    begun = set_up_draft(target, TRAINING, run_path, heads).draft.config
    begin(run_path, begun, version="older")
    assert set_up_draft(target, TRAINING, run_path, DraftSettings()).draft.config == begun


def test_another_head_than_at_the_beginning_is_named(tmp_path: Path, target: TargetConfig) -> None:
    run_path = tmp_path / "run"
    choose_vocabulary(target, TRAINING, token_file(tmp_path / "train.arrow", 100), run_path)
    begun = set_up_draft(target, TRAINING, run_path, DraftSettings()).draft.config
    begin(run_path, begun, version="this")
    with pytest.raises(MismatchError, match=r"began with draft\.target_head=false; restore it"):
        set_up_draft(target, TRAINING, run_path, DraftSettings(target_head=True))


def test_settings_that_contradict_each_other_are_refused_before_states_are_made(
    tmp_path: Path, target: TargetConfig
) -> None:
    wrong = DraftSettings(num_key_value_heads=3)
    with pytest.raises(ConfigError, match=r"set draft\.num_key_value_heads to a divisor"):
        require_start_fits(target, TRAINING, tmp_path / "run", wrong)


@pytest.mark.parametrize("version", ["this", "older"])
def test_a_run_that_began_with_a_plain_rotary_embedding_keeps_it(
    tmp_path: Path, target: TargetConfig, tiny_target_path: Path, version: str
) -> None:
    run_path = tmp_path / "run"
    choose_vocabulary(target, TRAINING, token_file(tmp_path / "train.arrow", 100), run_path)
    scaled = changed_target(tiny_target_path, tmp_path / "scaled", rope_parameters=SCALING)
    fresh = set_up_draft(scaled, TRAINING, run_path, DraftSettings()).draft.config
    assert fresh.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    plain = DraftSettings(rope_scaling="none")
    begun = set_up_draft(scaled, TRAINING, run_path, plain).draft.config
    begin(run_path, begun, version=version)
    for settings in (None, DraftSettings(), plain):
        assert set_up_draft(scaled, TRAINING, run_path, settings).draft.config == begun


def test_with_the_targets_head_the_vocabulary_is_the_targets(
    tmp_path: Path, target: TargetConfig
) -> None:
    settings = DraftSettings(target_head=True)
    tokens = token_file(tmp_path / "train.arrow", 100)
    coverage = choose_vocabulary(target, TRAINING, tokens, tmp_path / "run", settings)
    assert coverage.share == 1
