"""How answers begin and end in the tokens of a run, compared with the target as it is now."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from eagle_core.data.conversation import Message
from eagle_core.data.ledger import RejectedRecord
from eagle_core.diagnosis.conversation_form import ConversationForm, FormCounts, common_ending
from eagle_core.errors import ConfigError
from eagle_core.target.config import TargetConfig
from eagle_core.target.tokenizer import conversation_tokenizer
from eagle_core.tokenization.conversation_tokenizer import ConversationTokenizer
from eagle_core.tokenization.token_file import TokenFile
from flows.bridge.run import Run
from flows.bridge.sampled_rows import spread_rows

_SAMPLES = 256
_SHOWN_CHARACTERS = 40


def conversation_form(target: TargetConfig, run: Run, tokens: TokenFile) -> ConversationForm:
    """Compare some samples of `tokens`, those of `run`, with the template of `target`."""
    tokenizer = conversation_tokenizer(target)
    own = _with_own_template(target)
    prompts = _generation_prompts(own or tokenizer)
    counts = FormCounts.of(
        map(tokens.fetch, spread_rows(tokens, _SAMPLES)),
        prompts=prompts,
        stop_ids=tokenizer.stop_ids,
        max_length=run.dataset.max_length,
    )
    recorded = {
        "tokenizer": (run.tokenizer_fingerprint, tokenizer.tokenizer_fingerprint),
        "template": (run.template_fingerprint, tokenizer.template_fingerprint),
    }
    return ConversationForm(
        changed=tuple(name for name, (before, now) in recorded.items() if before != now),
        has_own_template=own is not None,
        num_answers=counts.num_answers,
        num_prompted=counts.num_prompted,
        context=_shown(tokenizer, counts.odd_context),
        own_context=_shown(tokenizer, prompts[0] if prompts else ()),
        num_whole=counts.num_whole,
        num_stopped=counts.num_stopped,
        ending="" if counts.odd_ending is None else tokenizer.token(counts.odd_ending),
        stops=_named(tokenizer, sorted(tokenizer.stop_ids)),
        lost_stops=_named(tokenizer, sorted({*run.stop_ids} - {*tokenizer.stop_ids})),
    )


def _with_own_template(target: TargetConfig) -> ConversationTokenizer | None:
    """Return the target's tokenizer with its own template; None if it brings none."""
    template = target.template.model_copy(update={"chat_template": None})
    try:
        return conversation_tokenizer(target.model_copy(update={"template": template}))
    except ConfigError:
        return None


def _generation_prompts(tokenizer: ConversationTokenizer) -> list[tuple[int, ...]]:
    """Return what a server writes between a question and its answer, with and without reasoning."""
    found: dict[tuple[int, ...], None] = {}
    for thinking in (None, True, False):
        try:
            asked = [
                tokenizer.prompt([Message(role="user", content=text)], thinking=thinking).tolist()
                for text in ("a", "b")
            ]
        except RejectedRecord:
            continue
        found[common_ending(asked)] = None
    return [prompt for prompt in islice(found, 3) if prompt]


def _shown(tokenizer: ConversationTokenizer, ids: Sequence[int]) -> str:
    text = tokenizer.decode(np.array(ids, dtype=np.int32)) if ids else ""
    return text[-_SHOWN_CHARACTERS:]


def _named(tokenizer: ConversationTokenizer, ids: Sequence[int]) -> str:
    return ", ".join(map(tokenizer.token, ids))
