"""A draft in llama.cpp's file."""

import json
import tempfile
from pathlib import Path

from eagle_core.atomic_files import atomic_folder
from eagle_core.draft.export import CONFIG_NAME, ExportConfig, ServedTarget, export, require_own
from eagle_core.draft.model import DraftModel
from eagle_core.errors import ConfigError
from eagle_core.serving.llamacpp import gguf, installed

FILE_NAME = "draft.gguf"
_LAYOUT = "gguf"
_UNKNOWN_FLAGS = ("fc_norm", "norm_output")
"""Of EAGLE-3.1: the converter does not read them."""


def export_gguf(
    draft: DraftModel,
    target: ServedTarget,
    folder: Path,
    config: ExportConfig,
    *,
    weights: Path,
    trust_remote_code: bool = False,
) -> Path:
    """Write layout gguf to its own folder under `folder`; return the path.

    `weights` is the folder of the target, whose tokenizer the file holds.

    Raises:
        ConfigError: llama.cpp's converter is not installed or refuses the draft, or the folder
            holds other files.
        CorruptError: a weight is not finite; nothing is written.

    """
    installed.converter()
    written = folder / _LAYOUT
    require_own(written, (FILE_NAME,))
    serving = config.model_copy(update={"layouts": ("serving",), "with_embedding": False})
    with tempfile.TemporaryDirectory() as name, atomic_folder(written) as partial:
        exported = export(draft, target, Path(name), serving)["serving"]
        convert_draft(
            exported,
            partial / FILE_NAME,
            dtype=config.dtype,
            target=weights,
            trust_remote_code=trust_remote_code,
        )
    return written


def convert_draft(
    exported: Path, path: Path, *, dtype: str, target: Path, trust_remote_code: bool
) -> None:
    """Convert an export in layout serving; `target` is the folder of the draft's target.

    Raises:
        ConfigError: llama.cpp cannot run this draft, or its converter refuses it.

    """
    document = json.loads((exported / CONFIG_NAME).read_text(encoding="utf-8"))
    flags = [name for name in _UNKNOWN_FLAGS if document.get(name)]
    if flags:
        raise ConfigError(
            f"llama.cpp {installed.VERSION} has no {' and '.join(flags)}, which this draft was "
            "trained with: choose vLLM or SGLang, or train without"
        )
    gguf.convert(exported, path, dtype=dtype, target=target, trust_remote_code=trust_remote_code)
