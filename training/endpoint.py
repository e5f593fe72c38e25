"""Answers through an OpenAI-compatible server (vLLM, SGLang, ...), for a target that has outgrown this machine.

Each dialogue is one task: its turns are asked one after the other, many dialogues at once. Errors that pass (429, 5xx,
a timeout, a broken connection, a reply that is no answer) are tried again after growing pauses; every other refusal
ends the run with what the server said. Only text comes back, so the exact tokens are not known.
"""

import http.client
import json
import queue
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed
from dataclasses import dataclass

from .answering import Decoding
from .dialogues import Answer, Dialogue
from .row_draws import row_seed

PASSING_STATUSES = {408, 429}
MAX_PAUSE_SECONDS = 60.0
# What vLLM, SGLang and OpenAI write where a prompt is too long; the status alone says only that something is wrong.
TOO_LONG = re.compile(r"context[ _]length|maximum (model|sequence) length|longer than the model", re.IGNORECASE)
TOO_LONG_REASON = "the prompt is too long for the endpoint"
# Parts of a reply that belong to the turn; vLLM has renamed the second one to the third.
MESSAGE_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")
QUOTED_CHARACTERS = 500


class EndpointError(RuntimeError):
    """The server refused, or gave no usable reply in all attempts."""


class PassingError(RuntimeError):
    """A failure that may not happen again; the server may say when to come back."""

    def __init__(self, message: str, pause_seconds: float | None = None):
        super().__init__(message)
        self.pause_seconds = pause_seconds


class PromptTooLongError(RuntimeError):
    """The server refused one prompt for its length."""


@dataclass(frozen=True)
class Endpoint:
    """
    Where and how to ask.

    Args:
        url (`str`): Up to and with `/v1`, or with `/chat/completions`.
        model (`str`): Name of the target on the server.
        api_key (`str`, *optional*): Sent as bearer token.
        concurrency (`int`, *optional*, defaults to 16): Dialogues at once.
        timeout_seconds (`float`, *optional*, defaults to 600.0): Of one request.
        max_retries (`int`, *optional*, defaults to 8): After the first attempt.
        first_pause_seconds (`float`, *optional*, defaults to 1.0): Before the first retry; pauses double.
    """

    url: str
    model: str
    api_key: str | None = None
    concurrency: int = 16
    timeout_seconds: float = 600.0
    max_retries: int = 8
    first_pause_seconds: float = 1.0

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`--endpoint` must be an address such as http://localhost:8000/v1, got {self.url}.")
        if parts.username is not None or parts.password is not None:
            raise ValueError("`--endpoint` must not hold a user or a password. Use `--api-key-env`.")

    @property
    def completions_url(self) -> str:
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


class EndpointAnswerer:
    """
    Answers dialogues through an endpoint.

    Args:
        endpoint ([`Endpoint`]): Where to ask.
        decoding ([`Decoding`]): How to answer; what is `None` is left to the server.
        drop_cut (`bool`, *optional*, defaults to `False`): Leave cut answers out.
    """

    def __init__(self, endpoint: Endpoint, decoding: Decoding, drop_cut: bool = False):
        self.endpoint = endpoint
        self.decoding = decoding
        self.drop_cut = drop_cut
        self._stopped = threading.Event()

    def answer(self, shards: Iterable[list[Dialogue]], report: Callable[[Answer], None]) -> Iterator[list[Dialogue]]:
        """
        Gives all answers that the dialogues want. The next shard is asked for while the last answers of this one are
        on their way, so that the server always has work.

        Args:
            shards (`Iterable[list[Dialogue]]`): Dialogues that are written together.
            report (`Callable`): Called with every answer, in this thread.

        Returns:
            `Iterator[list[Dialogue]]`: The same dialogues, one shard at a time, in order.

        Raises:
            EndpointError: If the server refuses, or does not answer.
        """
        tasks = queue.SimpleQueue()
        # Daemons: an interrupted run does not wait for the replies to its last requests.
        for _ in range(self.endpoint.concurrency):
            threading.Thread(target=self._work, args=(tasks,), daemon=True).start()
        waiting = deque()
        try:
            for dialogues in shards:
                waiting.append((dialogues, [submit(dialogue, tasks) for dialogue in dialogues]))
                if len(waiting) > 1:
                    yield finish(*waiting.popleft(), report)
            while waiting:
                yield finish(*waiting.popleft(), report)
        finally:
            self._stopped.set()
            for _ in range(self.endpoint.concurrency):
                tasks.put(None)

    def reproduces(self, dialogue: Dialogue) -> bool | None:
        """Unknown: the server sends no tokens."""
        return None

    def _work(self, tasks: queue.SimpleQueue) -> None:
        while (task := tasks.get()) is not None and not self._stopped.is_set():
            dialogue, future = task
            try:
                self._converse(dialogue)
            except Exception as error:  # raised again by the main thread, which waits for the future
                future.set_exception(error)
            else:
                future.set_result(dialogue)

    def _converse(self, dialogue: Dialogue) -> None:
        while dialogue.advance():
            try:
                reply = self._ask(self._request(dialogue))
            except PromptTooLongError:
                dialogue.end(TOO_LONG_REASON)
            else:
                dialogue.take(read_reply(reply), self.drop_cut)

    def _request(self, dialogue: Dialogue) -> dict:
        decoding = self.decoding
        request = {
            "model": self.endpoint.model,
            "messages": [as_sent(message) for message in dialogue.said],
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature if decoding.do_sample else 0.0,
        }
        if dialogue.tools:
            request["tools"] = dialogue.tools
        if decoding.do_sample:
            request["top_p"], request["top_k"] = decoding.top_p, decoding.top_k
            # 31 bits: what every server takes.
            request["seed"] = row_seed(decoding.seed, dialogue.number, len(dialogue.answers)) >> 32
        return {name: value for name, value in request.items() if value is not None}

    def _ask(self, request: dict) -> dict:
        """The reply to `request`, after as many attempts as are allowed."""
        endpoint = self.endpoint
        for attempt in range(endpoint.max_retries + 1):
            try:
                return post(endpoint, request)
            except PassingError as error:
                last = error
            if attempt < endpoint.max_retries:
                pause = last.pause_seconds or endpoint.first_pause_seconds * 2**attempt
                if self._stopped.wait(min(pause, MAX_PAUSE_SECONDS)):
                    break
        raise EndpointError(
            f"The endpoint {endpoint.completions_url} gave no answer in {endpoint.max_retries + 1} attempts; "
            f"the last one: {last}"
        )


def as_sent(message: dict) -> dict:
    """The message as the protocol has it: arguments of calls are JSON texts there, objects for chat templates."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": as_text(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def as_text(arguments: dict | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def submit(dialogue: Dialogue, tasks: queue.SimpleQueue) -> Future:
    future = Future()
    tasks.put((dialogue, future))
    return future


def finish(dialogues: list[Dialogue], futures: list[Future], report: Callable[[Answer], None]) -> list[Dialogue]:
    """Waits for a shard."""
    for future in as_completed(futures):
        for answer in future.result().answers:
            report(answer)
    return dialogues


def post(endpoint: Endpoint, request: dict) -> dict:
    """
    One attempt.

    Returns:
        `dict`: The reply, which holds a choice with a message.

    Raises:
        PassingError: If another attempt may succeed.
        PromptTooLongError: If the server says so.
        EndpointError: If the server refuses.
    """
    headers = {"Content-Type": "application/json"}
    if endpoint.api_key is not None:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    body = json.dumps(request).encode()
    try:
        http_request = urllib.request.Request(endpoint.completions_url, body, headers, method="POST")
        with urllib.request.urlopen(http_request, timeout=endpoint.timeout_seconds) as response:
            text = response.read().decode("utf-8", errors="replace")
    except urllib.error.HTTPError as error:
        raise refusal(error, endpoint) from None
    except (OSError, http.client.HTTPException) as error:
        raise PassingError(f"{type(error).__name__}: {error}") from None
    return check_reply(text)


def refusal(error: urllib.error.HTTPError, endpoint: Endpoint) -> Exception:
    """What an HTTP status above 399 means for the run."""
    said = server_message(error.read().decode("utf-8", errors="replace"))
    if error.code in PASSING_STATUSES or error.code >= 500:
        retry_after = error.headers.get("Retry-After", "")
        return PassingError(f"status {error.code}, {said}", float(retry_after) if retry_after.isdigit() else None)
    if error.code in (400, 413, 422) and TOO_LONG.search(said):
        return PromptTooLongError(said)
    return EndpointError(f"The endpoint {endpoint.completions_url} refused with status {error.code}: {said}")


def server_message(body: str) -> str:
    """The message in an error reply, however it is wrapped."""
    try:
        content = json.loads(body)
    except json.JSONDecodeError:
        return quote(body)
    if isinstance(content, dict):
        content = content.get("error", content)
    if isinstance(content, dict):
        content = next((content[name] for name in ("message", "detail") if name in content), content)
    return quote(content if isinstance(content, str) else json.dumps(content))


def check_reply(text: str) -> dict:
    """
    The reply as an object.

    Raises:
        PassingError: If it is not one, or holds no answer.
    """
    try:
        reply = json.loads(text)
    except json.JSONDecodeError as error:
        raise PassingError(f"the reply is not valid JSON ({error}): {quote(text)}") from None
    try:
        message = reply["choices"][0]["message"]
        is_answer = isinstance(message, dict) and any(message.get(name) is not None for name in MESSAGE_FIELDS)
    except (KeyError, IndexError, TypeError):
        is_answer = False
    if not is_answer:
        raise PassingError(f"the reply holds no answer: {quote(text)}")
    return reply


def read_reply(reply: dict) -> Answer:
    """The answer in a checked reply."""
    choice = reply["choices"][0]
    said = choice["message"]
    message = {"role": "assistant", "content": said.get("content") or ""}
    reasoning = said.get("reasoning_content") or said.get("reasoning")
    if reasoning:
        message["reasoning_content"] = reasoning
    if said.get("tool_calls"):
        message["tool_calls"] = said["tool_calls"]
    usage = reply.get("usage") or {}
    return Answer(message, choice.get("finish_reason") == "length", usage.get("completion_tokens") or 0)


def quote(text: str) -> str:
    return text if len(text) <= QUOTED_CHARACTERS else text[:QUOTED_CHARACTERS] + " ..."
