"""What other tools would have dumped of the tiny target, in their layouts."""

import gzip
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle_core.bfloat16 import from_bfloat16_bits
from eagle_core.data.conversation import Conversation, Message
from eagle_core.samples import HiddenStateSample, TokenizedSample
from eagle_core.target.capture import capture_states
from eagle_core.target.config import TargetConfig
from eagle_core.target.model import TargetModel
from eagle_core.target.tokenizer import conversation_tokenizer
from tests import tiny

PADDING = 2
"""Id of the tiny tokenizer's pad token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One conversation with the tiny target's own states."""

    own: HiddenStateSample
    """As Eyas captures it."""
    unnormed: Tensor
    """[T, H] the output of the last layer, before the norm."""

    @property
    def ids(self) -> Tensor:
        return torch.from_numpy(self.own.input_ids.astype(np.int64))

    @property
    def mask(self) -> Tensor:
        return torch.from_numpy(self.own.loss_mask.astype(np.int64))

    @property
    def aux(self) -> Tensor:
        """[T, 3, H]"""
        return from_bfloat16_bits(self.own.aux_hidden_states, dtype=torch.bfloat16)

    @property
    def last(self) -> Tensor:
        """[T, H]"""
        return from_bfloat16_bits(self.own.last_hidden_state, dtype=torch.bfloat16)


def tokenized(target: TargetConfig, count: int, *, first: int = 0) -> list[TokenizedSample]:
    """Return samples of the tiny data set's conversations, in order."""
    tokenizer = conversation_tokenizer(target)
    found = []
    for number in range(first, first + count):
        turns = tiny._record(number)["conversations"]
        messages = tuple(
            Message(role="user" if turn["from"] == "human" else "assistant", content=turn["value"])
            for turn in turns  # type: ignore[attr-defined]
        )
        found += tokenizer.tokenize(Conversation(conversation_id=str(number), messages=messages))
    return found


def rows(target: TargetConfig, samples: Sequence[TokenizedSample]) -> list[Row]:
    """Return the target's states of some samples, in their order."""
    model = TargetModel.load(target)
    last_layer = int(model.model_config.num_hidden_layers) - 1
    own = {one.sample_id: one for one in capture_states(model, samples)}
    outputs = {one.sample_id: one for one in capture_states(model, samples, layers=[last_layer])}
    return [
        Row(
            own=own[one.sample_id],
            unnormed=from_bfloat16_bits(
                outputs[one.sample_id].aux_hidden_states[:, 0], dtype=torch.bfloat16
            ),
        )
        for one in samples
    ]


def specforge_document(row: Row, *, length: int | None = None) -> dict[str, Tensor]:
    """Return a sample padded to `length` tokens."""
    pad = (length or len(row.own)) - len(row.own)
    aux = torch.cat([row.aux.flatten(1), torch.randn(pad, 192).bfloat16()])
    last = torch.cat([row.last, torch.randn(pad, 64).bfloat16()])
    return {
        "input_ids": torch.cat([row.ids, torch.full((pad,), PADDING)]),
        "loss_mask": torch.cat([row.mask, torch.zeros(pad, dtype=torch.int64)]),
        "hidden_state": last[None],
        "aux_hidden_state": aux[None],
    }


def write_specforge(
    folder: Path, dumped: Sequence[Row], *, padding: int = 0, is_gzipped: bool = False
) -> list[Path]:
    """Write a file per sample, each padded by `padding` tokens."""
    paths = []
    for number, row in enumerate(dumped):
        inner = folder / f"rows_{number // 5 * 5}-{number // 5 * 5 + 5}"
        inner.mkdir(parents=True, exist_ok=True)
        document = specforge_document(row, length=len(row.own) + padding)
        path = inner / f"data_{number}.ckpt{'.gz' if is_gzipped else ''}"
        if is_gzipped:
            buffer = io.BytesIO()
            torch.save(document, buffer)
            path.write_bytes(gzip.compress(buffer.getvalue()))
        else:
            torch.save(document, path)
        paths.append(path)
    return paths


def turn_ends(sample: HiddenStateSample) -> list[int]:
    """Return the end of each answer."""
    starts = np.flatnonzero(np.diff(sample.loss_mask.astype(np.int8), append=0) == -1) + 1
    return [int(one) for one in starts]


def write_speculators(
    folder: Path, dumped: Sequence[Row], *, with_dataset: bool = True, is_float8: bool = False
) -> list[Path]:
    """Write a row per answer, with everything before it; only this answer is supervised."""
    states_path = folder / "hidden_states"
    states_path.mkdir(parents=True, exist_ok=True)
    ids, masks, paths = [], [], []
    for row in dumped:
        begin = 0
        for end in turn_ends(row.own):
            states = torch.cat([row.aux, row.unnormed[:, None]], dim=1)[:end].contiguous()
            tensors = {"hidden_states": states, "token_ids": row.ids[:end].contiguous()}
            if is_float8:
                scale = states.float().abs().amax(dim=(1, 2), keepdim=True) / 448
                tensors["hidden_states"] = (states.float() / scale).to(torch.float8_e4m3fn)
                tensors["hidden_states_scales"] = scale
            path = states_path / f"hs_{len(paths)}.safetensors"
            save_file(tensors, path)
            mask = row.own.loss_mask[:end].copy()
            mask[:begin] = False
            ids.append(row.own.input_ids[:end].tolist())
            masks.append(mask.astype(int).tolist())
            paths.append(path)
            begin = end
    if with_dataset:
        table = pa.table({"input_ids": ids, "loss_mask": masks, "seq_len": list(map(len, ids))})
        part = folder / "data-00000-of-00001.arrow"
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))
    return paths


def write_model_optimizer(
    folder: Path, dumped: Sequence[Row], *, with_mask: bool = True, is_prenorm: bool = False
) -> list[Path]:
    """Write a file per conversation."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, row in enumerate(dumped):
        document: dict[str, object] = {
            "input_ids": row.ids,
            "hidden_states": row.unnormed if is_prenorm else row.last,
            "aux_hidden_states": row.aux.flatten(1),
            "conversation_id": f"c{number}",
        }
        if with_mask:
            document["loss_mask"] = row.mask
        if is_prenorm:
            document["hidden_states_prenorm"] = True
        path = folder / f"c{number}.pt"
        torch.save(document, path)
        paths.append(path)
    return paths


def write_nemo(folder: Path, dumped: Sequence[Row], *, aux_layers: Sequence[int]) -> list[Path]:
    """Write shards of four samples, padded to one length, with ids and masks of the next token."""
    folder.mkdir(parents=True, exist_ok=True)
    length = max(len(row.own) for row in dumped) + 3
    paths = []
    for first in range(0, len(dumped), 4):
        members = dumped[first : first + 4]

        def padded(values: Tensor) -> Tensor:
            filler = torch.zeros(length - len(values), *values.shape[1:], dtype=values.dtype)
            return torch.cat([values, filler])

        def shifted(values: Tensor) -> Tensor:
            return torch.cat([padded(values)[1:], torch.zeros(1, dtype=values.dtype)])

        path = folder / f"shard-{first // 4:06d}.safetensors"
        tensors = {
            "input_ids": torch.stack([shifted(row.ids) for row in members]),
            "attention_mask": torch.stack([padded(torch.ones_like(row.ids)) for row in members]),
            "loss_mask": torch.stack([shifted(row.mask) for row in members]),
            "aux_hidden_states": torch.stack([padded(row.aux.flatten(1)) for row in members]),
        }
        save_file(tensors, path)
        paths.append(path)
    manifest = {
        "format_version": 2,
        "target_model": "tiny",
        "aux_layer_ids": list(aux_layers),
        "num_samples": len(dumped),
        "shard_size": 4,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return paths
