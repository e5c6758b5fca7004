"""Decoding while a draft trains: training's bits stay, and each draft is decoded once."""

import json
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from eagle_core.errors import ConfigError, CorruptError, TransientError
from eagle_core.tracking.metrics_file import MetricsFile
from eagle_core.training import checkpoint
from eagle_core.training.config import TrainingConfig
from eagle_core.training.decoded_points import (
    DECODED_NAME,
    Decoded,
    DecodedPoint,
    add_points,
    read_points,
    weights_digest,
)
from eagle_core.training.result import Progress, TrainingResult
from eagle_core.training.trainer import train
from tests.eagle_core.random_source import RandomSource, random_draft
from tests.eagle_core.training.test_trainer import (
    CONFIG,
    InterruptedHereError,
    assert_equal_bits,
    interrupt_at,
)

DECODING = CONFIG.model_copy(update={"decode_every": 3, "checkpoint_every": 4})
STEPS = [3, 6, 9, 12]
Act = Callable[[Progress], None]


def nothing(_progress: Progress) -> None:
    """Do nothing after a step."""


class NotedDecoder:
    """Counts what it decodes: the acceptance length follows from the weights alone."""

    def __init__(self, *, is_awaited: bool = True, prompts: str = "these") -> None:
        self.is_awaited, self.prompts = is_awaited, prompts
        self.drafts: list[str] = []
        self.unanswered: list[tuple[Future[Decoded], float]] = []

    def decode(self, weights: Mapping[str, Tensor]) -> "Future[Decoded]":
        assert not self.unanswered  # at most one at a time
        assert "embed_tokens.weight" not in weights
        self.drafts.append(weights_digest(weights))
        length = 1 + float(weights["fc.weight"].abs().mean())
        self.unanswered.append((Future(), length))
        future = self.unanswered[0][0]
        if self.is_awaited:
            self.answer()
        return future

    def answer(self) -> None:
        """End what is being decoded."""
        for future, length in self.unanswered:
            future.set_result(Decoded(acceptance_length=length, acceptance_by_depth=(0.5,)))
        self.unanswered.clear()


def run(
    path: Path,
    decoder: Any = None,
    config: TrainingConfig = DECODING,
    *,
    on_progress: Act = nothing,
) -> tuple[dict[str, Tensor], TrainingResult]:
    """Train a small draft in `path`; return its weights and the result."""
    draft, head = random_draft()
    path.mkdir(exist_ok=True)
    with MetricsFile(path) as tracker:
        result = train(
            config=config,
            draft=draft,
            target_lm_head=head,
            source=RandomSource(),
            held_out=RandomSource(num_samples=4, seed=1),
            run_path=path,
            tracker=tracker,
            decoder=decoder,
            on_progress=on_progress,
        )
    return draft.state_dict(), result


def logged(path: Path) -> list[tuple[int, float]]:
    """Return each line with a decoded length, in the order in which they were written."""
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], line["metrics"]["decoding/acceptance_length"])
        for line in lines
        if "decoding/acceptance_length" in line["metrics"]
    ]


def test_nothing_is_decoded_for_a_best_checkpoint_that_decoding_decides() -> None:
    with pytest.raises(ValidationError, match="best_by is decoding, but decode_every is 0"):
        TrainingConfig(best_by="decoding")
    with pytest.raises(ValidationError, match="decode_device"):
        TrainingConfig(decode_device="gpu")


def test_a_run_that_goes_on_may_change_how_it_decodes() -> None:
    other = CONFIG.model_copy(
        update={
            "decode_every": 7,
            "decode_prompts": 3,
            "decode_new_tokens": 5,
            "decode_device": "cpu",
            "best_by": "decoding",
        }
    )
    assert other.identity() == CONFIG.identity()


def test_training_has_the_same_bits_with_and_without(tmp_path: Path) -> None:
    expected, plain = run(tmp_path / "without", None, CONFIG)
    decoder = NotedDecoder()
    found, result = run(tmp_path / "with", decoder)
    assert_equal_bits(found, expected)
    assert result.figures == plain.figures
    assert plain.decoded is None
    assert [step for step, _ in logged(tmp_path / "with")] == STEPS
    assert result.decoded is not None
    assert result.decoded.step == 12
    assert result.decoded.decoded.acceptance_length == 1 + float(found["fc.weight"].abs().mean())


def test_without_a_decoder_nothing_is_decoded(tmp_path: Path) -> None:
    _, result = run(tmp_path)
    assert result.decoded is None
    assert not (tmp_path / DECODED_NAME).exists()


def test_the_last_draft_is_decoded_wherever_it_falls(tmp_path: Path) -> None:
    run(tmp_path, NotedDecoder(), DECODING.model_copy(update={"decode_every": 5}))
    assert [step for step, _ in logged(tmp_path)] == [5, 10, 12]


@pytest.mark.parametrize("step", [2, 3, 4, 7, 10, 11])
def test_interrupted_and_resumed_decodes_no_draft_twice(tmp_path: Path, step: int) -> None:
    expected, _ = run(tmp_path / "whole", NotedDecoder())
    decoder = NotedDecoder()
    with pytest.raises(InterruptedHereError):
        run(tmp_path / "broken", decoder, on_progress=interrupt_at(step))
    found, _ = run(tmp_path / "broken", decoder)
    assert_equal_bits(found, expected)
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")
    assert len(set(decoder.drafts)) == len(decoder.drafts) == len(STEPS)
    run(tmp_path / "broken", decoder)  # it is finished
    assert len(decoder.drafts) == len(STEPS)


def test_in_the_background_training_goes_on_and_the_point_keeps_its_step(tmp_path: Path) -> None:
    passed: list[int] = []

    def answer_late(progress: Progress) -> None:
        if decoder.unanswered:
            passed.append(progress.step)
        if progress.step in {4, 8, 10, 11}:  # before a checkpoint and the next draft
            decoder.answer()

    class Background(NotedDecoder):
        """Ends the last draft at once: no later step would."""

        def decode(self, weights: Mapping[str, Tensor]) -> "Future[Decoded]":
            future = super().decode(weights)
            if len(self.drafts) == len(STEPS):
                self.answer()
            return future

    decoder = Background(is_awaited=False)
    found, result = run(tmp_path / "aside", decoder, on_progress=answer_late)
    expected, _ = run(tmp_path / "here", NotedDecoder())
    assert_equal_bits(found, expected)
    assert passed == [4, 7, 8, 10]
    assert logged(tmp_path / "aside") == logged(tmp_path / "here")
    assert result.decoded is not None
    assert result.decoded.step == 12


def test_a_run_killed_while_it_decodes_knows_all_drafts_in_the_end(tmp_path: Path) -> None:
    """Its newest checkpoint is of the very draft whose decoding was lost."""
    config = DECODING.model_copy(update={"checkpoint_every": 3})
    decoder = NotedDecoder(is_awaited=False)
    with pytest.raises(InterruptedHereError):
        run(tmp_path, decoder, config, on_progress=interrupt_at(4))
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-00000003"
    assert logged(tmp_path) == []
    again = NotedDecoder()
    run(tmp_path, again, config)
    assert [step for step, _ in logged(tmp_path)] == STEPS
    assert again.drafts[0] == decoder.drafts[0]


def test_sigterm_ends_with_what_is_being_decoded(tmp_path: Path) -> None:
    def terminate(progress: Progress) -> None:
        if progress.step == 3:
            signal.raise_signal(signal.SIGTERM)

    _, result = run(tmp_path, NotedDecoder(), on_progress=terminate)
    assert result.stopped
    assert [step for step, _ in logged(tmp_path)] == [3]


def terminate_at(step: int, *, then: Callable[[], None] = lambda: None) -> Act:
    """Return a callback that asks the run to stop once `step` is done, and then does more."""

    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            signal.raise_signal(signal.SIGTERM)
            then()

    return on_progress


BY_DECODING = DECODING.model_copy(
    update={"best_by": "decoding", "keep_last": 1, "checkpoint_every": 100, "decode_every": 4}
)


class KilledHereError(BaseException):
    """Ends a run where it is, as a kill would."""


class EndsAfterSave(NotedDecoder):
    """In the background: ends what is being decoded once a later checkpoint is there."""

    def __init__(self, path: Path, outcome: BaseException | float) -> None:
        super().__init__(is_awaited=False)
        self._path, self._outcome = path, outcome

    def decode(self, weights: Mapping[str, Tensor]) -> "Future[Decoded]":  # noqa: ARG002
        first, outcome, path = checkpoint.newest(self._path), self._outcome, self._path

        class Late(Future[Decoded]):
            """Is waited for only after the save that a stop asks for."""

            def done(self) -> bool:
                if not super().done() and checkpoint.newest(path) != first:
                    if isinstance(outcome, KilledHereError):
                        raise outcome
                    if isinstance(outcome, BaseException):
                        self.set_exception(outcome)
                    else:
                        self.set_result(Decoded(acceptance_length=outcome, acceptance_by_depth=()))
                return super().done()

        return Late()


def kept(path: Path) -> list[int]:
    """Return the steps of the checkpoints of a run."""
    return sorted(int(folder.name[5:]) for folder in (path / "checkpoints").iterdir())


def best_step(path: Path) -> int:
    """Return the step of the best checkpoint, as decoded."""
    found = checkpoint.find_best(path, "decoding")
    assert found is not None
    return found.step


def test_a_stop_keeps_the_checkpoint_that_is_being_decoded(tmp_path: Path) -> None:
    decoder = EndsAfterSave(tmp_path, 1.9)
    _, result = run(tmp_path, decoder, BY_DECODING, on_progress=terminate_at(6))
    assert result.stopped
    assert kept(tmp_path) == [4, 6]
    assert best_step(tmp_path) == 4
    run(tmp_path, Scripted(1.2, 1.1, 1.1), BY_DECODING)
    assert kept(tmp_path) == [4, 12]
    assert best_step(tmp_path) == 4


def test_a_kill_during_a_stop_costs_no_point_that_decides(tmp_path: Path) -> None:
    decoder = EndsAfterSave(tmp_path, KilledHereError())
    with pytest.raises(KilledHereError):
        run(tmp_path, decoder, BY_DECODING, on_progress=terminate_at(6))
    assert kept(tmp_path) == [4, 6]
    assert logged(tmp_path) == []
    run(tmp_path, Scripted(1.9, 1.2, 1.1, 1.1), BY_DECODING)
    assert logged(tmp_path) == [(4, 1.9), (6, 1.2), (8, 1.1), (12, 1.1)]
    assert kept(tmp_path) == [4, 12]


def test_a_decoding_that_fails_costs_no_step(tmp_path: Path) -> None:
    failed = Future[Decoded]()

    class Fails(NotedDecoder):
        """Fails in the background."""

        def decode(self, weights: Mapping[str, Tensor]) -> "Future[Decoded]":  # noqa: ARG002
            return failed

    def fail(progress: Progress) -> None:
        if progress.step == 6:
            failed.set_exception(TransientError("killed by signal 9"))

    with pytest.raises(TransientError, match="killed by signal 9"):
        run(tmp_path, Fails(is_awaited=False), BY_DECODING, on_progress=fail)
    assert kept(tmp_path) == [4, 6]
    again = NotedDecoder()
    found, _ = run(tmp_path, again, BY_DECODING)
    assert_equal_bits(found, run(tmp_path / "whole", None, CONFIG)[0])
    assert [step for step, _ in logged(tmp_path)] == [4, 6, 8, 12]


def test_a_decoding_that_fails_at_once_is_reported_after_the_save(tmp_path: Path) -> None:
    class Refuses(NotedDecoder):
        """Fails in this process."""

        def decode(self, weights: Mapping[str, Tensor]) -> "Future[Decoded]":  # noqa: ARG002
            raise ConfigError("too little memory")

    config = DECODING.model_copy(update={"checkpoint_every": 100})
    with pytest.raises(ConfigError, match="too little memory"):
        run(tmp_path, Refuses(), config)
    assert kept(tmp_path) == [3]


def test_a_signal_that_ends_the_decoder_too_is_a_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = EndsAfterSave(tmp_path, TransientError("killed by signal 15"))
    _, result = run(tmp_path, decoder, BY_DECODING, on_progress=terminate_at(6))
    assert result.stopped
    assert kept(tmp_path) == [4, 6]
    assert "step 4 was not decoded: killed by signal 15" in caplog.text


class Scripted(NotedDecoder):
    """Gives lengths in the order of the drafts."""

    def __init__(self, *lengths: float) -> None:
        super().__init__()
        self._lengths = iter(lengths)

    def decode(self, weights: Mapping[str, Tensor]) -> "Future[Decoded]":  # noqa: ARG002
        future: Future[Decoded] = Future()
        length = next(self._lengths)
        future.set_result(Decoded(acceptance_length=length, acceptance_by_depth=(0.5,)))
        return future


def test_decoding_decides_where_it_disagrees_with_the_joint_prefix(tmp_path: Path) -> None:
    """On held-out states the last is the best; decoded, it is the second."""
    every = {"decode_every": 2, "held_out_every": 2, "max_steps": 8, "checkpoint_every": 100}
    config = DECODING.model_copy(update={**every, "keep_last": 1, "best_by": "decoding"})
    _, result = run(tmp_path, Scripted(1.2, 1.9, 1.4, 1.3), config)
    assert result.best is not None
    assert (result.best.step, result.best.by, result.best.length) == (4, "decoding", 1.9)
    by_decoding = checkpoint.best(tmp_path, "decoding")
    assert by_decoding is not None
    assert by_decoding.name == "step-00000004"
    assert checkpoint.best(tmp_path) != by_decoding
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000008"]
    by_prefix = config.model_copy(update={"best_by": "joint_prefix"})
    _, again = run(tmp_path, Scripted(), by_prefix)
    assert again.best is not None
    assert (again.best.step, again.best.by) == (8, "joint_prefix")


def others(*lengths: float) -> Scripted:
    """Return a decoder of other prompts."""
    decoder = Scripted(*lengths)
    decoder.prompts = "others"
    return decoder


def test_lengths_of_other_prompts_do_not_compare(tmp_path: Path) -> None:
    config = DECODING.model_copy(
        update={"best_by": "decoding", "keep_last": 9, "extend": "restretch"}
    )
    long = Scripted(9.0, 9.0)
    run(tmp_path, long, config.model_copy(update={"max_steps": 6}))
    _, result = run(tmp_path, others(1.1, 1.2, 1.3, 1.7, 1.6), config)
    assert result.best is not None
    assert (result.best.step, result.best.length) == (9, 1.7)


def test_other_prompts_judge_the_checkpoints_anew_and_none_is_lost(tmp_path: Path) -> None:
    config = BY_DECODING.model_copy(update={"schedule": "constant"})
    run(tmp_path, Scripted(1.9, 1.2, 1.1), config)
    assert kept(tmp_path) == [4, 12]
    run(tmp_path, others(1.5, 1.4), config)  # it is finished
    assert best_step(tmp_path) == 4
    run(tmp_path, Scripted(1.5, 1.4, 1.3), config.model_copy(update={"max_steps": 14}))
    assert kept(tmp_path) == [4, 14]


def test_a_kill_while_checkpoints_are_judged_anew_leaves_the_best(tmp_path: Path) -> None:
    run(tmp_path, Scripted(1.9, 1.2, 1.1), BY_DECODING)
    before = read_points(tmp_path)
    with pytest.raises(StopIteration):
        run(tmp_path, others(1.1), BY_DECODING)  # ends before the second is decoded
    assert read_points(tmp_path) == before
    assert best_step(tmp_path) == 4


def test_the_best_by_joint_prefix_is_decoded_before_decoding_decides(tmp_path: Path) -> None:
    by_prefix = BY_DECODING.model_copy(
        update={"best_by": "joint_prefix", "held_out_every": 5, "checkpoint_every": 6}
    )
    with pytest.raises(InterruptedHereError):
        run(tmp_path, Scripted(1.1), by_prefix, on_progress=interrupt_at(7))
    step, _ = kept(tmp_path)
    _, result = run(tmp_path, Scripted(1.9, 1.1, 1.1, 1.1), BY_DECODING)
    assert result.best is not None
    assert (result.best.step, result.best.by) == (step, "decoding")


def test_time_in_which_training_waits_for_decoding_is_not_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    class Slow(NotedDecoder):
        """Takes an hour."""

        def decode(self, weights: Mapping[str, Tensor]) -> "Future[Decoded]":
            nonlocal now
            now += 3600
            return super().decode(weights)

    def one_second(_progress: Progress) -> None:
        nonlocal now
        now += 1

    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("eagle_core.training.throughput.time", clock)
    _, plain = run(tmp_path / "without", None, CONFIG, on_progress=one_second)
    _, found = run(tmp_path / "with", Slow(), on_progress=one_second)
    assert found.tokens_per_second == plain.tokens_per_second > 0


def test_a_record_that_is_damaged_is_named(tmp_path: Path) -> None:
    point = DecodedPoint(
        step=3,
        draft="d",
        prompts="p",
        decoded=Decoded(acceptance_length=1.5, acceptance_by_depth=()),
    )
    add_points(tmp_path, point)
    assert read_points(tmp_path) == (point,)
    path = tmp_path / DECODED_NAME
    path.write_text(path.read_text()[:-9])
    with pytest.raises(CorruptError, match=r"decoded\.json is damaged .*delete it"):
        read_points(tmp_path)


def test_a_digest_tells_drafts_apart_by_every_bit() -> None:
    weights = {"a": torch.zeros(3), "b": torch.tensor([True, False])}
    digest = weights_digest(weights)
    assert weights_digest(dict(reversed(weights.items()))) == digest
    assert weights_digest({**weights, "a": torch.tensor([0.0, -0.0, 0.0])}) != digest
    assert weights_digest({**weights, "b": torch.tensor([True, True])}) != digest
