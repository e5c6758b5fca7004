"""Make a second target: `python -m benchmarks.made_target FOLDER` after `eyas run dataset`.

A small Qwen3 (queries and keys are normed, 384 wide, 8 layers) with a tokenizer of its own, trained
for some minutes on the conversations of a recipe. It knows frequent words and phrases: enough for
states that depend on the text, not for good answers.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from deployments.recipe import load_recipe
from eagle_core.data.build import load_conversations
from flows.workspace import Workspace

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 8192
HIDDEN_SIZE = 384
ROW_TOKENS = 512
ROWS = 4
RATE, WARM_UP = 2e-3, 50


def main() -> None:
    """Train the target, and write it as transformers does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path("eyas-data"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--set", action="append", default=[], help="override a recipe key")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set)
    space = Workspace(home=arguments.home, target=recipe.target.name, dataset=recipe.dataset.name)
    torch.manual_seed(0)
    texts = [
        "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in one.messages)
        for one in load_conversations(space.dataset_path, "train")
    ]
    tokenizer = _tokenizer(texts)
    samples = [np.array(ids) for ids in tokenizer(texts)["input_ids"]]
    model = _model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, arguments.steps, pct_start=min(WARM_UP / arguments.steps, 1.0)
    )
    console, losses = Console(), []
    for step, rows in zip(range(1, arguments.steps + 1), _rows(samples), strict=False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == arguments.steps:
            console.print(f"step {step}: loss {np.mean(losses[-50:]):.3f}")
    model.bfloat16().save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106 (a token of the text kind)
        pad_token="<|endoftext|>",  # noqa: S106
        chat_template=CHAT_TEMPLATE,
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def _rows(samples: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
    """Yield [ROWS, ROW_TOKENS] token ids of shuffled samples, epoch after epoch."""
    rng = np.random.default_rng(0)
    kept = np.empty(0, dtype=np.int64)
    while True:
        for row in rng.permutation(len(samples)).tolist():
            kept = np.concatenate([kept, samples[row]])
            while len(kept) >= ROWS * ROW_TOKENS:
                used, kept = np.split(kept, [ROWS * ROW_TOKENS])
                yield torch.from_numpy(used.reshape(ROWS, ROW_TOKENS))


if __name__ == "__main__":
    main()
