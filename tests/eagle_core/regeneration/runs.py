"""Data sets of questions, runs over them, and what comes out."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from eagle_core.data.build import RULES_VERSION, load_conversations
from eagle_core.data.conversation import Conversation, content_key
from eagle_core.data.conversation_table import to_row
from eagle_core.data.manifest import DatasetManifest
from eagle_core.data.writer import building, digests, open_writers, publish
from eagle_core.regeneration.config import RegenerationConfig
from eagle_core.regeneration.regenerate import Regenerated, Regeneration
from eagle_core.regeneration.server import AnswerServer
from tests.eagle_core.regeneration.answer_server import Server

Make = Callable[..., Path]
"""From records, and a name, to the folder of a data set."""


def questions(num: int, *, turns: int = 2) -> list[dict[str, object]]:
    """Return conversations c0, c1, ... of `turns` turns."""
    return [
        {
            "id": f"c{number}",
            "messages": [
                message
                for turn in range(turns)
                for message in (
                    {"role": "user", "content": f"question {number}.{turn}"},
                    {"role": "assistant", "content": f"old answer {number}.{turn}"},
                )
            ],
        }
        for number in range(num)
    ]


def ask(
    server: Server,
    source: Path,
    out_dir: Path,
    *,
    key: str | None = None,
    special_tokens: tuple[str, ...] = (),
    **settings: object,
) -> Regenerated:
    """Regenerate with short pauses."""
    config = RegenerationConfig.model_validate(
        {"base_url": server.url, "attempts": 3, "concurrency": 4, **settings}
    )
    answers = AnswerServer(
        config,
        model="m",
        api_key=key,
        special_tokens=special_tokens,
        first_pause_seconds=0.01,
    )
    return Regeneration(config, answers, source=source, out_dir=out_dir).run()


def conversations(directory: Path) -> list[Conversation]:
    """Return the conversations of both splits."""
    return [one for split in ("train", "held_out") for one in load_conversations(directory, split)]


def ledger(directory: Path) -> list[dict[str, str]]:
    """Return the rows of the ledger."""
    rows: list[dict[str, str]] = pq.read_table(directory / "ledger.parquet").to_pylist()
    return rows


def adds_up(manifest: DatasetManifest, num: int) -> None:
    """Check that every record is kept or dropped."""
    assert manifest.num_records == num
    assert manifest.num_conversations + manifest.num_dropped == num


def write_dataset(given: Sequence[Conversation], out_dir: Path) -> Path:
    """Write a data set of the conversations as they are, all to train on."""
    with building(out_dir) as directory:
        with open_writers(directory) as writers:
            for one in given:
                writers.splits["train"].add(to_row(one, content_key(one)))
        manifest = DatasetManifest(
            name=out_dir.name,
            fingerprint="-".join(map(content_key, given)),
            rules_version=RULES_VERSION,
            config={},
            source=(),
            num_records=len(given),
            num_train=len(given),
            num_held_out=0,
            files=digests(directory),
        )
        publish(manifest, directory, out_dir)
    return out_dir
