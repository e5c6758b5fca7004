"""Tiny targets with opinions: a random head is so unsure that wrong states look like right ones."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from tests import tiny


def write_outspoken_target(folder: Path) -> Path:
    """Write the tiny Llama with a head that makes its logits 20 times larger."""
    tiny.write_target(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 20
    model.bfloat16().save_pretrained(folder)
    return folder


def write_biased_target(folder: Path) -> Path:
    """Write a tiny Phi, whose head has a bias: its logits are not those of the weight alone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.write_target(folder))
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias.normal_(std=4)
    model.bfloat16().save_pretrained(folder)
    return folder


def write_scaling_target(folder: Path) -> Path:
    """Write a tiny Granite, which multiplies what enters its first layer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.write_target(folder))
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        embedding_multiplier=2.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    GraniteForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder
