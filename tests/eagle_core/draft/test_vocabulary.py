"""Which tokens the draft may propose."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_core.draft.vocabulary import DraftVocabulary, count_supervised_tokens
from eagle_core.errors import ConfigError, CorruptError, MismatchError
from eagle_core.samples import TokenizedSample


def test_most_frequent_first_ties_by_id_always_in() -> None:
    counts = np.array([0, 5, 2, 2, 9, 2, 0])
    vocabulary = DraftVocabulary.build(counts, size=4, always=[6])
    assert vocabulary.target_ids.tolist() == [1, 2, 4, 6]
    assert vocabulary.d2t.tolist() == [1, 1, 2, 3]
    assert vocabulary.t2d.tolist() == [False, True, True, False, True, False, True]
    assert vocabulary.coverage(counts) == (5 + 2 + 9) / 20
    assert vocabulary.coverage(np.zeros(7, dtype=np.int64)) == 1.0
    assert len(vocabulary) == 4


@given(st.data())
def test_the_choice_is_sound(data: st.DataObject) -> None:
    counts = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=30)))
    always = data.draw(st.sets(st.integers(0, len(counts) - 1)))
    size = data.draw(st.integers(max(1, len(always)), len(counts)))
    vocabulary = DraftVocabulary.build(counts, size=size, always=always)
    chosen = set(vocabulary.target_ids.tolist())
    assert len(chosen) == size
    assert always <= chosen
    omitted = set(range(len(counts))) - chosen
    for one in chosen - always:
        assert all((-counts[one], one) < (-counts[other], other) for other in omitted)
    other = DraftVocabulary(d2t=vocabulary.d2t, t2d=np.append(vocabulary.t2d, False))
    assert other.fingerprint != vocabulary.fingerprint


def test_it_survives_the_disk(tmp_path: Path) -> None:
    vocabulary = DraftVocabulary.build(np.arange(50), size=7)
    vocabulary.save(tmp_path / "v.safetensors")
    loaded = DraftVocabulary.load(tmp_path / "v.safetensors")
    assert loaded.fingerprint == vocabulary.fingerprint
    assert loaded.d2t.dtype == np.int64
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_other_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    DraftVocabulary.build(np.arange(50), size=7, source_id="one").save(path)
    assert DraftVocabulary.load(path, source_id="one").source_id == "one"
    assert DraftVocabulary.load(path).source_id == "one"
    with pytest.raises(MismatchError, match="built from one, not from two"):
        DraftVocabulary.load(path, source_id="two")


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    with pytest.raises(ConfigError, match="no draft vocabulary"):
        DraftVocabulary.load(path)
    DraftVocabulary.build(np.arange(50), size=7).save(path)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptError, match=r"v\.safetensors"):
        DraftVocabulary.load(path)
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="contradict"):
        DraftVocabulary.load(path)


@pytest.mark.parametrize(
    ("size", "always", "message"),
    [(0, [], "1 to 10"), (11, [], "1 to 10"), (2, [1, 2, 3], "3 special"), (5, [10], "do not fit")],
)
def test_impossible_sizes_are_refused(size: int, always: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DraftVocabulary.build(np.ones(10, dtype=np.int64), size=size, always=always)


def sample(ids: list[int], mask: list[int]) -> TokenizedSample:
    return TokenizedSample(
        sample_id="s",
        input_ids=np.array(ids, dtype=np.int32),
        loss_mask=np.array(mask, dtype=np.bool_),
    )


def test_only_supervised_tokens_count() -> None:
    counts = count_supervised_tokens([sample([1, 2, 2, 3], [0, 1, 1, 0]), sample([4], [0])], 5)
    assert counts.tolist() == [0, 0, 2, 0, 0]


def test_a_foreign_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="token 5"):
        count_supervised_tokens([sample([5], [1])], 5)
