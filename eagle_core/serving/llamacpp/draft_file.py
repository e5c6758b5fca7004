"""A draft in llama.cpp's file."""

import tempfile
from pathlib import Path

from eagle_core.atomic_files import atomic_folder
from eagle_core.draft.export import ServedTarget, export, require_own
from eagle_core.draft.export_config import ExportConfig
from eagle_core.draft.importing import read_draft_config
from eagle_core.draft.model import DraftModel
from eagle_core.draft.readers import require_reader
from eagle_core.serving.llamacpp import gguf, installed

FILE_NAME = "draft.gguf"
_LAYOUT = "gguf"


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
    require_reader("llamacpp", draft.config)
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
    require_reader("llamacpp", read_draft_config(exported))
    gguf.convert(exported, path, dtype=dtype, target=target, trust_remote_code=trust_remote_code)
