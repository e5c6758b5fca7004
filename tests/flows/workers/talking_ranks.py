"""Ranks under torchrun that all talk at once."""

import sys
from pathlib import Path

from flows.workers.channel import report_errors, send
from tests.flows.workers.talking_child import Talk


def talk() -> None:
    """Say what the request says, as often as it has pauses."""
    request = Talk.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for _ in request.pauses:
        print("a library prints this")
        send(request)


if __name__ == "__main__":
    sys.exit(report_errors(talk))
