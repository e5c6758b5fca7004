"""Load an export with the real speculators package and dump what it holds and computes.

Run by the interpreter of an environment that has speculators: EXPORT INPUTS OUTPUT.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig  # type: ignore[import-not-found]


def main(folder: str, inputs_path: str, output_path: str) -> None:
    """Write the loaded tensors (`tensor.*`), the logits of 3 steps and the layers it understood."""
    inputs = load_file(inputs_path)
    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32)
    model.load_verifier_weights()
    model.eval()
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
    with torch.no_grad():
        model(
            hidden_states=inputs["aux"].unsqueeze(0),
            input_ids=inputs["next_ids"].unsqueeze(0),
            document_ids=torch.zeros(1, len(inputs["next_ids"]), dtype=torch.long),
            ttt_steps=3,
        )
    dump = {f"logits.{step}": value[0].contiguous() for step, value in enumerate(logits)}
    dump["layers"] = torch.tensor(model.config.eagle_aux_hidden_state_layer_ids)
    for name, tensor in model.state_dict().items():
        dump[f"tensor.{name}"] = tensor.clone().contiguous()
    save_file(dump, Path(output_path))


if __name__ == "__main__":
    main(*sys.argv[1:])
