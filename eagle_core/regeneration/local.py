"""The target run locally: one answer at a time, one token per forward pass.

For a small data set or a check. A server batches; use one for a whole data set.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import Reason, RejectedRecord
from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.speculative import generate_plain
from eagle_core.regeneration.answers import (
    Answer,
    NoAnswer,
    Question,
    usable,
    with_opened_reasoning,
)
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.generation_prompt import opens_reasoning
from eagle_core.regeneration.target_identity import target_identity
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.target.placement import load_decoding_target
from eagle_core.target.tokenizer import conversation_tokenizer


class LocalAnswers:
    """The target's weights, loaded when there is a question."""

    concurrency = 1

    def __init__(self, target: TargetConfig, config: RegenerationConfig) -> None:
        self._target_config = target
        self._config = config
        self._tokenizer = conversation_tokenizer(target)
        self._identity = {**target_identity(target), "attention": target.attention}
        self._target: TargetModel | None = None

    def identity(self) -> Mapping[str, object]:
        """Return the digests of weights, tokenizer and template, the dtype and the attention."""
        return self._identity

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Load the weights; release them after the block."""
        self._target = load_decoding_target(self._target_config)
        try:
            yield
        finally:
            self._target = None

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    async def ask(self, question: Question) -> Answer:
        """Return the target's answer; blocks the event loop meanwhile.

        Raises:
            NoAnswer: empty, truncated, too long, or with tokens that only a server can parse.

        """
        if question.tools:
            raise NoAnswer(
                Reason.TOOLS_NEED_SERVER,
                "each model has its own format for calls; set engine or base_url",
            )
        assert self._target is not None  # noqa: S101 (only asked while it is ready)
        try:
            prompt = self._tokenizer.prompt(
                question.messages, tools=question.tools, thinking=self._config.thinking
            )
            ids, is_cut = self._generate(self._target, prompt.tolist(), question.seed)
            text = self._tokenizer.answer_text(ids)
        except RejectedRecord as error:
            raise NoAnswer(error.reason, error.detail) from error
        message = Message(role="assistant", content=text)
        if opens_reasoning(self._tokenizer, thinking=self._config.thinking):
            message = with_opened_reasoning(message)
        message = usable(message, is_cut=is_cut)
        return Answer(message=message, num_tokens=len(ids))

    def _generate(
        self, target: TargetModel, prompt: list[int], seed: int
    ) -> tuple[list[int], bool]:
        """Return the answer's ids without the stop token, and whether max_tokens cut it."""
        longest: int | None = getattr(target.model_config, "max_position_embeddings", None)
        if longest is not None and len(prompt) + self._config.max_tokens > longest:
            raise NoAnswer(
                Reason.CONTEXT_TOO_LONG,
                f"{len(prompt)} prompt + {self._config.max_tokens} new tokens, limit {longest}",
            )
        decoding = DecodingConfig(
            max_new_tokens=self._config.max_tokens, temperature=self._config.temperature, seed=seed
        )
        stop_ids = self._tokenizer.stop_ids
        ids = list(generate_plain(target, prompt, decoding, stop_ids, self._config.limits()).tokens)
        if ids[-1] in stop_ids:
            return ids[:-1], False
        if self._config.cut_answers == "drop":
            raise NoAnswer(Reason.ANSWER_CUT, f"after {len(ids)} tokens")
        return ids, True
