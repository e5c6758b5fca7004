"""Each check, from figures: what is a problem, what is not, and what was never looked at."""

from dataclasses import replace

import numpy as np
import pytest

from eagle_core.diagnosis.agreement import (
    EngineLength,
    Length,
    OverfitResult,
    check_decoding,
    check_engine,
    check_overfit,
    promised_length,
)
from eagle_core.diagnosis.conversation_form import (
    ConversationForm,
    FormCounts,
    check_stop,
    check_template,
    common_ending,
)
from eagle_core.diagnosis.data_quality import (
    Choices,
    check_answers,
    check_cut,
    check_vocabulary,
)
from eagle_core.diagnosis.draft_interface import (
    Exports,
    LayerError,
    NamedLayers,
    check_fit,
    check_layers,
    check_norms,
    check_states,
    check_target,
    check_weights,
)
from eagle_core.diagnosis.export_config import differences
from eagle_core.diagnosis.finding import Finding, State, in_order
from eagle_core.diagnosis.known_runs import KNOWN_RUNS, expected_after
from eagle_core.diagnosis.learning import Accuracies, Seen, check_held_out, check_tokens_seen
from eagle_core.diagnosis.position_range import PositionRange, check_positions
from eagle_core.evaluation.estimate import AcceptanceEstimate
from eagle_core.samples import HiddenStateSample, TokenizedSample
from tests.paths import ROOT

FORM = ConversationForm(
    changed=(),
    has_own_template=True,
    num_answers=100,
    num_prompted=100,
    own_context="<|im_start|>assistant",
    num_whole=80,
    num_stopped=80,
    stops="<|im_end|>",
)
LAYERS = NamedLayers(run=(1, 3, 4), target=(1, 3, 4), store=(1, 3, 4))
SOUND = Exports(names=("serving",), differences=(), stale=())
SEEN = Seen(num_tokens=500_000, num_data_tokens=100_000, is_solved=True)
ACCURACIES = Accuracies(
    training=0.6, held_out=0.58, held_out_length=1.6, held_out_prefixes=(0.4, 0.2)
)
POSITIONS = PositionRange(
    longest_trained=2048, longest_decoded=1500, target_limit=4096, is_scaled=False
)
LENGTH = Length(length=1.5, low=1.4, high=1.6)
NO_ROUNDS = Length(length=float("nan"), low=float("nan"), high=float("nan"))
ESTIMATE = AcceptanceEstimate(
    num_samples=9,
    num_rounds=90,
    acceptance_length=2.4,
    acceptance_interval=(2.05, 2.75),
    acceptance_by_depth=(0.7, 0.6, 0.5, 0.4, 0.3),
    on_policy=1.0,
)
ENGINE = EngineLength(
    engine="vLLM 0.32",
    length=Length(length=2.44, low=2.3, high=2.6),
    own=Length(length=2.5, low=2.35, high=2.65),
    is_sampled=False,
    is_exact=False,
)
OVERFIT = OverfitResult(
    num_texts=4,
    num_steps=200,
    draft_tokens=5,
    training_accuracies=(1.0, 0.99, 0.99, 0.99, 0.99),
    length=5.8,
)


def layers_of(export: Exports | str = SOUND, **changes: object) -> Finding:
    return check_layers(replace(LAYERS, **changes), export)  # type: ignore[arg-type]


def test_problems_come_first_and_what_is_in_order_last() -> None:
    kinds: list[State] = ["ok", "unknown", "problem", "notice", "problem"]
    findings = [Finding(check=str(n), state=kind, found="") for n, kind in enumerate(kinds)]
    assert [finding.check for finding in in_order(findings)] == ["2", "4", "3", "1", "0"]


@pytest.mark.parametrize(
    ("form", "template", "stop"),
    [
        (FORM, "ok", "ok"),
        (replace(FORM, num_prompted=90), "notice", "ok"),
        (replace(FORM, num_prompted=10), "problem", "ok"),
        (replace(FORM, own_context=""), "unknown", "ok"),
        (replace(FORM, num_prompted=0, has_own_template=False), "ok", "ok"),
        (replace(FORM, changed=("template",)), "problem", "ok"),
        (replace(FORM, num_stopped=70), "ok", "notice"),
        (replace(FORM, num_stopped=30), "ok", "problem"),
        (replace(FORM, lost_stops="</s>"), "ok", "problem"),
        (replace(FORM, num_whole=0, num_stopped=0), "ok", "unknown"),
        (replace(FORM, num_answers=0, num_prompted=0), "unknown", "ok"),
        ("token files are gone", "unknown", "unknown"),
    ],
)
def test_template_and_stop_token(
    form: ConversationForm | str, template: State, stop: State
) -> None:
    assert check_template(form).state == template
    assert check_stop(form).state == stop


def test_answers_are_compared_with_the_prompt_before_and_the_stop_behind_them() -> None:
    ids = np.array([9, 5, 6, 20, 2, 7, 6, 21, 3, 5, 6, 22, 23], dtype=np.int32)
    mask = np.array([0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1], dtype=np.bool_)
    sample = TokenizedSample(sample_id="a", input_ids=ids, loss_mask=mask)
    found = FormCounts.of([sample], prompts=[(5, 6)], stop_ids={2}, max_length=13)
    assert (found.num_answers, found.num_prompted) == (3, 2)
    assert found.odd_context == (9, 5, 6, 20, 2, 7, 6)
    assert (found.num_whole, found.num_stopped, found.odd_ending) == (2, 1, 3)
    longer = FormCounts.of([sample], prompts=[(5, 6), (7, 6)], stop_ids={2}, max_length=99)
    assert (longer.num_prompted, longer.num_whole) == (3, 3)
    assert common_ending([[1, 2, 8, 9], [1, 3, 8, 9]]) == (8, 9)


def test_every_part_must_name_the_layers_of_the_run() -> None:
    assert layers_of().state == "ok"
    assert layers_of("there is no export").state == "unknown"
    assert layers_of().found == "1, 3, 4 in run, store, settings, serving"
    assert layers_of(store=None).found == "1, 3, 4 in run, settings, serving"
    assert "store" not in layers_of("there is no export", store=None).found
    assert "the store has layers 2, 3, 4" in layers_of(store=(2, 3, 4)).found
    assert layers_of(target=(0, 3, 4)).state == "problem"
    assert layers_of(has_given_start=True).state == "notice"
    assert layers_of(has_given_start=True, start=(1, 3, 4)).state == "ok"


def test_an_export_that_names_other_layers_or_none_is_a_problem() -> None:
    key = "eagle_aux_hidden_state_layer_ids"
    expected = {"eagle_config": {key: [1, 3, 4]}, key: [2, 4, 5], "hidden_size": 64}
    assert not differences({**expected, "torch_dtype": "float16"}, expected, file="c")
    without = differences({"hidden_size": 64}, expected, file="c")
    assert [(one.part, one.found) for one in without] == [("layers", "missing")] * 2
    (swapped,) = differences({**expected, key: [1, 3, 4]}, expected, file="c")
    assert str(swapped) == f"{key} is [1, 3, 4] in c"
    found = layers_of(replace(SOUND, differences=(swapped,)))
    assert found.state == "problem"
    assert found.expected.startswith("[2, 4, 5]: layers 1, 3, 4")
    (norm,) = differences({**expected, "fc_norm": True}, expected, file="c")
    assert check_norms(replace(SOUND, differences=(norm,))).state == "problem"
    assert not differences({**expected, "fc_norm": False}, expected, file="c")


def test_norms_weights_target_and_states() -> None:
    assert check_norms(SOUND).state == "ok"
    assert check_norms("none").state == "unknown"
    assert check_weights(SOUND, step=3).state == "ok"
    assert check_weights(replace(SOUND, stale=("serving",)), step=3).state == "problem"
    assert check_weights("none", step=3).state == "unknown"
    assert check_target(()).state == "ok"
    assert check_target(("weights",)).state == "problem"
    assert check_fit("head_dim is 32, in the run 16").check == check_target(()).check
    assert check_fit("head_dim is 32, in the run 16").state == "problem"
    assert check_states("").state == "ok"
    assert check_states(None, why_unknown="no store").state == "unknown"
    assert check_states("shard 1 is damaged").state == "problem"


def test_stored_states_must_be_nearest_to_their_own_layer() -> None:
    own = LayerError(layer=3, relative_error=0.12, nearest=3)
    assert check_states("", errors=[own]).state == "ok"
    assert check_states("", errors=[replace(own, nearest=4)]).state == "problem"
    assert check_states("", errors=[replace(own, relative_error=0.9)]).state == "problem"


@pytest.mark.parametrize(
    ("num_own", "num_drafted", "answers", "vocabulary"),
    [(99, 99, "ok", "ok"), (80, 90, "notice", "notice"), (60, 50, "problem", "problem")],
)
def test_answers_and_vocabulary(
    num_own: int, num_drafted: int, answers: State, vocabulary: State
) -> None:
    choices = Choices(num_tokens=100, num_own=num_own, num_drafted=num_drafted)
    assert check_answers(choices).state == answers
    found = check_vocabulary(choices, draft_tokens=5, size=300, training_coverage=1.0)
    assert found.state == vocabulary


def test_low_shares_of_own_choices_may_also_be_sampled_by_the_target() -> None:
    for num_own in (68, 80):
        found = check_answers(Choices(num_tokens=100, num_own=num_own, num_drafted=99))
        assert "another author's" in found.found
        assert "target sampled" in found.found
        assert "regeneration.temperature" in found.what_to_do


def test_without_stored_choices_the_vocabulary_is_not_checked() -> None:
    assert check_answers("no store").state == "unknown"
    for coverage in (0.5, 0.99):  # of the answers from which the vocabulary was chosen
        found = check_vocabulary("no store", draft_tokens=1, size=300, training_coverage=coverage)
        assert found.state == "unknown"
        assert f"{coverage:.1%} of their tokens" in found.found
    choices = Choices(num_tokens=100, num_own=99, num_drafted=50)
    found = check_vocabulary(choices, draft_tokens=1, size=300, training_coverage=1.0)
    assert "about 1.5 tokens" in found.found


def test_choices_are_counted_at_answers_only() -> None:
    ids = np.array([5, 6, 7, 8], dtype=np.int32)
    states = np.zeros((4, 3, 2), np.uint16)
    sample = HiddenStateSample(
        sample_id="a",
        input_ids=ids,
        loss_mask=np.array([False, False, True, True]),
        aux_hidden_states=states,
        last_hidden_state=states[:, 0],
        target_argmax=np.array([1, 7, 9, 1], dtype=np.int32),
        target_logsumexp=np.zeros(4, np.float32),
    )
    t2d = np.zeros(10, dtype=np.bool_)
    t2d[9] = True
    found = Choices.count([sample], t2d)
    assert found == Choices(num_tokens=2, num_own=1, num_drafted=1)


@pytest.mark.parametrize(
    ("training", "held_out", "state"),
    [(0.6, 0.55, "ok"), (0.6, 0.42, "notice"), (0.6, 0.29, "problem"), (0.15, 0.06, "ok")],
)
def test_held_out_accuracy(training: float, held_out: float, state: State) -> None:
    found = check_held_out(replace(ACCURACIES, training=training, held_out=held_out), SEEN)
    assert found.state == state
    assert check_held_out("nothing is held out", SEEN).state == "unknown"


def test_known_runs_ascend_and_are_in_the_guide() -> None:
    guide = (ROOT / "docs" / "guides" / "low-acceptance.md").read_text(encoding="utf-8")
    for run in KNOWN_RUNS:
        tokens = [point[0] for point in run.points]
        assert tokens == sorted(tokens)
        assert all(f"| {length:g}" in guide for _, length in run.points)
    assert expected_after(128_000, has_own_answers=False, is_solved=True).length == 1.334
    own = expected_after(9_000_000, has_own_answers=True, is_solved=False)
    assert (own.length, own.most_tokens) == (1.632, 901_120)


@pytest.mark.parametrize(
    ("num_tokens", "length", "state"),
    [(500_000, 1.6, "notice"), (500_000, 1.1, "problem"), (2_000_000, 1.9, "ok")],
)
def test_tokens_seen(num_tokens: int, length: float, state: State) -> None:
    seen = replace(SEEN, num_tokens=num_tokens)
    assert check_tokens_seen(seen, length, has_own_answers=True).state == state
    assert check_tokens_seen(seen, None, has_own_answers=True).state == "unknown"


def test_what_was_cut() -> None:
    assert check_cut(5, 100, max_length=512).state == "ok"
    assert check_cut(50, 100, max_length=512).state == "notice"
    assert check_cut("gone", 0, max_length=512).state == "unknown"


@pytest.mark.parametrize(
    ("decoded", "replayed", "held_out", "state"),
    [
        (LENGTH, LENGTH, None, "ok"),
        (LENGTH, None, 1.5, "ok"),
        (Length(length=1.1, low=1.05, high=1.15), LENGTH, 1.5, "problem"),
        (LENGTH, None, None, "unknown"),
        (None, LENGTH, 1.5, "unknown"),
        (NO_ROUNDS, LENGTH, 1.5, "unknown"),
        (LENGTH, "the estimate drafted fewer tokens", 1.5, "unknown"),
    ],
)
def test_decoding_accepts_what_stored_states_promise(
    decoded: Length | None, replayed: Length | str | None, held_out: float | None, state: State
) -> None:
    assert check_decoding(decoded, replayed, held_out=held_out).state == state


def test_an_estimate_promises_for_as_many_tokens_as_were_drafted() -> None:
    assert promised_length(ESTIMATE, draft_tokens=5) == Length(length=2.4, low=2.05, high=2.75)
    promised = promised_length(ESTIMATE, draft_tokens=1)
    assert isinstance(promised, Length)
    assert promised.length == pytest.approx(1.7)
    assert (promised.low, promised.high) == pytest.approx((1.525, 1.875))
    decoded = Length(length=1.68, low=1.6, high=1.75)
    assert check_decoding(decoded, promised, held_out=None).state == "ok"
    deeper = promised_length(ESTIMATE, draft_tokens=8)
    assert isinstance(deeper, str)
    assert "8 tokens per round" in check_decoding(decoded, deeper, held_out=1.5).found


def test_unequal_texts_are_a_problem() -> None:
    found = check_decoding(LENGTH, LENGTH, held_out=None, warning="2 of 4 texts differ")
    assert (found.state, found.found) == ("problem", "2 of 4 texts differ")


def test_an_engine_accepts_as_much() -> None:
    assert check_engine(ENGINE).state == "ok"
    lower = replace(ENGINE, length=Length(length=2.1, low=2.0, high=2.2))
    assert check_engine(lower).state == "problem", "the intervals do not overlap"
    assert check_engine(None).state == "unknown"
    outdated = check_engine("evaluation-vllm.json: of another version of Eyas")
    assert outdated.state == "unknown"
    assert outdated.found == "not checked: evaluation-vllm.json: of another version of Eyas"
    assert "`eyas bench`" in outdated.what_to_do
    assert check_engine(replace(ENGINE, length=NO_ROUNDS)).state == "unknown"
    assert check_engine(replace(ENGINE, own=NO_ROUNDS)).state == "unknown"


def test_an_engine_in_float32_counts_the_same_and_a_sampling_one_is_not_compared() -> None:
    exact = replace(ENGINE, is_exact=True)
    assert check_engine(exact).state == "problem"
    assert check_engine(replace(exact, length=replace(ENGINE.length, length=2.46))).state == "ok"
    lower = replace(exact, is_sampled=True, length=Length(length=1.1, low=1.0, high=1.2))
    assert check_engine(lower).state == "unknown"


def test_a_draft_that_knows_its_texts_must_have_them_accepted() -> None:
    assert check_overfit(OVERFIT).state == "ok"
    low = check_overfit(replace(OVERFIT, length=4.5))
    assert low.state == "problem"
    assert low.what_to_do.startswith("training and decoding disagree")
    unlearnt = check_overfit(replace(OVERFIT, length=1.5, training_accuracies=(0.2,) * 5))
    assert unlearnt.state == "notice"
    assert "proves nothing" in unlearnt.what_to_do
    assert check_overfit("the target does not fit").state == "unknown"
    assert check_overfit(None).state == "unknown"


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "ok"),
        ({"longest_decoded": 2500}, "notice"),
        ({"longest_decoded": 9000}, "notice"),
        ({"longest_decoded": None}, "ok"),
        ({"is_scaled": True}, "notice"),
        ({"target_limit": 131_072}, "notice"),
        ({"longest_trained": "gone"}, "unknown"),
        ({"window": 4096}, "ok"),
        ({"window": 1024}, "notice"),
    ],
)
def test_positions(changes: dict[str, object], state: State) -> None:
    found = check_positions(replace(POSITIONS, **changes), SOUND)  # type: ignore[arg-type]
    assert found.state == state


def test_longer_windows_are_what_divided_samples_need() -> None:
    found = check_positions(replace(POSITIONS, window=1024), SOUND)
    assert found.found.startswith("trained on up to 1,024 tokens at a time, evaluate may decode")
    assert "training.window_tokens" in found.what_to_do


def test_how_far_answers_really_went_is_unknown() -> None:
    found = check_positions(replace(POSITIONS, longest_trained=300, longest_decoded=1124), SOUND)
    assert found.state == "notice"
    assert "may decode up to 1,124" in found.found


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            {"rope_parameters": {"factor": 2.0}},
        ),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"]}, {"sliding_window": 16}),
        ({"num_hidden_layers": 2}, {"num_hidden_layers": 1}),
        ({"attention_bias": True}, {"attention_bias": False}),
        (
            {"architectures": ["Eagle3Qwen3ForCausalLM"]},
            {"architectures": ["LlamaForCausalLMEagle3"]},
        ),
    ],
)
def test_another_variant_in_an_export_is_a_difference(
    written: dict[str, object], found: dict[str, object]
) -> None:
    assert not differences(written, written, file="serving/config.json")
    keys = {one.key for one in differences(found, written, file="serving/config.json")}
    assert {key.rpartition(".")[2] for key in keys} >= set(found) - {"rope_parameters"}
    assert keys


def test_other_rope_settings_in_an_export_are_a_problem() -> None:
    expected = {"rope_theta": 10000.0}
    other = differences({"rope_theta": 5e5}, expected, file="serving/config.json")
    found = check_positions(POSITIONS, replace(SOUND, differences=other))
    assert (found.state, found.expected) == ("problem", "rope_theta 10000.0")
