"""The draft's vocabulary belongs to the data of its run."""

import shutil
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.samples import TokenizedSample, sample_id
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.token_file import TokenFile, write_token_file
from eagle_core.training import checkpoint
from eagle_core.training.config import TrainingConfig
from eagle_core.training.loader import LoaderState
from flows.bridge.draft_setup import VOCABULARY_NAME, choose_vocabulary

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
