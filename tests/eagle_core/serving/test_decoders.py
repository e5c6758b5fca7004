"""Rounds from what servers send: the answers are those of real ones, cut short."""

import json
from collections.abc import Callable, Sequence

import httpx
import pytest

from eagle_core.decoding.config import DecodingConfig
from eagle_core.decoding.trace import GenerationTrace, VerificationRound
from eagle_core.errors import ConfigError, TransientError
from eagle_core.serving.engine import EngineDecoder
from eagle_core.serving.llamacpp.server import LlamaCppDecoder
from eagle_core.serving.vllm import VllmDecoder

CONFIG = DecodingConfig(max_new_tokens=8, draft_tokens=3)
STOP = 9


def asked(
    decoder: Callable[[httpx.Client], EngineDecoder],
    answer: Callable[[httpx.Request], httpx.Response],
) -> GenerationTrace:
    """Return the text that a decoder gets from a server that answers so."""
    transport = httpx.MockTransport(answer)
    with httpx.Client(base_url="http://engine", transport=transport) as client:
        return decoder(client).decode((1, 2), CONFIG, {STOP}, is_alone=True)


def events(*documents: object) -> httpx.Response:
    """Return a stream of events."""
    lines = [f"data: {json.dumps(document)}\n\n" for document in documents]
    return httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))


class FakeVllm:
    """Sends chunks, and counts rounds."""

    def __init__(
        self, chunks: Sequence[Sequence[int]], rounds: int, accepted: Sequence[int]
    ) -> None:
        self.chunks, self.rounds, self.accepted = chunks, rounds, accepted
        self.has_decoded = False
        self.asked: dict[str, object] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer a request."""
        if request.url.path == "/metrics":
            rounds = 10 + self.rounds * self.has_decoded
            lines = [f"vllm:spec_decode_num_drafts_total {rounds}"]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{depth}"}} '
                f"{7 + count * self.has_decoded}"
                for depth, count in enumerate(self.accepted)
            ]
            return httpx.Response(200, text="\n".join([*lines, ""]))
        self.has_decoded = True
        self.asked = json.loads(request.content)
        return events(*({"choices": [{"token_ids": list(chunk)}]} for chunk in self.chunks))


def test_each_chunk_of_vllm_is_a_round() -> None:
    server = FakeVllm([[4], [5, 6], [7], [8, STOP]], rounds=3, accepted=[2, 1, 1])
    trace = asked(lambda client: VllmDecoder(client, "tiny", 3), server)
    assert trace.tokens == (4, 5, 6, 7, 8, STOP)
    assert trace.rounds == (
        VerificationRound(verified=3, accepted=1, gained=2),
        VerificationRound(verified=3, accepted=0, gained=1),
        VerificationRound(verified=2, accepted=2, gained=2),  # it had accepted one more, after
    )
    assert server.asked["max_tokens"] == 11
    assert server.asked["stop_token_ids"] == [STOP]


def test_chunks_sent_together_leave_the_counts() -> None:
    server = FakeVllm([[4], [5, 6, 7], [8, 3]], rounds=3, accepted=[2, 0, 0])
    trace = asked(lambda client: VllmDecoder(client, "tiny", 3), server)
    assert trace.tokens == (4, 5, 6, 7, 8, 3)
    assert [one.accepted for one in trace.rounds] == [0, 1, 1]


def llamacpp_events(*sent: tuple[int, int, int, int]) -> list[object]:
    """Return an event for each (token, tokens so far, drafted, accepted)."""
    return [
        {
            "tokens": [token],
            "stop": False,
            "timings": {"predicted_n": number}
            | ({"draft_n": drafted, "draft_n_accepted": accepted} if drafted else {}),
        }
        for token, number, drafted, accepted in sent
    ]


def test_tokens_of_llamacpp_are_rounds_by_their_counts() -> None:
    sent = llamacpp_events(
        (4, 1, 0, 0),
        (5, 2, 3, 1),
        (6, 3, 3, 1),
        (7, 4, 6, 1),
        (8, 5, 6, 1),
        (2, 6, 9, 4),
        (9, 7, 9, 4),
    )
    trace = asked(
        lambda client: LlamaCppDecoder(client, 3),
        lambda _request: events(*sent, {"tokens": [], "stop": True, "timings": {}}),
    )
    assert trace.tokens == (4, 5, 6, 7, 8, 2, STOP)
    assert trace.rounds == (
        VerificationRound(verified=3, accepted=1, gained=2),
        VerificationRound(verified=3, accepted=0, gained=1),
        VerificationRound(verified=0, accepted=0, gained=1),  # without a draft
        VerificationRound(verified=2, accepted=2, gained=2),
    )


def test_tokens_that_llamacpp_does_not_send_are_asked_for() -> None:
    sent = llamacpp_events((4, 1, 0, 0), (6, 3, 6, 0), (7, 4, 9, 1), (8, 5, 9, 1))

    def answer(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content).get("stream"):
            return events(*sent)
        return httpx.Response(200, json={"tokens": [4, 5, 6, 7, 8]})

    trace = asked(lambda client: LlamaCppDecoder(client, 3), answer)
    assert trace.tokens == (4, 5, 6, 7, 8)
    assert [(one.verified, one.accepted) for one in trace.rounds] == [(3, 0), (3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        (httpx.Response(400, text="prompt too long"), ConfigError, "400: prompt too long"),
        (httpx.Response(503, text="loading"), TransientError, "503: loading"),
        (httpx.Response(200, text='data: {"error": "broken"}\n\n'), TransientError, "broken"),
    ],
)
def test_refusals_are_errors_with_the_servers_words(
    response: httpx.Response, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        asked(lambda client: LlamaCppDecoder(client, 3), lambda _request: response)
