"""What a person reads of a comparison."""

from dataclasses import replace

from eagle_core.closed_form.candidates import Comparison, TripleResult, VocabularyResult
from flows.reports.candidate_tables import layer_rows, next_rows, vocabulary_rows

CONFIGURED, EAGLE3, BEST = (2, 9, 20), (1, 11, 20), (8, 17, 23)
COMPARISON = Comparison(
    layers=(1, 2, 8, 9, 11, 17, 20, 23),
    num_positions=20_000,
    num_held_out=4_000,
    num_conversations=16,
    features_per_layer=768,
    num_triples=56,
    triples=(
        TripleResult(layers=BEST, accuracy=0.35, difference=0.0123, margin=0.0046),
        TripleResult(layers=CONFIGURED, accuracy=0.3377, difference=0.0, margin=0.0),
        TripleResult(layers=EAGLE3, accuracy=0.33, difference=-0.0077, margin=None),
    ),
    vocabularies=(
        VocabularyResult(size=4000, coverage=0.91, accuracy=0.31),
        VocabularyResult(size=6000, coverage=0.95, accuracy=0.33),
        VocabularyResult(size=9000, coverage=1.0, accuracy=0.34),
    ),
)


def test_triples_are_named_with_their_difference() -> None:
    rows = layer_rows(COMPARISON, configured=CONFIGURED, eagle3=EAGLE3, hidden_size=768)
    assert rows[:3] == [
        ("aux 8, 17, 23", "35.0% (+1.2 ± 0.5 points)"),
        ("aux 2, 9, 20", "33.8%  <- configured"),
        ("aux 1, 11, 20", "33.0% (-0.8 points)  <- EAGLE-3 default"),
    ]
    assert dict(rows)["measured on"] == "4,000 positions of 16 held-out conversations"
    assert dict(rows)["compared"] == "56 triples of the layers 1, 2, 8, 9, 11, 17, 20, 23"
    assert not any("principal" in value for _, value in rows)


def test_one_triple_can_be_both() -> None:
    rows = layer_rows(COMPARISON, configured=CONFIGURED, eagle3=CONFIGURED, hidden_size=768)
    assert rows[1] == ("aux 2, 9, 20", "33.8%  <- configured, EAGLE-3 default")


def test_a_wide_target_gives_a_lower_bound() -> None:
    rows = layer_rows(COMPARISON, configured=CONFIGURED, eagle3=None, hidden_size=4096)
    assert "768 principal directions of 4,096 channels" in rows[-1][1]
    assert "lower bound" in rows[-1][1]


def test_vocabularies_are_named() -> None:
    assert vocabulary_rows(COMPARISON, configured=6000) == [
        ("vocabulary of 4,000", "31.0% accuracy, covers 91.0% of supervised tokens"),
        ("vocabulary of 6,000", "33.0% accuracy, covers 95.0% of supervised tokens  <- configured"),
        (
            "vocabulary of 9,000",
            "34.0% accuracy, covers 100.0% of supervised tokens  <- the target's",
        ),
    ]
    whole = vocabulary_rows(COMPARISON, configured=9000)
    assert whole[2][1].endswith("<- configured, the target's")


def test_the_command_uses_the_first_triple_that_is_better_beyond_chance() -> None:
    by_chance = TripleResult(layers=(1, 2, 8), accuracy=0.36, difference=0.02, margin=0.03)
    unknown = TripleResult(layers=(1, 2, 9), accuracy=0.36, difference=0.02, margin=None)
    found = replace(COMPARISON, triples=(by_chance, unknown, *COMPARISON.triples))
    command, _ = next_rows(found, configured=CONFIGURED)
    assert command == ("try 8, 17, 23", "--set target.aux_layers=[8,17,23]")
    found = replace(COMPARISON, triples=(by_chance, unknown, *COMPARISON.triples[1:]))
    assert next_rows(found, configured=CONFIGURED) == [
        ("", "No triple is better than aux 2, 9, 20 beyond chance.")
    ]


def test_the_best_of_many_must_be_better_by_more_than_the_margin_of_one() -> None:
    lucky = replace(COMPARISON.triples[0], difference=0.008)
    comparison = replace(COMPARISON, triples=(lucky, *COMPARISON.triples[1:]))
    ((_, said),) = next_rows(comparison, configured=CONFIGURED)
    assert said == "No triple is better than aux 2, 9, 20 beyond chance."


def test_samples_set_apart_are_not_called_held_out() -> None:
    comparison = replace(COMPARISON, is_held_out=False)
    rows = layer_rows(comparison, configured=CONFIGURED, eagle3=EAGLE3, hidden_size=768)
    assert dict(rows)["measured on"] == "4,000 positions of 16 conversations set apart"
    assert "95 % of one comparison" in dict(rows)["±"]


def test_no_difference_has_no_sign_of_a_loss() -> None:
    equal = replace(COMPARISON.triples[0], difference=-0.0001)
    comparison = replace(COMPARISON, triples=(equal,))
    rows = layer_rows(comparison, configured=CONFIGURED, eagle3=None, hidden_size=768)
    assert rows[0] == ("aux 8, 17, 23", "35.0% (+0.0 ± 0.5 points)")
