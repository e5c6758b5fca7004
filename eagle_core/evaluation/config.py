"""Settings for evaluating a draft."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from eagle_core.address import Address
from eagle_core.decoding.config import DecodingConfig, TreeConfig
from eagle_core.evaluation.benchmarks.config import BenchmarkConfig
from eagle_core.evaluation.benchmarks.sets import BenchmarkName
from eagle_core.training.config import CheckpointChoice

EvaluationEngine = Literal["eyas", "vllm", "llamacpp"]
DraftProbability = Annotated[float, Field(ge=0, lt=1)]


class EvaluationConfig(DecodingConfig):
    """Settings for evaluating a draft."""

    engine: EvaluationEngine = Field(
        default="eyas",
        description="What decodes. eyas: this process, which also measures the draft before "
        "training. vllm: the server of target.vllm_python. llamacpp: llama-server as "
        "`eyas engines install llamacpp` builds it, else from PATH. An engine decodes with the "
        "draft as exported.",
    )
    concurrency: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(1, 4, 16),
        description="Prompts that an engine decodes at a time; each number is measured, and 1 "
        "always is. No more than there are prompts.",
    )
    draft_lengths: tuple[Annotated[int, Field(gt=0, le=32)], ...] = Field(
        default=(),
        description="More numbers of drafted tokens to measure with an engine, in addition to "
        "draft_tokens.",
    )
    tree: TreeConfig | None = Field(
        default=None,
        description="Draft trees instead of chains, as the papers of EAGLE-2 and EAGLE-3 do, for "
        "comparison with them; draft_tokens is unused then. Engine eyas, temperature 0, one prompt "
        "at a time. Keys: depth, the levels (8); top_k, tokens continued per level (10); nodes, "
        "tokens verified per round (60).",
    )
    draft_p_min: tuple[DraftProbability, ...] = Field(
        default=(0.0,),
        min_length=1,
        description="Probabilities of a drafted token below which llama.cpp stops drafting in a "
        "round; each is measured with every draft length. 0 always drafts all tokens. The "
        "acceptance results are those of the smallest. Only llama.cpp has this.",
    )
    checkpoint: CheckpointChoice = Field(
        default="best",
        description="best: the checkpoint with the largest held-out acceptance length "
        "(training.best_by), the one that export uses, or the newest if nothing was held out.",
    )
    prompts: Address | None = Field(
        default=None,
        description="Prompts to decode instead of the held-out conversations: JSON, JSON lines, "
        "Parquet or CSV at a path or URL, or hf:ORG/NAME, with turns, messages or a column such as "
        "prompt or question; the report groups by their category.",
    )
    benchmarks: tuple[BenchmarkName | BenchmarkConfig, ...] = Field(
        default=(),
        description="Benchmark sets to decode in one sweep, instead of the held-out conversations: "
        "names, whose files are downloaded once at a pinned commit, or {name: NAME, path: FILE}. "
        "Later turns follow the target's own answers. The report has each set and turn, and "
        "the mean.",
    )
    max_turns: int = Field(
        default=1,
        gt=0,
        description="First assistant turns to decode per held-out conversation; later turns keep "
        "the data's own earlier answers. The report groups by turn.",
    )
    num_prompts: int = Field(
        default=16,
        gt=0,
        description="Prompts to decode speculatively; with benchmarks, questions of each set, "
        "spread over its categories.",
    )
    num_plain_prompts: int | None = Field(
        default=None,
        ge=0,
        description="How many of these, from the first on, to decode plainly too, to compare "
        "tokens and speed; empty means all, 0 none (which takes less than half the time). With "
        "benchmarks, prompts of each set. With an engine it is always all.",
    )
    max_prompt_tokens: int = Field(
        default=1024,
        gt=0,
        description="Longer prompts are skipped, not cut. The target's own answers to earlier "
        "turns do not count.",
    )
    batch_prompts: int = Field(
        default=1,
        gt=0,
        description="Prompts per batch: the texts are the same, and evaluation takes less time. 1 "
        "measures the speed that one user sees; targets with sliding windows support only 1. "
        "Engines have concurrency instead.",
    )

    @model_validator(mode="after")
    def _p_min_is_of_llamacpp(self) -> Self:
        if self.engine != "llamacpp" and self.draft_p_min != (0.0,):
            given = ", ".join(f"{p_min:g}" for p_min in self.draft_p_min)
            raise ValueError(
                f"evaluation.draft_p_min is {given}, but only llama.cpp stops drafting at a "
                f"probability: set evaluation.engine to llamacpp (it is {self.engine}), or remove "
                "evaluation.draft_p_min"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> Self:
        names = [one.name for one in self.benchmark_sets]
        if self.prompts is not None and names:
            raise ValueError(
                "give `prompts` or `benchmarks`, not both: a file of your own is one of "
                "`benchmarks`, too, as {name: NAME, path: FILE}"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"two of `benchmarks` have one name: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _trees_are_greedy_and_alone(self) -> Self:
        if self.tree is None:
            return self
        if self.engine != "eyas":
            raise ValueError(
                f"`tree` is decoded by engine eyas alone, not by {self.engine}: engines draft the "
                "chains that they serve; remove `tree` or `engine`"
            )
        if self.temperature > 0:
            raise ValueError("`tree` is greedy: set `temperature` to 0, or remove `tree`")
        if self.batch_prompts > 1:
            raise ValueError(
                "`tree` decodes one prompt at a time: set `batch_prompts` to 1, or remove `tree`"
            )
        return self

    @property
    def drafted_depth(self) -> int:
        """K, most drafted tokens that a round can accept."""
        return self.draft_tokens if self.tree is None else self.tree.depth

    @property
    def positions_after_prompt(self) -> int:
        """How many positions a text may take after its prompt.

        An engine writes up to K tokens more than are kept, and drafts K more.
        """
        if self.engine == "eyas":
            return self.max_new_tokens + self.drafted_depth
        return self.max_new_tokens + 2 * (max((self.draft_tokens, *self.draft_lengths)) + 1)

    @property
    def benchmark_sets(self) -> tuple[BenchmarkConfig, ...]:
        """The benchmark sets, those that are only named included."""
        return tuple(
            BenchmarkConfig(name=one) if isinstance(one, str) else one for one in self.benchmarks
        )
