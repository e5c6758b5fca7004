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


def llamacpp_events(*sent: tuple[int, int, int, int], num_tokens: int = 0) -> list[object]:
    """Return an event for each (token, tokens so far, drafted, accepted), and the last one."""
    last = sent[-1] if sent else (0, num_tokens, 0, 0)
    end = {
        "tokens": [],
        "stop": True,
        "tokens_predicted": num_tokens or last[1],
        "timings": {
            "predicted_n": num_tokens or last[1],
            "draft_n": last[2],
            "draft_n_accepted": last[3],
        },
    }
    return [
        {
            "tokens": [token],
            "stop": False,
            "timings": {"predicted_n": number}
            | ({"draft_n": drafted, "draft_n_accepted": accepted} if drafted else {}),
        }
        for token, number, drafted, accepted in sent
    ] + [end]


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
        lambda _request: events(*sent),
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
        (httpx.Response(200, text=""), TransientError, "breaks off"),
    ],
)
def test_refusals_are_errors_with_the_servers_words(
    response: httpx.Response, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        asked(lambda client: LlamaCppDecoder(client, 3), lambda _request: response)


def test_a_text_whose_end_llamacpp_does_not_send_is_whole() -> None:
    sent = llamacpp_events((4, 1, 0, 0), (5, 2, 3, 2), num_tokens=4)

    def answer(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content).get("stream"):
            return events(*sent)
        return httpx.Response(200, json={"tokens": [4, 5, 6, 7]})

    trace = asked(lambda client: LlamaCppDecoder(client, 3), answer)
    assert trace.tokens == (4, 5, 6, 7)
    assert [one.accepted for one in trace.rounds] == [2]


def test_a_text_of_which_llamacpp_sends_nothing_is_whole() -> None:
    sent = llamacpp_events(num_tokens=2)

    def answer(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content).get("stream"):
            return events(*sent)
        return httpx.Response(200, json={"tokens": [4, 5]})

    assert asked(lambda client: LlamaCppDecoder(client, 3), answer).tokens == (4, 5)


def test_another_text_does_not_replace_what_llamacpp_sent() -> None:
    sent = llamacpp_events((4, 1, 0, 0), (5, 2, 3, 0), num_tokens=3)

    def answer(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content).get("stream"):
            return events(*sent)
        return httpx.Response(200, json={"tokens": [4, 6, 7]})

    with pytest.raises(TransientError, match="wrote another text"):
        asked(lambda client: LlamaCppDecoder(client, 3), answer)


def test_rounds_that_llamacpp_does_not_send_accept_no_more_than_was_drafted() -> None:
    sent = llamacpp_events((4, 1, 0, 0), (8, 9, 6, 6))

    def answer(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content).get("stream"):
            return events(*sent)
        return httpx.Response(200, json={"tokens": [4, 1, 2, 3, 4, 5, 6, 7, 8]})

    trace = asked(lambda client: LlamaCppDecoder(client, 3), answer)
    assert [(one.verified, one.accepted) for one in trace.rounds] == [(3, 3), (3, 3)]


def test_texts_are_whole_where_rounds_are_not_counted() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert "stream" not in body
        assert (body["n_predict"], body["repeat_penalty"]) == (8, 1.0)
        return httpx.Response(200, json={"tokens": [4, 5, STOP], "timings": {"prompt_ms": 250}})

    trace = asked(lambda client: LlamaCppDecoder(client, 0), answer)
    assert (trace.tokens, trace.rounds, trace.prefill_seconds) == ((4, 5, STOP), (), 0.25)
