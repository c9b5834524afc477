"""`vllm serve` of a pooling model under `bi-patch run`: vectors and scores over HTTP are those of a request alone."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bi_patch.tools.models import recipes

pytestmark = pytest.mark.engine

START_SECONDS = 300
CLIENTS = 24


@pytest.fixture(scope="module")
def ask(model, cache, tmp_path_factory):
    """ask(path, body): the server's answer to a request, parsed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    bin_folder = Path(sys.executable).parent
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    environ |= {
        "PATH": f"{bin_folder}:{environ['PATH']}",
        "BI_PATCH_CACHE": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    served = ["--runner", "pooling", "--hf-overrides", '{"is_matryoshka": true}', "--served-model-name", "served"]
    limits = ["--max-model-len", "1024", "--max-num-batched-tokens", "256", "--enforce-eager"]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    command = ["bi-patch", "run", "--", "vllm", "serve", model(recipes.QWEN3), *served, *limits, *place]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            executable=str(bin_folder / "bi-patch"),
            env=environ,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def post(path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            data=json.dumps({"model": "served", **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < deadline, log.read_text()[-5000:]
                time.sleep(1)
        yield post
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


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
