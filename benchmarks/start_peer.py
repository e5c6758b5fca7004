"""The speculators package as an arm of `benchmarks.start`: its first weights, step and settings.

Run by the interpreter of an environment that has speculators 0.9.0 (`docs/training-step.md`). Its
argument is a folder with `sizes.json` and `target.safetensors`. Each line of standard input names a
batch to make a step with, or a folder to save the draft in; the answer is a line on standard
output.

All is as in the package's trainer: model, initialisation, `shift_batch`, Muon and AdamW, linear
schedule with 1 % warm-up, clipping to 1.0, bfloat16 under autocast. It reads final states after the
target's norm, as a store has them, so its own norm of them is left out. The loss mask is moved by
one token, so that the same positions count as in ours. Imports nothing of Eyas.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from speculators.models.eagle3 import Eagle3DraftModel  # type: ignore[import-not-found]
from speculators.train.config.schema import (  # type: ignore[import-not-found]
    OptimizerArgs,
    SchedulerArgs,
)
from speculators.train.optimizers import build_optimizers  # type: ignore[import-not-found]
from torch import Tensor
from transformers import LlamaConfig, get_linear_schedule_with_warmup

from benchmarks.speculators_model import build_model, one_row

WARM_UP_SHARE = 0.01
CLIP = 1.0


def main() -> None:
    """Train as standard input says."""
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    sizes = json.loads((folder / "sizes.json").read_text())
    torch.set_num_threads(sizes["threads"])
    torch.manual_seed(sizes["seed"])
    model = _model(sizes, load_file(folder / "target.safetensors"))
    settings, _ = model.get_trainer_kwargs(
        loss_fn="kl_div",
        loss_implementation="eager",
        ttt_steps=sizes["ttt_length"],
        ttt_step_loss_decay=1.0,
    )
    defaults = OptimizerArgs()
    chosen = {**defaults.model_dump(), "muon_lr": defaults.lr}
    optimizers = build_optimizers(model, SimpleNamespace(**chosen))
    assert SchedulerArgs().scheduler_type == "linear"
    steps = sizes["steps"]
    schedules = [
        get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]  # transformers
            optimizer, int(WARM_UP_SHARE * steps), steps
        )
        for optimizer in optimizers
    ]
    for line in sys.stdin:
        request = json.loads(line)
        if "save" in request:
            model.save_pretrained(request["save"])
            answers.write(json.dumps({"saved": request["save"]}) + "\n")
            continue
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, loss, _ = model(**_row(load_file(request["batch"])), **settings)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        answers.write(json.dumps({"loss": loss.item()}) + "\n")


def _model(sizes: Mapping[str, Any], target: Mapping[str, Tensor]) -> Eagle3DraftModel:
    layer = LlamaConfig(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=1,
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        vocab_size=sizes["vocab_size"],
        rms_norm_eps=sizes["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        max_position_embeddings=sizes["max_position_embeddings"],
        pad_token_id=None,
    )
    model = build_model(layer, sizes["draft_vocab_size"], "sdpa")
    model.load_vocab_mappings(target["t2d"], target["d2t"])
    model.verifier_norm = torch.nn.Identity()
    with torch.no_grad():
        model.embed_tokens.weight.copy_(target["embedding"])
        model.lm_head.weight.copy_(target["head"])
        model.verifier_lm_head.weight.copy_(target["head"])
    model.train()
    return model


def _row(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return one_row(
        batch["starts"].tolist(),
        ids=batch["input_ids"],
        aux=batch["aux_hidden_states"],
        last=batch["last_hidden_state"],
        loss_mask=batch["loss_mask"],
    )


if __name__ == "__main__":
    main()
