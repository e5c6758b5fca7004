"""What the table of `export` says: folders, and the commands that serve the draft."""

import json
import shlex

from eagle_core.draft.readers import TITLES
from eagle_core.serving import sglang
from eagle_core.serving.llamacpp.draft_file import FILE_NAME
from flows.reports.table import Row
from flows.reports.units import human_bytes
from flows.summaries import ExportedLayout, ExportSummary


def export_rows(summary: ExportSummary) -> list[Row]:
    """Return where an export is, how large it is, and the commands that serve it."""
    rows = [
        ("run", str(summary.run_path)),
        ("checkpoint", f"step {summary.checkpoint_step:,}"),
        *_lengths(summary),
    ]
    for exported in summary.layouts:
        size = human_bytes(exported.num_bytes)
        rows.append((f"folder: {exported.layout}", f"{exported.path} ({size})"))
        rows += _serving_commands(exported, summary)
    return [*rows, ("seconds", f"{summary.seconds:.1f}")]


def _lengths(summary: ExportSummary) -> list[Row]:
    """Return the acceptance lengths that are known of the checkpoint."""
    known = {
        "acceptance length, decoded": summary.decoded_length,
        "acceptance length, held out": summary.held_out_length,
    }
    rows = [
        (name, f"{length:.2f} tokens per target forward")
        for name, length in known.items()
        if length is not None
    ]
    return rows or [("acceptance length, held out", "not measured")]


def _serving_commands(exported: ExportedLayout, summary: ExportSummary) -> list[Row]:
    """Return the command of each engine that loads this layout, ready for a shell."""
    folder, num_tokens = str(exported.path.resolve()), summary.speculative_tokens
    if exported.layout == "speculators":  # its config names verifier and drafted tokens
        return [("serve with vLLM (speculators)", shlex.join(["vllm", "serve", folder]))]
    if exported.layout == "gguf":
        llamacpp = {
            "--model": "TARGET.gguf",
            "--spec-type": "draft-eagle3",
            "--spec-draft-model": f"{folder}/{FILE_NAME}",
            "--spec-draft-n-max": str(num_tokens),
        }
        words = [word for option in llamacpp.items() for word in option]
        return [("serve with llama.cpp", shlex.join(["llama-server", *words]))]
    revision = [] if summary.revision is None else ["--revision", summary.revision]
    target = [summary.served_model, *revision]
    draft = {"method": "eagle3", "model": folder, "num_speculative_tokens": num_tokens}
    launch = ["python", "-m", "sglang.launch_server", "--model-path", *target]
    launch += sglang.draft_options(exported.path.resolve(), num_tokens)
    serve = ["vllm", "serve", *target, "--speculative-config", json.dumps(draft)]
    rows = [("serve with vLLM", shlex.join(serve))]
    if "sglang" not in exported.lacking:
        rows = [("serve with SGLang", shlex.join(launch)), *rows]
    return rows + [
        (f"not for {TITLES[reader]}", f"it has no {' and '.join(variants)}")
        for reader, variants in exported.lacking.items()
    ]
