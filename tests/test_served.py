"""Served models: a stub of an OpenAI-compatible server answers as the tiny model does, or breaks as servers do."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from forgetless import AuditConfig, audit
from forgetless.auditing import served
from forgetless.cli import main
from forgetless.data.batches import Encoder
from forgetless.data.tasks import Row
from forgetless.errors import EndpointError, UsageError
from forgetless.model.base import load_base, load_tokenizer
from forgetless.runs.folder import read_json
from forgetless.score.generation import Answer, answers
from forgetless.subjects.endpoint import Endpoint, find_endpoint

KEY = "s3cret-key"


class Stub(ThreadingHTTPServer):
    """Serves `reply(route, body)`: a status and JSON, or bytes as they stand; remembers what it was asked."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.keys, self.lock = reply, [], [], threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        route = self.path.removeprefix("/v1/")
        with self.server.lock:  # one model, one thread
            self.server.asked.append((route, body))
            self.server.keys.append(self.headers.get("Authorization"))
            status, told = MODELS if route == "models" else self.server.reply(route, body)
        data = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + 9 * (status == 299)))  # 299: cut off
        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *told):
        pass


MODELS = (200, {"data": [{"id": "shipped"}]})


def said(text: str, reason: str = "stop", chat: bool = False) -> tuple[int, dict]:
    answer = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return 200, {"choices": [answer | {"finish_reason": reason}]}


@pytest.fixture
def serve():
    """Starts a stub with a reply; all are closed at the end."""
    begun = []

    def start(reply) -> Stub:
        begun.append(Stub(reply))
        threading.Thread(target=begun[-1].serve_forever, args=(0.01,), daemon=True).start()
        return begun[-1]

    yield start
    for one in begun:
        one.shutdown()
        one.server_close()


def greedy(folder: str):
    """What a server of the tiny model answers, in its own chat template."""
    model, tokenizer = load_base(folder, torch.float32, "cpu").model, load_tokenizer(Path(folder))
    encoder = Encoder(tokenizer, 256)

    def reply(route: str, body: dict) -> tuple[int, dict]:
        chat = route == "chat/completions"
        turns = tuple((one["role"], one["content"]) for one in body["messages"]) if chat else ()
        row = Row("", "", (*turns, ("assistant", ""))) if chat else Row(body["prompt"], " x")
        context = encoder.generation_context(row, body["max_tokens"])
        [answer] = answers(model, tokenizer, [context], body["max_tokens"], torch.device("cpu"))
        return said(answer.text, "stop" if answer.finished else "length", chat)

    return reply


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """One task that reads answers and likelihoods, one by answers alone, and one by likelihoods alone."""
    folder = tmp_path_factory.mktemp("served")
    rows = [{"prompt": f"What colour has the {key}? Answer:", "completion": f" {value}"} for key, value in
            (("sky", "blue"), ("grass", "green"), ("rose", "red"))]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [{"messages": [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": "blue"}]}
             for one in rows]  # fmt: skip
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "train.jsonl").write_text('{"prompt": "unseen", "completion": " blue"}')
    own = "train: train.jsonl, validation: 0, max_new_tokens: 6"
    (folder / "tasks.yaml").write_text(
        "tasks:\n"
        f"  - {{name: both, test: rows.jsonl, {own}, options: [blue, red, green], "
        "scorers: [options, code_similarity]}\n"
        f"  - {{name: chats, test: chats.jsonl, {own}, scorers: [code_similarity]}}\n"
        f"  - {{name: likely, test: rows.jsonl, {own}, options: [blue, green, red], scorers: [options]}}\n"
    )
    (folder / "notes.txt").write_text("The sky is blue.\n\nThe grass is green.")
    return str(folder / "tasks.yaml")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("forgetless.subjects.endpoint.time.sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_served_model_scores_as_the_same_model_opened_here(tiny, tasks, serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHIP_KEY", KEY)
    stub = serve(greedy(tiny))
    text = str(Path(tasks).parent / "notes.txt")
    told = ["audit", tiny, f"{stub.url}#shipped", "--tasks", tasks, "--text", text, "--api-key-env", "SHIP_KEY",
            "--device", "cpu", "--precision", "fp32", "--concurrency", "3"]  # fmt: skip
    code = main(
        [*told, "--output_dir", str(tmp_path / "out"), "--max-drop", "both=99pp", "likely=5pp", "--max-kl", "0.1"]
    )
    printed = " ".join(capsys.readouterr().out.split())
    record = read_json(tmp_path / "out" / "audit.json")
    [model] = record["models"]
    assert model["scores"] == {name: record["reference_scores"][name] for name in ("both", "chats")}
    assert [one["measure"] for one in record["columns"]] == ["code_similarity", "code_similarity", "likelihood"]
    assert (
        {one["change"] for one in model["changes"].values()} == {0} == {1 - one for one in model["agreement"].values()}
    )

    assert code == 3, "what a budget asks for and nobody measured is insufficient evidence"
    status = {one["name"]: (one["rows"], one["status"]) for one in model["findings"]}
    assert status["likely"] == status["notes"] == (0, "insufficient evidence")
    assert model["not_measured"] == ["likelihoods of likely", "predictions on notes", "weights"]
    for place in (printed, (tmp_path / "out" / "audit.html").read_text(), (tmp_path / "out" / "audit.md").read_text()):
        assert "likelihoods of likely, predictions on notes, weights" in " ".join(place.split())

    assert {body["temperature"] for _, body in stub.asked if body} == {0}
    assert set(stub.keys) == {f"Bearer {KEY}"}
    assert not any(KEY in file.read_text() for file in (tmp_path / "out").iterdir())
    assert main(["audit", "--verify", str(tmp_path / "out" / "evidence.json")]) == 3


def test_own_answers_and_the_system_prompt(tiny, tasks, serve, tmp_path):
    """Chats begin with the system prompt; answers to general prompts are checked for sanity; prompts may go as chat."""
    (tmp_path / "system.txt").write_text("Be brief.\n")
    stub = serve(lambda route, body: said("blue", chat=route.startswith("chat")))
    told = audit(AuditConfig(
        tiny, [stub.url], tasks, limit=2, system_prompt=str(tmp_path / "system.txt"), endpoint_api="chat",
        output_dir=str(tmp_path / "out"), device="cpu", precision="fp32",
    ))  # fmt: skip
    [model] = told["models"]
    assert model["name"].endswith("#shipped") and model["outcome"] is None
    assert [one["answers"] for one in model["sanity"].values()] == [2]
    bodies = [body for route, body in stub.asked if route == "chat/completions"]
    plain = [body for body in bodies if "messages" in body]
    assert len(plain) == len(bodies) == 6
    assert all(body["messages"][0] == {"role": "system", "content": "Be brief."} for body in plain)
    assert model["identity"]["system_prompt"] and "Be brief" not in json.dumps(told)


def test_the_reference_is_here(tiny, serve):
    stub = serve(lambda route, body: said("blue"))
    with pytest.raises(UsageError, match="gives answers only"):
        audit(AuditConfig(stub.url, [tiny], device="cpu"))


ROWS = [Row(f"Prompt {i}", " x", source=f"rows:{i}") for i in range(5)]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": "no"}), "not allowed .no key was sent.*--api-key-env"),
        ((404, {"error": "no such model"}), "404 for /completions with model 'shipped': .*no such model"),
        ((400, {"error": "context length 128"}), "answered 400.*context length"),
        ((302, {}), "answered 302"),
        ((200, b"<html>"), "no JSON"),
        ((200, {"choices": []}), "without one choice"),
        ((200, {"choices": [{"text": None, "finish_reason": "length"}]}), "rows:0: .* answered no text"),
        ((299, b'{"choices"'), "no whole answer from /completions.*6 times"),
        ((503, {}), "answered 503 Service Unavailable .6 times"),
    ],
)
def test_what_servers_say_instead_is_named(serve, reply, message):
    endpoint = find_endpoint(serve(lambda route, body: reply).url)
    with pytest.raises(EndpointError, match=message):
        endpoint.answers(ROWS[:1], 4)


def test_no_server_no_model_no_key(serve, monkeypatch):
    stub = serve(lambda route, body: said("x"))
    with pytest.raises(UsageError, match="serves no model 'shiped'; did you mean 'shipped'"):
        find_endpoint(f"{stub.url}#shiped")
    with pytest.raises(UsageError, match="not set"):
        find_endpoint(stub.url, key_variable="FORGETLESS_NO_SUCH_KEY")
    with pytest.raises(UsageError, match="without user, password"):
        find_endpoint("http://me:pass@127.0.0.1/v1")
    with pytest.raises(EndpointError, match=r"no whole answer from /models: .*refused"):
        find_endpoint("http://127.0.0.1:9/v1")


def test_a_busy_server_is_asked_again_and_the_order_is_that_of_the_rows(serve):
    seen = set()

    def reply(route, body):
        first = body["prompt"] not in seen
        seen.add(body["prompt"])
        return (429, {}) if first else said(body["prompt"], "length" if body["prompt"].endswith("3") else "stop")

    stub = serve(reply)
    found = find_endpoint(stub.url, concurrency=4).answers(ROWS, 4)
    assert found == [Answer(row.prompt, not row.prompt.endswith("3")) for row in ROWS]


def test_what_was_cut_off_goes_on_from_its_answers_for_a_day(serve, monkeypatch):
    broken = True
    stub = serve(lambda route, body: (400, {}) if broken and body["prompt"] == "Prompt 3" else said(body["prompt"]))
    endpoint = Endpoint("served", stub.url, "shipped", concurrency=1)
    with pytest.raises(EndpointError):
        served.answered(endpoint, ROWS, 4)
    broken, before = False, len(stub.asked)
    assert [one.text for one in served.answered(endpoint, ROWS, 4)] == [row.prompt for row in ROWS]
    assert [body["prompt"] for _, body in stub.asked[before:]] == ["Prompt 3", "Prompt 4"]
    served.answered(endpoint, ROWS, 4)
    assert len(stub.asked) == before + 2 + 5, "a finished audit keeps no answers of a server"
