"""Run by a Python that has vLLM: writes the angles that it computes for scalings of RoPE."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope


def main(request_path: Path, answer_path: Path) -> None:
    """Write [positions, E] for each case: cos and sin side by side, half of the head each."""
    request = json.loads(request_path.read_text())
    size, positions = request["head_dim"], request["positions"]
    # The longest context that is served; all else of a served model is irrelevant here.
    served = SimpleNamespace(model_config=SimpleNamespace(max_model_len=positions))
    phi3_long_rope_scaled_rope.get_current_vllm_config = lambda: served
    found = {}
    with set_current_vllm_config(VllmConfig()):
        for number, parameters in enumerate(request["cases"]):
            rope = get_rope(size, positions, True, parameters, torch.float32)
            if parameters["rope_type"] == "longrope":  # the long factors lie behind the short ones
                short = parameters["original_max_position_embeddings"]
                table = rope.long_short_cos_sin_cache[short:]
            else:
                table = rope.cos_sin_cache
            found[str(number)] = table[:positions].contiguous()
    save_file(found, answer_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
