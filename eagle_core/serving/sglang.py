"""The command of SGLang's server. Eyas prints it, and does not start it.

The names of its arguments are those of SGLang 0.5.23. Its draft is a chain: one step drafts one
token, and a round verifies the chain and the token before it.
"""

from pathlib import Path

from eagle_core.draft.importing import read_draft_config
from eagle_core.draft.readers import require_reader
from eagle_core.serving.served import Served
from eagle_core.serving.template_file import template_file


def command(served: Served, *, port: int) -> list[str]:
    """Return the command, for the Python that has SGLang.

    Raises:
        ConfigError: SGLang lacks a variant of the draft.

    """
    config = served.target
    if served.draft is not None:
        require_reader("sglang", read_draft_config(served.draft))
    options = {
        "--model-path": str(served.weights),
        "--served-model-name": config.name,
        "--host": served.host,
        "--port": str(port),
        "--dtype": config.dtype,
        "--context-length": str(served.max_length),
        "--max-running-requests": str(served.slots),
    }
    if config.tensor_parallel > 1:
        options["--tp-size"] = str(config.tensor_parallel)
    if config.quantization is not None:
        options["--quantization"] = config.quantization
    if served.chat_template is not None:
        options["--chat-template"] = str(template_file(served.chat_template))
    words = [word for option in options.items() for word in option]
    words += ["--trust-remote-code"] if config.trust_remote_code else []
    if served.draft is not None:
        words += draft_options(served.draft, served.draft_tokens)
    return ["python", "-m", "sglang.launch_server", *words]


def draft_options(draft: Path, draft_tokens: int) -> list[str]:
    """Return what SGLang needs to know about a draft."""
    options = {
        "--speculative-algorithm": "EAGLE3",
        "--speculative-draft-model-path": str(draft),
        "--speculative-num-steps": str(draft_tokens),
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": str(draft_tokens + 1),
    }
    return [word for option in options.items() for word in option]
