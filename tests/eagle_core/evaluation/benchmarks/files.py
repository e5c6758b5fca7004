"""Small files of our own questions, in the forms that the named sets have on the hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from eagle_core.evaluation.benchmarks.sets import PLACEHOLDER, BenchmarkName

Records = Sequence[Mapping[str, object]]

RECORDS: Mapping[BenchmarkName, Records] = {
    "mt-bench": [
        {
            "question_id": 1,
            "category": "writing",
            "prompt": ["Praise a river.", "Shorter, please."],
        },
        {"question_id": 2, "category": "writing", "prompt": ["Praise a lake.", "In one word?"]},
        {"question_id": 3, "category": "math", "prompt": ["Add two and two.", "And two more?"]},
    ],
    "humaneval": [
        {
            "task_id": "Own/0",
            "prompt": 'def twice(n: int) -> int:\n    """Return two times n."""\n',
            "canonical_solution": "    return 2 * n\n",
            "test": "assert twice(2) == 4",
            "entry_point": "twice",
        }
    ],
    "gsm8k": [
        {"question": "Ann has 3 eggs and buys 4. How many are there?", "answer": "7\n#### 7"},
        {"question": "Bread costs 2. What do five loaves cost?", "answer": "10\n#### 10"},
    ],
    "math-500": [
        {"problem": "Solve $x + 1 = 3$.", "solution": "$x = 2$", "answer": "2", "level": 1}
    ],
    "alpaca": [
        {"instruction": "Name three tides.", "input": "", "output": "Ebb.", "text": "unused"},
        {"instruction": "Translate.", "input": "Brot", "output": "Bread.", "text": "unused"},
    ],
    "cnn-dailymail": [
        {"article": "The tide rose. The town slept.", "highlights": "A tide rose.", "id": "0"}
    ],
    "speed-bench": [
        {"question_id": "a", "category": "coding", "turns": [PLACEHOLDER], "source": "own"},
        {"question_id": "b", "category": "coding", "turns": ["Sort a list."], "source": "own"},
        {
            "question_id": "c",
            "category": "roleplay",
            "turns": ["You are a falcon.", "What do you eat?", "And in winter?"],
            "source": "own",
        },
    ],
}


def as_parquet(records: Records) -> bytes:
    """Return the bytes of a table."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(record) for record in records]), sink)
    return bytes(sink.getvalue())


def as_lines(records: Records) -> bytes:
    """Return JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_sets(folder: Path) -> dict[str, Path]:
    """Write each set in the kind of file that the hub has; return the paths by name."""
    lines = ("mt-bench", "math-500")
    paths = {}
    for name, records in RECORDS.items():
        is_lines = name in lines
        paths[str(name)] = folder / f"{name}.{'jsonl' if is_lines else 'parquet'}"
        paths[name].write_bytes(as_lines(records) if is_lines else as_parquet(records))
    return paths
