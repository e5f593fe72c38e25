"""Answers through an OpenAI-compatible server: what is sent, what is read, and what happens when the server fails."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from reference_regeneration import QUESTIONS, conversation_of

from eagle3_mla.training.answering import Decoding
from eagle3_mla.training.conversations import Conversation
from eagle3_mla.training.dialogues import Dialogue
from eagle3_mla.training.endpoint import TOO_LONG_REASON, Endpoint, EndpointAnswerer, EndpointError, server_message

DECODING = Decoding(max_new_tokens=9)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def reply(content: str, finish_reason: str = "stop", **message) -> dict:
    message = {"role": "assistant", "content": content, **message}
    return {"choices": [{"message": message, "finish_reason": finish_reason}], "usage": {"completion_tokens": 4}}


def echo(request: dict) -> dict:
    """Says how many messages there were, and repeats the last one."""
    return reply(f"{len(request['messages'])} {request['messages'][-1]['content']}")


class Server(ThreadingHTTPServer):
    """Answers with what `respond(request)` returns: an object, text, a status with text, or with headers."""

    daemon_threads = True

    def __init__(self, respond):
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond = respond
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.num_open = self.most_open = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.num_open += 1
            server.most_open = max(server.most_open, server.num_open)
            server.requests.append({"path": self.path, **request})
            server.headers.append(dict(self.headers))
        response = server.respond(request)
        with server.lock:
            server.num_open -= 1
        status, body, headers = response if isinstance(response, tuple) else (200, response, {})
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def serving(respond):
    server = Server(respond)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def failing_first(responses: list, then=echo):
    """Gives each of `responses` once, and then what `then` says."""
    left, lock = list(responses), threading.Lock()

    def respond(request):
        with lock:
            return left.pop(0) if left else then(request)

    return respond


def endpoint_of(server: Server, **settings) -> Endpoint:
    fields = {"concurrency": 2, "max_retries": 3, "first_pause_seconds": 0.01, "timeout_seconds": 5.0}
    return Endpoint(server.url, "big", **{**fields, **settings})


def answer_all(endpoint: Endpoint, dialogues: list[Dialogue], decoding=DECODING, shard_size=100, **settings):
    shards = [dialogues[start : start + shard_size] for start in range(0, len(dialogues), shard_size)]
    answerer = EndpointAnswerer(endpoint, decoding, **settings)
    return [dialogue for shard in answerer.answer(shards, lambda answer: None) for dialogue in shard]


def dialogues_of(questions=QUESTIONS, **settings) -> list[Dialogue]:
    return [Dialogue(number, conversation_of(turns, **settings)) for number, turns in enumerate(questions)]


def texts(dialogue: Dialogue) -> list[str]:
    return [answer.message["content"] for answer in dialogue.answers]


def test_every_turn_is_asked_with_the_answers_before_it():
    with serving(echo) as server:
        dialogues = answer_all(endpoint_of(server), dialogues_of())
    assert texts(dialogues[1]) == ["2 count", "4 more"]
    assert [message["content"] for message in dialogues[1].messages] == [
        "be brief",
        "count",
        "2 count",
        "more",
        "4 more",
    ]
    asked = next(request for request in server.requests if len(request["messages"]) == 4)
    assert asked["messages"][2] == {"role": "assistant", "content": "2 count"}
    assert asked["path"] == "/v1/chat/completions"
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("big", 9, 0.0)
    assert not {"seed", "top_p", "top_k", "tools"} & asked.keys()


@pytest.mark.parametrize("concurrency", [1, 5])
def test_answers_do_not_depend_on_how_many_are_asked_at_once_or_on_the_order_of_replies(concurrency):
    def slow_for_some(request):
        time.sleep(0.03 if "say" in request["messages"][-1]["content"] else 0)
        return echo(request)

    with serving(slow_for_some) as server:
        dialogues = answer_all(endpoint_of(server, concurrency=concurrency), dialogues_of(), shard_size=2)
    assert [dialogue.number for dialogue in dialogues] == list(range(len(QUESTIONS)))
    assert [texts(dialogue)[0] for dialogue in dialogues] == [
        f"{len(turns[:index])} {turns[index - 1][1]}"
        for turns, index in zip(QUESTIONS, [1, 2, 1, 1, 1, 1, 1], strict=True)
    ]
    assert server.most_open <= concurrency
    assert (server.most_open > 1) == (concurrency > 1)


def test_samples_are_asked_for_with_a_seed_of_their_own():
    decoding = Decoding(max_new_tokens=9, do_sample=True, temperature=0.7, top_k=5)
    seeds = []
    for _ in range(2):
        with serving(echo) as server:
            answer_all(endpoint_of(server, concurrency=1), dialogues_of(), decoding)
        assert all((request["temperature"], request["top_k"]) == (0.7, 5) for request in server.requests)
        assert not any("top_p" in request for request in server.requests)
        seeds.append([request["seed"] for request in server.requests])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == len(seeds[0])
    assert all(0 <= seed < 2**31 for seed in seeds[0])


def test_tools_reasoning_and_calls_are_carried_over():
    call = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    with serving(lambda request: reply(None, "tool_calls", tool_calls=call, reasoning_content="hm")) as server:
        (dialogue,) = answer_all(endpoint_of(server), dialogues_of([QUESTIONS[0]], tools=TOOLS))
    assert server.requests[0]["tools"] == TOOLS
    answer = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": call}
    assert dialogue.messages[-1] == answer
    with serving(lambda request: reply("x", reasoning="so")) as server:
        (dialogue,) = answer_all(endpoint_of(server), dialogues_of([QUESTIONS[0]]))
    assert dialogue.messages[-1] == {"role": "assistant", "content": "x", "reasoning_content": "so"}


def test_arguments_of_calls_are_objects_for_templates_and_texts_for_the_server():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    with serving(echo) as server:
        (dialogue,) = answer_all(endpoint_of(server), [Dialogue(0, Conversation(messages, TOOLS))])
    sent = server.requests[0]["messages"]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert dialogue.messages == [*messages, {"role": "assistant", "content": "3 2"}]


def test_an_answer_cut_by_the_server_ends_the_conversation_or_is_dropped():
    with serving(lambda request: reply("1 2", "length")) as server:
        (kept,) = answer_all(endpoint_of(server), dialogues_of([QUESTIONS[1]]))
        (dropped,) = answer_all(endpoint_of(server), dialogues_of([QUESTIONS[1]]), drop_cut=True)
    assert kept.is_cut
    assert len(kept.answers) == 1
    assert not dropped.answers


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
        (500, "oops", {}),
        (503, "", {}),
        "<html>bad gateway</html>",
        '{"choices": [',
        {"choices": []},
        {"choices": [{"message": {"role": "assistant"}}]},
        [1, 2],
    ],
    ids=["429", "500", "503", "html", "half-json", "no-choice", "no-content", "list"],
)
def test_a_failure_that_passes_is_tried_again(failure):
    with serving(failing_first([failure, failure])) as server:
        (dialogue,) = answer_all(endpoint_of(server, max_retries=2), dialogues_of([QUESTIONS[0]]))
    assert texts(dialogue) == ["1 say abc"]
    assert len(server.requests) == 3


def test_a_reply_that_takes_too_long_is_asked_for_again():
    first = threading.Event()

    def respond(request):
        if not first.is_set():
            first.set()
            time.sleep(0.6)
        return echo(request)

    with serving(respond) as server:
        (dialogue,) = answer_all(endpoint_of(server, timeout_seconds=0.2), dialogues_of([QUESTIONS[0]]))
    assert texts(dialogue) == ["1 say abc"]


@pytest.mark.parametrize(
    ("failure", "said"),
    [((503, "overloaded", {}), "status 503, overloaded"), ("<html>", "not valid JSON"), ({}, "holds no answer")],
)
def test_a_failure_that_stays_ends_the_run_after_the_allowed_attempts(failure, said):
    with serving(lambda request: failure) as server, pytest.raises(EndpointError, match=said) as raised:
        answer_all(endpoint_of(server, max_retries=2, concurrency=1), dialogues_of([QUESTIONS[0]]))
    assert "in 3 attempts" in str(raised.value)
    assert len(server.requests) == 3


def test_nobody_at_the_address_is_an_error_that_says_so():
    with serving(echo) as server:
        endpoint = endpoint_of(server, max_retries=1)
    with pytest.raises(EndpointError, match="Connection refused"):
        answer_all(endpoint, dialogues_of([QUESTIONS[0]]))


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_tried_again_and_carries_the_servers_message(status):
    refusal = (status, {"error": {"message": "the model `big` does not exist"}}, {})
    with (
        serving(lambda request: refusal) as server,
        pytest.raises(EndpointError, match=f"status {status}: the model `big` does not exist"),
    ):
        answer_all(endpoint_of(server, concurrency=1), dialogues_of([QUESTIONS[0]]))
    assert len(server.requests) == 1


def test_a_prompt_that_is_too_long_is_left_out_and_the_others_are_answered():
    said = "This model's maximum context length is 16 tokens. However, you requested 40 tokens."

    def respond(request):
        is_long = "repeat" in request["messages"][-1]["content"]
        return (400, {"object": "error", "message": said}, {}) if is_long else echo(request)

    with serving(respond) as server:
        dialogues = answer_all(endpoint_of(server), dialogues_of())
    assert [dialogue.number for dialogue in dialogues if dialogue.ended_because == TOO_LONG_REASON] == [2]
    assert sum(bool(dialogue.answers) for dialogue in dialogues) == len(QUESTIONS) - 1


def test_the_key_is_sent_and_never_shown():
    with serving(echo) as server:
        answer_all(endpoint_of(server, api_key="secret-1"), dialogues_of([QUESTIONS[0]]))
        assert server.headers[0]["Authorization"] == "Bearer secret-1"
    with serving(lambda request: (401, "who are you", {})) as server, pytest.raises(EndpointError) as raised:
        answer_all(endpoint_of(server, api_key="secret-1"), dialogues_of([QUESTIONS[0]]))
    assert "secret-1" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "must be an address"),
        ("ftp://a/v1", "must be an address"),
        ("http://u:p@a/v1", "api-key-env"),
    ],
)
def test_addresses_that_cannot_work_are_refused(url, said):
    with pytest.raises(ValueError, match=said):
        Endpoint(url, "big")


@pytest.mark.parametrize("url", ["http://a:1/v1", "http://a:1/v1/", "http://a:1/v1/chat/completions"])
def test_all_spellings_of_an_address_ask_the_same_path(url):
    assert Endpoint(url, "big").completions_url == "http://a:1/v1/chat/completions"


@pytest.mark.parametrize(
    "body", ['{"error": {"message": "no"}}', '{"message": "no"}', '{"detail": "no"}', '{"error": "no"}', "no", '"no"']
)
def test_the_servers_message_is_found_however_it_is_wrapped(body):
    assert server_message(body) == "no"
