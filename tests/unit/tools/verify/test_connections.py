"""Requests of `verify --url` over real connections to a local server that breaks some of them."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bi_patch.errors import ServerFailed
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.connections import AGAIN
from bi_patch.tools.verify.server import ServerEngine

ASKED = [Request((1, 2), max_tokens=1, logprobs=None)]
ANSWER = {"id": "1", "object": "text_completion", "created": 1, "model": "m"}
ANSWER |= {"choices": [{"index": 0, "text": "a", "finish_reason": "length", "logprobs": None, "token_ids": [8]}]}
SAID = {"/v1/models": {"data": [{"id": "m", "max_model_len": 64}]}, "/version": {"version": "0.33.0"}, "/health": {}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open

    def log_message(self, *_):
        pass

    def answer(self, said, status=200, missing=0):
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.close_connection or missing > 0

    def do_GET(self):
        sick = self.path == "/health" and not self.server.healthy
        self.answer(SAID.get(self.path, {}), status=503 if sick else 200)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.client_address)
        how = self.server.plan.pop(0) if self.server.plan else "answer"
        if how == "break":
            self.close_connection = True
        elif how == "late":
            time.sleep(2)
            self.close_connection = True
        else:
            self.answer(ANSWER, status=500 if how == "error" else 200, missing=9 if how == "cut" else 0)


@contextmanager
def serving():
    """A server, and an engine that asks it. server.plan: what happens to the next completions, then all are answered.
    server.asked: the client's address of each."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.plan, server.asked, server.healthy = [], [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with ServerEngine(f"http://127.0.0.1:{server.server_port}", timeout=1) as engine:
            server.asked.clear()
            yield server, engine
    finally:
        server.shutdown()
        server.server_close()


def test_no_connection_waits_for_a_second_request():
    """A server closes idle connections, and may do so as a request comes."""
    with serving() as (server, engine):
        for _ in range(3):
            assert engine.generate(ASKED)[0].tokens == [8]
        engine.generate(ASKED * 4)
        assert len(set(server.asked)) == len(server.asked) == 7


@pytest.mark.parametrize("times", [1, AGAIN])
def test_a_connection_that_breaks_before_an_answer_is_asked_for_again(times):
    with serving() as (server, engine):
        server.plan = ["break"] * times
        assert engine.generate(ASKED)[0].tokens == [8]
        assert len(server.asked) == times + 1
        assert engine.said["requests sent again"] == times


def test_connections_that_break_on_and_on_are_named():
    with serving() as (server, engine):
        server.plan = ["break"] * 9
        with pytest.raises(ServerFailed, match="no answer to a request of 2 tokens .*Server disconnected"):
            engine.generate(ASKED)
        assert len(server.asked) == AGAIN + 1


@pytest.mark.parametrize(
    ("how", "said"), [("error", "answered 500"), ("late", "APITimeoutError"), ("cut", "is the server still running")]
)
def test_nothing_else_is_asked_for_again(how, said):
    with serving() as (server, engine):
        server.plan = [how]
        with pytest.raises(ServerFailed, match=said):
            engine.generate(ASKED)
        assert len(server.asked) == 1


def test_a_server_that_is_not_healthy_is_not_asked_again():
    with serving() as (server, engine):
        server.plan, server.healthy = ["break"], False
        with pytest.raises(ServerFailed, match="no answer"):
            engine.generate(ASKED)
        assert len(server.asked) == 1
