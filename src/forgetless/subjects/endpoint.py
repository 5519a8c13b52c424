"""A served model, behind an OpenAI-compatible endpoint: what ships, quantised and with its system prompt, gives answers
and nothing else.

`http://host:port/v1#model-name` names one; without `#model-name` the only model that the server lists.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from forgetless.data.tasks import Row
from forgetless.errors import EndpointError, UsageError, nearest, quoted
from forgetless.model.identity import text_digest
from forgetless.score.generation import Answer

PASSING = (408, 409, 429, 500, 502, 503, 504)  # worth asking again
TIMEOUT = 600.0  # seconds for one answer: a busy server lets requests wait
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before asking again


class _NoRedirect(HTTPRedirectHandler):
    """A redirection would carry the key to another host."""

    def redirect_request(self, *args: Any, **more: Any) -> None:
        return None


_OPENER = build_opener(_NoRedirect)


class _PassingError(Exception):
    """What may be gone in a second."""


def is_endpoint(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Endpoint:
    """A model by the address of its server and its name there."""

    name: str  # as the user wrote it, with the model's name
    url: str  # up to /v1
    model: str
    api: str = "own"  # own: a chat row as chat, a prompt as it stands; chat: a prompt as a user's turn
    system_prompt: str = ""
    key_variable: str | None = None  # the environment variable that holds the key; the key itself is nowhere kept
    concurrency: int = 8  # requests under way at a time
    waits: Sequence[float] = field(default=WAITS, repr=False)
    timeout: float = field(default=TIMEOUT, repr=False)

    @property
    def decided_by(self) -> dict:
        """All that is known of what decides its answers: where it is asked and how, not its weights."""
        prompt = text_digest(self.system_prompt) if self.system_prompt else None
        return {"endpoint": self.url, "model": self.model, "api": self.api, "system_prompt": prompt}

    def as_json(self) -> dict:
        """What a record keeps, as of a local model."""
        return {"name": self.name, "identity": self.decided_by, "notes": []}

    def request(self, row: Row, max_new_tokens: int) -> tuple[str, dict]:
        """The route and the body that ask for a row's greedy answer."""
        settings = {"model": self.model, "max_tokens": max_new_tokens, "temperature": 0}
        if not row.messages and self.api == "own":
            return "completions", settings | {"prompt": row.prompt.rstrip(" ")}
        turns = row.turns_before if row.messages else (("user", row.prompt.rstrip(" ")),)
        if self.system_prompt and all(role != "system" for role, _ in turns):
            turns = (("system", self.system_prompt), *turns)
        return "chat/completions", settings | {"messages": [{"role": one, "content": text} for one, text in turns]}

    def answers(
        self, rows: Sequence[Row], max_new_tokens: int, done: Callable[[int, Answer], None] = lambda i, answer: None
    ) -> list[Answer]:
        """The greedy answer to each row; `done` is told of each in this thread. The first error ends the rest."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting: list[Future] = [
                pool.submit(copy_context().run, self._answer, row, max_new_tokens) for row in rows
            ]  # the context says whether an error may quote a row
            found = []
            try:
                for i, one in enumerate(waiting):
                    found.append(one.result())
                    done(i, found[-1])
            except BaseException:
                pool.shutdown(cancel_futures=True, wait=False)
                raise
        return found

    def _answer(self, row: Row, max_new_tokens: int) -> Answer:
        route, body = self.request(row, max_new_tokens)
        told = self.ask(route, body)
        try:
            [choice] = told["choices"]
            text = choice["message"]["content"] if route.startswith("chat") else choice["text"]
            reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._error(f"/{route} answered without one choice with its text and finish_reason: "
                              f"{quoted(json.dumps(told))}. Is it an OpenAI-compatible server?") from error  # fmt: skip
        if not isinstance(text, str):
            raise self._error(
                f"{row.source}: /{route} answered no text (finish_reason {reason!r}); a model that thinks first needs "
                "more max_new_tokens in the task"
            )
        return Answer(text, reason != "length")

    def ask(self, route: str, body: dict | None = None) -> Any:
        """The JSON that the server answers, asked again where it is busy or the connection breaks."""
        for wait in (*self.waits, None):
            try:
                return self._once(route, body)
            except _PassingError as error:
                if wait is None:
                    times = len(self.waits) + 1
                    raise self._error(f"{error} ({times} times); is it up, and at this address?") from error
                time.sleep(wait)

    def _once(self, route: str, body: dict | None) -> Any:
        headers = {"Content-Type": "application/json"} | self._key()
        data = None if body is None else json.dumps(body).encode()
        try:
            with _OPENER.open(Request(f"{self.url}/{route}", data, headers), timeout=self.timeout) as answer:
                raw = answer.read()
        except HTTPError as error:
            with error:
                said = error.read(2000).decode("utf-8", "replace")
            if error.code in PASSING:
                raise _PassingError(f"/{route} answered {error.code} {error.reason}") from error
            raise self._error(self._refused(route, error.code, said)) from error
        except (URLError, HTTPException, OSError) as error:  # OSError: timeouts and broken connections
            why = error.reason if isinstance(error, URLError) else error
            raise _PassingError(f"no whole answer from /{route}: {why or type(error).__name__}") from error
        try:
            return json.loads(raw)
        except ValueError as error:
            raise self._error(f"/{route} answered what is no JSON; is {self.url} the address up to /v1?") from error

    def _refused(self, route: str, code: int, said: str) -> str:
        if code in (401, 403):
            held = f"the key in {self.key_variable}" if self.key_variable else "no key was sent"
            return f"{code}, not allowed ({held}); name the environment variable that holds it: --api-key-env NAME"
        if code == 404:
            return f"404 for /{route} with model {self.model!r}: {quoted(said)}; check the name after # and the address"
        return f"/{route} answered {code}: {quoted(said)}"

    def _key(self) -> dict[str, str]:
        if self.key_variable is None:
            return {}
        if not (key := os.environ.get(self.key_variable)):
            raise UsageError(f"--api-key-env {self.key_variable}: this environment variable is not set, or empty")
        return {"Authorization": f"Bearer {key}"}

    def _error(self, message: str) -> EndpointError:
        return EndpointError(f"{self.name}: {message}")


def find_endpoint(spec: str, **settings: Any) -> Endpoint:
    """The endpoint of a name, which is asked which models it serves; `settings` are fields of `Endpoint`."""
    address, _, model = spec.partition("#")
    parts = urlsplit(address)
    if parts.username or parts.password or parts.query or not parts.hostname:
        raise UsageError("an endpoint is http://host:port/v1#model-name, without user, password or query; a key goes "
                         "into an environment variable that --api-key-env names")  # fmt: skip
    url = address.rstrip("/")
    found = Endpoint(spec, url, model, **settings)
    told = found.ask("models")
    try:
        served = [one["id"] for one in told["data"]]
    except (KeyError, TypeError) as error:
        raise EndpointError(f"{spec}: /models answered no list of models; is {url} the address up to /v1?") from error
    if not model and len(served) == 1:
        return Endpoint(f"{url}#{served[0]}", url, served[0], **settings)
    if model not in served:
        what = f"it serves no model {model!r}" if model else "which model? Give its name after #"
        raise UsageError(f"{spec}: {what}{nearest(model, served)}")
    return found
