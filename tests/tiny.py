"""A real but tiny target model with tokenizer and chat template, and a small data set for it."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
"""Of small models of other architectures, for the configurations of transformers."""
TOPICS = ("rivers", "falcons", "bread", "compilers", "winter", "glass", "chess", "tides")


def write_conversations(path: Path, count: int, *, first: int = 0) -> Path:
    """Write `count` ShareGPT conversations, each different, numbered from `first`."""
    records = [_record(number) for number in range(first, first + count)]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def _record(number: int) -> dict[str, object]:
    topic = TOPICS[number % len(TOPICS)]
    turns = []
    for turn in range(1 + number % 3):
        turns.append(
            {"from": "human", "value": f"Tell me fact {number}.{turn} about {topic}, please."}
        )
        answer = " ".join(
            f"{topic} have {number + word} properties" for word in range(3 + number % 5)
        )
        turns.append({"from": "gpt", "value": f"Well: {answer}."})
    return {"id": f"tiny_{number}", "conversations": turns}


def write_target(folder: Path, *, seed: int = 0, num_layers: int = 8, head_dim: int = 16) -> Path:
    """Write config, tokenizer and bfloat16 weights of a random Llama of 8 layers."""
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    texts = [turn["value"] for number in range(64) for turn in _record(number)["conversations"]]  # type: ignore[attr-defined]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106 (a token of the text kind)
        pad_token="<|pad|>",  # noqa: S106
        chat_template=CHAT_TEMPLATE,
    )
