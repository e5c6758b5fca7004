"""Rounds and accepted tokens as a server counts them, for all of its texts together."""

from dataclasses import dataclass
from typing import Self

import httpx
import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from eagle_core.decoding.trace import VerificationRound
from eagle_core.serving.events import get_text

_ROUNDS = "spec_decode_num_drafts_total"
_ACCEPTED = "spec_decode_num_accepted_tokens_per_pos_total"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundCounts:
    """Counts since the server started."""

    rounds: int
    """Verifying forwards."""
    accepted: NDArray[np.int64]
    """[K] rounds in which the drafted tokens up to each depth were all accepted."""

    @classmethod
    def read(cls, client: httpx.Client, *, draft_tokens: int) -> Self:
        """Ask the server."""
        rounds, accepted = 0, np.zeros(draft_tokens, dtype=np.int64)
        text = get_text(client, "/metrics")
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.partition(":")[2]
                if name == _ROUNDS:
                    rounds += int(sample.value)
                elif name == _ACCEPTED:
                    accepted[int(sample.labels["position"])] += int(sample.value)
        return cls(rounds=rounds, accepted=accepted)

    def since(self, before: Self) -> "RoundCounts":
        """Return what was counted after `before`."""
        return RoundCounts(
            rounds=self.rounds - before.rounds, accepted=self.accepted - before.accepted
        )

    @property
    def num_accepted(self) -> int:
        """Accepted tokens of all depths."""
        return int(self.accepted.sum())

    def as_rounds(self) -> list[VerificationRound]:
        """Return rounds of these counts, in any order."""
        drafted = len(self.accepted)
        to_depth = [self.rounds, *self.accepted.tolist(), 0]
        return [
            VerificationRound(verified=drafted, accepted=depth, gained=depth + 1)
            for depth in range(drafted + 1)
            for _ in range(to_depth[depth] - to_depth[depth + 1])
        ]
