"""Write a target of random weights in the layout of Llama, one layer at a time.

For measurements of size and speed: its states mean nothing. It takes the tokenizer of another
target, and so its vocabulary.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

HIDDEN_SIZE, MLP_SIZE, NUM_HEADS, NUM_KV_HEADS = 4096, 14336, 32, 8
INDEX_NAME = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "*.model")
_SPREAD = 0.02


def write_random_target(folder: Path, *, num_layers: int, like: Path, vocab_size: int) -> int:
    """Write `num_layers` layers of 436 MB in bfloat16, and a tied head; return the bytes of all.

    Args:
        folder: where to write; must not exist.
        num_layers: decoder layers, of the sizes of Llama-3-8B.
        like: the folder of a target, of which the tokenizer is copied.
        vocab_size: rows of the embedding.

    """
    folder.mkdir(parents=True)
    for pattern in _TOKENIZER_FILES:
        for path in like.glob(pattern):
            shutil.copy(path, folder / path.name)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=MLP_SIZE,
        num_hidden_layers=num_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    places: dict[str, str] = {}
    num_bytes = 0
    generator = torch.Generator().manual_seed(0)
    for number in range(-1, num_layers):
        tensors = _ends(vocab_size, generator) if number < 0 else _layer(number, generator)
        name = f"model-{number + 2:05d}-of-{num_layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    return num_bytes


def _ends(vocab_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": _drawn(vocab_size, HIDDEN_SIZE, generator),
        "model.norm.weight": torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16),
    }


def _layer(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    kv_size = HIDDEN_SIZE // NUM_HEADS * NUM_KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
        "self_attn.k_proj": (kv_size, HIDDEN_SIZE),
        "self_attn.v_proj": (kv_size, HIDDEN_SIZE),
        "self_attn.o_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
        "mlp.gate_proj": (MLP_SIZE, HIDDEN_SIZE),
        "mlp.up_proj": (MLP_SIZE, HIDDEN_SIZE),
        "mlp.down_proj": (HIDDEN_SIZE, MLP_SIZE),
    }
    drawn = {
        f"model.layers.{number}.{name}.weight": _drawn(*shape, generator)
        for name, shape in shapes.items()
    }
    norms = {
        f"model.layers.{number}.{name}.weight": torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    return drawn | norms


def _drawn(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(
        std=_SPREAD, generator=generator
    )
