"""The target on the server of an engine, which is started for the run and ended with it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import RejectedRecord
from eagle_core.errors import ConfigError
from eagle_core.regeneration.answers import Answer, Question
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.generation_prompt import opens_reasoning
from eagle_core.regeneration.past_end import special_tokens
from eagle_core.regeneration.server import AnswerServer, OwnServer, template_choice
from eagle_core.regeneration.target_identity import target_identity
from eagle_core.serving.engines import find_engine
from eagle_core.serving.events import post
from eagle_core.serving.served import Served
from eagle_core.serving.server_process import ServerProcess, serving
from eagle_core.target import weights
from eagle_core.target.config import TargetConfig
from eagle_core.target.model_config import for_decoding, read_model_config
from eagle_core.target.positions import Positions
from eagle_core.target.tokenizer import conversation_tokenizer

_ROOM_TOKENS = 6144
"""Of a conversation before its last answer, unless a setting says otherwise."""
_PATH = "/v1/chat/completions"
logger = logging.getLogger(__name__)


class EngineAnswers:
    """The answers of an engine that is installed here."""

    def __init__(self, target: TargetConfig, config: RegenerationConfig) -> None:
        """Find it.

        Raises:
            ConfigError: it is not installed, cannot run the target, or would have no room for an
                answer.

        """
        assert config.engine is not None  # noqa: S101
        self._engine = find_engine(config.engine, target)
        self._tokenizer = conversation_tokenizer(target)
        self._target, self._name = for_decoding(target), config.engine
        thinking = config.thinking
        if thinking is None:
            thinking = target.template.enable_thinking
        self._config = config.model_copy(update={"thinking": thinking})
        self._served = Served(
            target=self._target,
            weights=weights.locate(target).resolve(),
            slots=config.concurrency,
            max_length=context_tokens(target, config),
            is_measured=False,
            chat_template=self._tokenizer.served_template,
            tool_parser=config.tool_parser,
            reasoning_parser=config.reasoning_parser,
        )
        self._process: ServerProcess | None = None
        self._server: AnswerServer | None = None

    @property
    def concurrency(self) -> int:
        """Maximum number of questions in flight."""
        return self._config.concurrency

    def identity(self) -> Mapping[str, object]:
        """Return what of the target determines its answers, and the engine; not its version.

        Another version goes on with the answers of this one.
        """
        quantization = self._target.quantization
        return {
            **target_identity(self._target),
            "engine": self._name,
            **({} if quantization is None else {"quantization": quantization}),
        }

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Serve within the block.

        Raises:
            ConfigError: the server does not start.
            TransientError: it ended within the block, which then failed.

        """
        engine, served = self._engine, self._served
        logger.info(
            "%s answers %d conversations of up to %d tokens at a time",
            *(engine.title, served.slots, served.max_length),
        )
        engine.prepare(served)
        with serving(engine.title, lambda port: engine.launch(served, port=port)) as process:
            self._process = process
            self._compare_prompts(process)
            yield

    async def ask(self, question: Question) -> Answer:
        """Return the target's answer; raises as `AnswerServer.ask` does."""
        if self._server is None:
            self._server = self._connected()
        return await self._server.ask(question)

    async def close(self) -> None:
        """Close the connections."""
        if self._server is not None:
            await self._server.close()
            self._server = None

    def _connected(self) -> AnswerServer:
        assert self._process is not None  # noqa: S101 (only asked while it is ready)
        is_kept = self._config.cut_answers == "keep"
        in_folder = self._target.model_copy(update={"model": str(self._served.weights)})
        return AnswerServer(
            self._config,
            model=self._target.name,
            api_key=None,
            special_tokens=special_tokens(in_folder),
            opens_reasoning=is_kept
            and opens_reasoning(self._tokenizer, thinking=self._config.thinking),
            own=OwnServer(
                url=f"{self._process.url}/v1",
                fields={
                    **self._engine.samplers(self._served, self._config.limits()),
                    "stop_token_ids": sorted(self._tokenizer.stop_ids),
                    "skip_special_tokens": False,
                },
                require_alive=self._process.require_alive,
            ),
        )

    def _compare_prompts(self, process: ServerProcess) -> None:
        """Warn if the server renders another prompt than Eyas does."""
        message, thinking = Message(role="user", content="a"), self._config.thinking
        try:
            expected = len(self._tokenizer.prompt([message], thinking=thinking))
        except RejectedRecord:  # a template that needs more than a question
            return
        body: dict[str, object] = {
            "model": self._target.name,
            "messages": [message.as_openai()],
            "max_tokens": 1,
        }
        if thinking is not None:
            body["chat_template_kwargs"] = template_choice(thinking)
        with process.client() as client:
            found = int(post(client, _PATH, body)["usage"]["prompt_tokens"])
        if found != expected:
            logger.warning(
                "%s makes %d tokens of a question of which Eyas makes %d: its answers follow "
                "another prompt than the draft is trained on; compare the chat templates",
                *(self._engine.title, found, expected),
            )


def context_tokens(target: TargetConfig, config: RegenerationConfig) -> int:
    """Return how many tokens of a conversation the server holds, its answers included.

    Raises:
        ConfigError: the target has fewer positions, or an answer of `max_tokens` leaves no room.

    """
    positions = Positions.of(read_model_config(target, weights.locate(target)))
    if config.context_tokens is not None:
        positions.require(config.context_tokens, target, setting="regeneration.context_tokens")
    found = config.context_tokens or config.max_tokens + _ROOM_TOKENS
    if config.context_tokens is None and positions.limit is not None:
        found = min(found, positions.limit)
    if found <= config.max_tokens:
        raise ConfigError(
            f"regeneration.max_tokens is {config.max_tokens:,}, but the server of target "
            f"{target.name} holds {found:,} tokens of a conversation: there is no room for a "
            "question. Lower max_tokens, or raise regeneration.context_tokens as far as the "
            "target has positions"
        )
    return found
