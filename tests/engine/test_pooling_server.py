"""`vllm serve` of a pooling model under `bi-patch run`: vectors and scores over HTTP are those of a request alone."""

import json
import random
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from bi_patch.tools.models import recipes

pytestmark = pytest.mark.engine

CLIENTS = 24
OPTIONS = (
    *("--runner", "pooling", "--hf-overrides", '{"is_matryoshka": true}', "--served-model-name", "served"),
    *("--max-model-len", "1024", "--max-num-batched-tokens", "256", "--enforce-eager"),
)


@pytest.fixture(scope="module")
def ask(model, serve):
    """ask(path, body): the server's answer to a request, parsed."""
    # The server of developers also has /collective_rpc.
    with serve(model(recipes.QWEN3), *OPTIONS, VLLM_SERVER_DEV_MODE="1") as server:

        def post(path: str, body: dict) -> dict:
            request = urllib.request.Request(
                server.url + path,
                data=json.dumps({"model": "served", **body}).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=900) as answer:
                return json.load(answer)

        yield post


def texts(count: int) -> list[str]:
    source = random.Random(4)
    words = ["river", "stone", "letter", "of", "the", "a", "seven", "green", "and", "walks"]
    return [" ".join(source.choice(words) for _ in range(source.choice((2, 9, 40, 90)))) for _ in range(count)]


def same_alone_and_together(calls: list, ask, result) -> None:
    """Each call alone, then all at once, twice: JSON writes a float so that its bits come back."""
    alone = [result(ask(*call)) for call in calls]
    assert len({json.dumps(one) for one in alone}) > 1
    for _ in range(2):
        with ThreadPoolExecutor(CLIENTS) as clients:
            together = list(clients.map(lambda call: result(ask(*call)), calls))
        assert together == alone


def test_embeddings(ask):
    made = texts(CLIENTS)
    calls = [
        ("/v1/embeddings", {"input": text, **({"dimensions": 5 + i} if i % 3 == 0 else {})})
        for i, text in enumerate(made)
    ]
    same_alone_and_together(calls, ask, lambda answer: [entry["embedding"] for entry in answer["data"]])
    # A list in one request gives the vectors of its texts alone.
    plain = [text for i, text in enumerate(made) if i % 3]
    several = ask("/v1/embeddings", {"input": plain})["data"]
    assert [entry["embedding"] for entry in several] == [
        ask("/v1/embeddings", {"input": text})["data"][0]["embedding"] for text in plain
    ]


@pytest.mark.parametrize("path", ["/score", "/rerank"])
def test_scores(ask, path):
    made = texts(CLIENTS)
    names = ("text_1", "text_2") if path == "/score" else ("query", "documents")
    calls = [(path, {names[0]: made[i], names[1]: made[i + 1 : i + 5]}) for i in range(0, CLIENTS - 5, 2)]

    def scores(answer: dict) -> list:
        entries = answer.get("data") or answer["results"]
        return sorted((entry["index"], entry.get("score", entry.get("relevance_score"))) for entry in entries)

    same_alone_and_together(calls, ask, scores)


def test_a_request_that_is_not_covered_is_a_bad_request(ask):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask("/v1/embeddings", {"input": "a", "dimensions": 100000})
    assert error.value.code == 400


def test_a_call_that_may_write_weights_is_refused_and_the_engine_goes_on(ask):
    embed = ("/v1/embeddings", {"input": "a river of stone"})
    before = ask(*embed)["data"]
    for method in ("reload_weights", "an_unknown_method"):
        with pytest.raises(urllib.error.HTTPError) as error:
            ask("/collective_rpc", {"method": method})
        assert f"weights.calls: collective_rpc({method}) may write weights" in error.value.read().decode()
    ask("/collective_rpc", {"method": "check_health"})
    assert ask(*embed)["data"] == before
