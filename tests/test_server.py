"The server over real sockets: OpenAI's own clients, every kind of wrong request, readers who leave, limits, stopping."
import asyncio
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from microjulia.generation import Event
from microjulia.streaming import chat_completion, completion_request, stream_chat, stream_completion, text_completion

openai = pytest.importorskip("openai", reason="the client is the openai package")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")
from microjulia.serving.protocol import Limits, chat_template, openapi  # noqa: E402
from microjulia.serving.answers import Live, Served, Service  # noqa: E402
from microjulia.serving.server import Connection, make_server, page  # noqa: E402
from server_rig import LIMITS, WAIT, Held, Puppet, engine, server, tok  # noqa: E402

@pytest.fixture(scope="module")
def live():
    with server(("plato", engine(), {"arch": "gpt2"}, 7), ("zeno", engine(1, " abcdefghijklmnopqrstuvwxyzABC.12"))) as service:
        yield service


@pytest.fixture(scope="module")
def client(live): return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


def call(service, path, body=None, method=None, raw=None, **headers):
    "Status, headers, and the answer as JSON where it is."
    connection = http.client.HTTPConnection(urlsplit(service.url).netloc, timeout=WAIT)
    raw = json.dumps(body).encode() if body is not None else raw
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method or ("POST" if raw is not None else "GET"), path, raw,
                       ({"Content-Type": "application/json"} if raw is not None else {}) | headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, json.loads(text) if answer.headers.get_content_type() == "application/json" else text


def is_error(answer, status, code=None, param=None):
    "The answer is an error of four keys, short, with the status, and the code and field where given."
    got, headers, body = answer
    assert got == status and set(body) == {"error"}, answer
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 300, error
    openai.types.ErrorObject.model_validate(error, strict=True)
    assert (code is None or error["code"] == code) and (param is None or error["param"] == param), error
    if status in (429, 503): assert int(headers["Retry-After"]) >= 1
    return error


def chat(content="What is virtue?", **more): return {"messages": [{"role": "user", "content": content}], **more}


def chunks(text):
    lines = [line for line in text.split("\n\n") if line and line[0] != ":"]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]", lines[-3:]
    return [json.loads(line[6:]) for line in lines[:-1]]


def same(ours, expected):
    "Equal but for id and time; log-probabilities within rounding."
    return json.dumps(settle(ours)) == json.dumps(settle(expected))


def settle(o):
    if isinstance(o, float): return round(o, 3) + 0.0
    if isinstance(o, list): return [settle(v) for v in o]
    if isinstance(o, dict): return {k: settle(v) for k, v in sorted(o.items()) if k not in ("id", "created")}
    return o


# What is moved is what notebook 07 makes

CHATS = [{}, dict(max_tokens=5), dict(temperature=0, top_k=0), dict(n=3, max_tokens=9), dict(stop=["e", "a"]), dict(stop=" "),
         dict(logprobs=True, top_logprobs=3, max_tokens=6), dict(logit_bias={"e": -100, "3": 5.5}), dict(min_p=.1, top_p=.9),
         dict(repetition_penalty=1.3, presence_penalty=1, frequency_penalty=-.5), dict(until="sentence", min_tokens=3),
         dict(max_completion_tokens=4, max_tokens=90), dict(n=2, logprobs=True, max_tokens=4)]
TEXTS = [dict(prompt="virtue"), dict(prompt=["virtue", "vice"], n=2), dict(prompt=[1, 2, 3], echo=True), dict(prompt=[[4], [5, 6]]),
         dict(prompt="virtue is knowledge. " * 3, echo=True, logprobs=2, max_tokens=0), dict(prompt="a" * 40, max_tokens=3),
         dict(prompt="virtue", echo=True, logprobs=0, max_tokens=4), dict(prompt="vice", max_tokens=0)]


@pytest.mark.parametrize("more", CHATS, ids=str)
def test_chat(live, more):
    body, source = chat(seed=3, **more), live.find(None).engine
    status, headers, got = call(live, "/v1/chat/completions", body | dict(model="plato"))
    assert status == 200 and same(got, chat_completion(source, body | dict(model="plato")))
    body |= dict(stream=True, chunk_chars=1, stream_options=dict(include_usage=True))
    status, headers, text = call(live, "/v1/chat/completions", body)
    assert headers["content-type"].startswith("text/event-stream") and headers["x-accel-buffering"] == "no"
    expected = list(stream_chat(source, body | dict(model="plato")))
    by_choice = lambda objects: sorted(objects, key=lambda o: o["choices"][0]["index"] if o["choices"] else 999)
    assert same(by_choice(chunks(text)), by_choice(expected))


@pytest.mark.parametrize("more", TEXTS, ids=lambda d: str(d)[:40])
def test_text(live, more):
    body, source = dict(seed=3, model="plato", **more), live.find(None).engine
    assert same(call(live, "/v1/completions", body)[2], text_completion(source, body))
    body |= dict(stream=True, chunk_chars=2)
    by_choice = lambda objects: sorted(objects, key=lambda o: o["choices"][0]["index"])
    assert same(by_choice(chunks(call(live, "/v1/completions", body)[2])), by_choice(list(stream_completion(source, body))))


def test_the_call_of_the_original(live):
    status, _, text = call(live, "/v1/chat/completions", raw=b'{"messages": [{"role": "user", "content": "Hello?"}], "stream": true}')
    got = chunks(text)
    assert status == 200 and got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""} and got[0]["model"] == "plato"
    assert len("".join(c["choices"][0]["delta"].get("content", "") for c in got)) == 200


def test_characters_that_are_ready_leave_together(live):
    status, _, text = call(live, "/v1/completions", dict(prompt="a", max_tokens=300, stream=True))
    sizes = [len(c["choices"][0]["text"]) for c in chunks(text)[:-1]]
    assert sum(sizes) == 300 and sizes[0] == 1 and len(sizes) < 150


# OpenAI's own clients

def test_the_python_client(client, live):
    answer = client.chat.completions.create(model="plato", messages=[dict(role="user", content="hi")], seed=1, max_tokens=8)
    assert len(answer.choices[0].message.content) == 8 and answer.usage.total_tokens == 10 and answer._request_id
    stream = client.chat.completions.create(model="plato", messages=[dict(role="user", content="hi")], seed=1, max_tokens=8,
                                            stream=True, stream_options=dict(include_usage=True), extra_body=dict(top_k=40))
    pieces = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == answer.choices[0].message.content
    assert pieces[-1].usage == answer.usage
    scored = client.completions.create(model="zeno", prompt="Ab", echo=True, logprobs=1, max_tokens=0)
    assert scored.choices[0].logprobs.tokens == ["A", "b"] and scored.model == "zeno"
    assert [m.id for m in client.models.list()] == ["plato", "zeno"]
    assert client.models.retrieve("zeno").object == "model"


@pytest.mark.parametrize("more,error,code", [
    (dict(model="socrates"), openai.NotFoundError, "model_not_found"), (dict(temperature=3), openai.BadRequestError, None),
    (dict(n=20), openai.BadRequestError, None), (dict(messages=[]), openai.BadRequestError, None)])
def test_the_client_raises_what_it_should(client, more, error, code):
    with pytest.raises(error) as e:
        client.chat.completions.create(**dict(model="plato", messages=[dict(role="user", content="a")]) | more)
    assert e.value.code == code and (code or e.value.param == next(iter(more)))


JS = """
import OpenAI from 'openai';
const client = new OpenAI({baseURL: process.argv[2] + '/v1', apiKey: 'none', maxRetries: 0});
const messages = [{role: 'user', content: 'What is virtue?'}], body = {model: 'plato', messages, seed: 1, max_tokens: 20};
const whole = await client.chat.completions.create(body);
let text = '';
for await (const c of await client.chat.completions.create({...body, stream: true})) text += c.choices[0]?.delta?.content ?? '';
let error;
try { await client.chat.completions.create({...body, model: 'nobody'}); } catch (e) { error = [e.constructor.name, e.code]; }
console.log(JSON.stringify({whole: whole.choices[0].message.content, text, error, models: (await client.models.list()).data.length}));
"""


def test_the_javascript_client(live, tmp_path):
    folder = os.environ.get("MICROJULIA_NODE_MODULES")  # .ci/run puts OpenAI's package there
    if not (shutil.which("node") and folder and (Path(folder) / "openai").exists()):
        pytest.skip("node, or a folder $MICROJULIA_NODE_MODULES with the package openai, is not here")
    (tmp_path / "node_modules").symlink_to(folder)
    (tmp_path / "ask.mjs").write_text(JS)
    done = subprocess.run(["node", "ask.mjs", live.url], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    got = json.loads(done.stdout or "null")
    assert done.returncode == 0, done.stderr
    assert got["whole"] == got["text"] and len(got["text"]) == 20 and got["models"] == 2
    assert got["error"] == ["NotFoundError", "model_not_found"]


# Models and templates

def test_models(live):
    assert [m["id"] for m in call(live, "/v1/models")[2]["data"]] == ["plato", "zeno"]
    assert call(live, "/v1/models/plato")[2] == dict(id="plato", object="model", created=7, owned_by="microjulia", max_model_len=32)
    is_error(call(live, "/v1/models/nobody"), 404, "model_not_found")
    assert call(live, "/v1/completions", dict(prompt="A1", model="zeno", echo=True, max_tokens=1))[2]["choices"][0]["text"][:2] == "A1"


def test_a_prompt_longer_than_the_context():
    source, long = engine(), chat("x" * 50, max_tokens=1)
    with server(("m", source)) as service: assert call(service, "/v1/chat/completions", long)[2]["usage"]["prompt_tokens"] == 32
    with server(("m", engine()), crop=False) as service:
        assert "50" in is_error(call(service, "/v1/chat/completions", long), 400, "context_length_exceeded", "messages")["message"]


def test_a_template():
    with server(("m", engine()), template=chat_template("{role} {content}. ")) as service:
        body = dict(messages=[dict(role="system", content="be kind"), dict(role="user", content="hi")], max_tokens=1)
        assert call(service, "/v1/chat/completions", body)[2]["usage"]["prompt_tokens"] == len("system be kind. user hi. ")


# Wrong requests

@pytest.mark.parametrize("raw,status,code", [
    (b"", 400, "invalid_json"), (b"{", 400, "invalid_json"), (b'{"messages": NaN}', 400, "invalid_json"),
    (b'{"prompt": "a", "prompt": "b"}', 400, "invalid_json"), (b"[" * 9000, 400, "invalid_json"), (b"\xff\xfe{}", 400, "invalid_json"),
    (b"9" * 9000, 400, "invalid_json"), (b"[]", 400, None), (b"null", 400, None), (b'"x"', 400, None), (b"{}", 400, None),
    (b'{"model": 3}', 400, None), (b" " * 20_001, 413, "request_too_large"), (b'{"a": "' + b"x" * 500_000, 413, "request_too_large")])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bad_bodies(live, path, raw, status, code): is_error(call(live, path, raw=raw), status, code)


@pytest.mark.parametrize("more", [dict(temperature="hot"), dict(stop=["x"] * 5), dict(n=0), dict(n=17), dict(max_tokens=5000),
                                  dict(logit_bias={"nous": 1}), dict(stream="yes"), dict(stream_options={}), dict(seed=2**64),
                                  dict(model=["x"]), dict(top_logprobs=3), dict(response_format={"type": "json_object"}),
                                  dict(messages="x" * 9000), dict(messages=[{"role": "x" * 9000}]), dict(model="x" * 9000)], ids=lambda d: str(d)[:30])
def test_bad_fields(live, more):
    name = next(iter(more))
    error = is_error(call(live, "/v1/chat/completions", chat() | more), 404 if more == dict(model="x" * 9000) else 400, param=name)
    assert "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" not in error["message"]


def test_half_a_surrogate_pair_is_no_trouble(live):
    for field in b'"prompt": "\\ud800 virtue"', b'"prompt": "a", "stop": "\\udfff"', b'"prompt": "a", "suffix": "\\udfff"':
        assert call(live, "/v1/completions", raw=b'{"max_tokens": 1, %b}' % field)[0] in (200, 400)
    assert call(live, "/v1/completions", raw=b'{"prompt": "a", "max_tokens": 1, "user": "\\ud800"}')[0] == 200
    is_error(call(live, "/v1/completions", raw=b'{"prompt": "a", "model": "\\ud800"}'), 404, "model_not_found")


def test_other_errors_have_the_same_shape(live):
    is_error(call(live, "/v1/nothing"), 404)
    is_error(call(live, "/v1/models/"), 404)
    answer = call(live, "/v1/chat/completions")
    is_error(answer, 405)
    assert answer[1]["Allow"] == "POST"
    is_error(call(live, "/health", {}), 405)
    for kind in "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x":
        is_error(call(live, "/v1/completions", raw=b"{}", Content_Type=kind), 415, "unsupported_media_type")
    is_error(call(live, "/v1/completions", raw=b"{}", Content_Encoding="gzip"), 415)
    assert call(live, "/v1/completions", dict(prompt="a", max_tokens=1), Content_Type="application/json; charset=utf-8")[0] == 200
    is_error(call(live, "/v1/%ff%00/../..//etc/passwd"), 404)


# Keys, origins, ids, logs, figures

def test_keys():
    with server(("m", engine()), keys=["alpha", "beta"], cors=["https://a.example"]) as service:
        body = dict(prompt="a", max_tokens=1)
        for header in "", "Bearer", "Bearer alph", "Bearer alphaa", "Basic alpha", "alpha", "Bearer \u00e9", "Bearer alpha beta":
            answer = call(service, "/v1/completions", body, Authorization=header)
            is_error(answer, 401, "invalid_api_key")
            assert answer[1]["WWW-Authenticate"] == "Bearer"
        for key in "alpha", "beta":
            assert call(service, "/v1/completions", body, Authorization=f"Bearer {key}")[0] == 200
        for path in "/", "/health", "/docs", "/openapi.json": assert call(service, path)[0] == 200
        for path in "/v1/models", "/metrics", "/v1/nothing": is_error(call(service, path), 401)
        preflight = dict(Origin="https://a.example", Access_Control_Request_Method="POST",
                         Access_Control_Request_Headers="authorization,content-type,x-stainless-lang")
        status, headers, _ = call(service, "/v1/completions", method="OPTIONS", **preflight)
        assert status == 200 and headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in headers["access-control-allow-headers"] and "access-control-allow-credentials" not in headers
        assert call(service, "/v1/completions", body, Origin="https://a.example")[1]["access-control-allow-origin"]  # on a 401
        answer = call(service, "/v1/completions", method="OPTIONS", **preflight | dict(Origin="https://b.example"))
        is_error(answer, 400, "cors")
        assert "access-control-allow-origin" not in answer[1]


def test_no_origin_may_call_unless_it_was_allowed(live):
    status, headers, _ = call(live, "/v1/models", Origin="https://a.example")
    assert status == 200 and "access-control-allow-origin" not in headers
    is_error(call(live, "/v1/completions", method="OPTIONS", Origin="https://a.example", Access_Control_Request_Method="POST"), 405)


def test_ids_and_logs(caplog):
    with caplog.at_level(logging.INFO, "microjulia.server"), server(("m", engine())) as live:  # a line is written after its answer
        _, headers, _ = call(live, "/v1/chat/completions", chat("the secret of", max_tokens=3), X_Request_Id="mine-1")
        assert headers["x-request-id"] == "mine-1"
        for bad in "a b", "x" * 65, "\u00e9":
            assert re.fullmatch("[0-9a-f]{32}", call(live, "/v1/models", X_Request_Id=bad)[1]["x-request-id"])
        call(live, "/v1/completions?secret=1", dict(prompt=["secret"], temperature="secret"))
    lines = [json.loads(m) for m in caplog.messages]
    assert "secret" not in caplog.text
    first = next(line for line in lines if line["id"] == "mine-1")
    assert (first["status"], first["path"], first["completion_tokens"], first["finish"]) == (200, "/v1/chat/completions", 3, ["length"])
    assert first["client"] == "127.0.0.1" and 0 < first["first_ms"] <= first["ms"]


def test_prompts_are_logged_when_asked(caplog):
    with caplog.at_level(logging.INFO, "microjulia.server"), server(("m", engine()), log_prompts=True) as service:
        call(service, "/v1/completions", dict(prompt="tell me", max_tokens=1))
    assert json.loads(caplog.messages[-1])["body"]["prompt"] == "tell me"


def test_metrics(live):
    parser = pytest.importorskip("prometheus_client.parser")
    call(live, "/v1/completions", dict(prompt="abc", max_tokens=4))
    call(live, "/what/ever/123")
    found = {(s.name, *sorted(s.labels.values())): s.value
             for f in parser.text_string_to_metric_families(call(live, "/metrics")[2]) for s in f.samples}
    assert found["microjulia_tokens_total", "completion", "plato"] >= 4
    assert found["microjulia_requests_total", "/v1/completions", "200"] >= 1
    assert found["microjulia_requests_total", "404", "none"] >= 1 and not any("ever" in str(k) for k in found)
    assert found["microjulia_texts", "plato"] == 0 and found["microjulia_first_text_seconds_count",] >= 1


def test_what_it_says_of_itself(live):
    _, headers, facts = call(live, "/", Accept="*/*")
    assert facts["models"][0] | {} == dict(id="plato", context=32, vocab_size=28, arch="gpt2") and headers["Vary"] == "Accept"
    assert set(openapi("1")["paths"]) <= {p.replace(":path", "") for p in facts["endpoints"]}
    status, headers, html = call(live, "/", Accept="text/html,*/*;q=0.8")
    assert "<html" in html and "connect-src 'self'" in headers["content-security-policy"] and len(page()) < 30_000
    for text in html, call(live, "/docs")[2]: assert not re.search(r"(src|href|url\()\W*(https?:)?//", text)
    assert call(live, "/health")[2] == {"status": "ok"} and call(live, "/openapi.json")[2]["openapi"].startswith("3.1")


# Readers who leave, and places

def connect(service):
    host, port = urlsplit(service.url).netloc.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT)


def post(body, path="/v1/chat/completions"):
    raw = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


def reset(s):
    "Close so that the other side gets a reset, not an end of file."
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()


def until(s, mark):
    data = b""
    while mark not in data:
        piece = s.recv(65536)
        assert piece, data
        data += piece
    return data


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
@pytest.mark.parametrize("text,body", [("ab", chat(stream=True)), ("", chat(stream=True)), ("ab", chat()), ("", chat(n=3)),
                                       ("", dict(prompt=["a", "b"], n=2, stream=True))],
                         ids=["mid-stream", "before the first byte", "whole", "several", "several streamed"])
def test_a_client_that_leaves_gives_its_places_back(text, body, leave):
    puppet = Puppet(text)
    with server(("m", puppet), limits=Limits(per_client=9)) as service:
        s = connect(service)
        s.sendall(post(body, "/v1/completions" if "prompt" in body else "/v1/chat/completions"))
        assert puppet.waiting.wait(WAIT) and puppet.handles
        if text and body.get("stream"): until(s, b'"content":"b"')
        leave(s)
        assert puppet.empty.wait(WAIT) and not puppet.handles
        puppet.room = 0
        is_error(call(service, "/v1/chat/completions", chat()), 503, "queue_full")  # answered, so the loop is past its `finally`
        assert not service.busy


def test_a_silent_stream_is_kept_alive(monkeypatch):
    monkeypatch.setattr("microjulia.serving.answers.KEEP_ALIVE", .01)
    with server(("m", Puppet())) as service, connect(service) as s:
        s.sendall(post(chat(stream=True)))
        until(s, b"\n: waiting\n\n")


def test_no_place_is_kept_when_the_queue_is_full():
    puppet = Puppet(room=2)
    with server(("m", puppet)) as service:
        for stream in False, True: is_error(call(service, "/v1/chat/completions", chat(n=3, stream=stream)), 503, "queue_full")
        assert not puppet.handles and not service.busy
        client = openai.OpenAI(base_url=service.url + "/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError): client.completions.create(model="m", prompt="a", n=3)


def test_a_client_over_its_limit():
    puppet = Puppet("a")
    with server(("m", puppet), limits=Limits(per_client=2, drain_seconds=.3), keys=["one", "two"]) as service:
        s = connect(service)
        s.sendall(post(chat(stream=True, n=2)).replace(b"Host", b"Authorization: Bearer one\r\nHost"))
        assert puppet.waiting.wait(WAIT)
        is_error(call(service, "/v1/chat/completions", chat(), Authorization="Bearer one"), 429, "rate_limit_exceeded")
        is_error(call(service, "/v1/chat/completions", chat(n=3), Authorization="Bearer two"), 429)
        s.close()
        assert puppet.empty.wait(WAIT)
        puppet.room = 0
        is_error(call(service, "/v1/chat/completions", chat(), Authorization="Bearer one"), 503)


# Errors in the middle, and stopping

class Broken(Puppet):
    def stream(self, ids, params):
        class Handle(Held):
            async def __anext__(self):
                if self.left: return Event(self.left.pop(0), 2, -1.0)
                raise ZeroDivisionError("a secret")
        return Handle(self)


def test_an_error_in_the_engine(caplog):
    with server(("m", Broken("ab"))) as service:
        is_error(call(service, "/v1/chat/completions", chat()), 500, "internal_error")
        text = call(service, "/v1/chat/completions", chat(stream=True))[2]
        last = json.loads(text.strip().split("\n\n")[-1][6:])
        assert set(last["error"]) == {"message", "type", "param", "code"} and "secret" not in text and "[DONE]" not in text
        client = openai.OpenAI(base_url=service.url + "/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.APIError, match="could not be finished"):
            list(client.completions.create(model="m", prompt="a", stream=True))
    assert "a secret" in caplog.text


def test_stopping_ends_streams_with_a_reason():
    puppet = Puppet("ab")
    with server(("m", puppet)) as service:
        s = connect(service)
        s.sendall(post(chat(stream=True)))
        assert puppet.waiting.wait(WAIT)
        until(s, b'"content":"b"')
        service.background.stop()
        assert b'"code":"server_shutdown"' in until(s, b"\r\n0\r\n")
        assert not service.busy and service.closing


def test_stopping_lets_texts_end(live):
    with server(("m", engine()), limits=Limits(drain_seconds=WAIT)) as service:
        s = connect(service)
        s.sendall(post(chat(stream=True, max_tokens=600)))
        until(s, b'"content"')
        service.background.stop()
        assert b'"finish_reason":"length"' in until(s, b"[DONE]")


def test_the_command_is_stopped_by_a_signal(tmp_path):
    from microjulia.checkpoint import save_checkpoint
    source = engine()
    source.close()
    save_checkpoint(tmp_path / "plato", source.model, tok, step=0)
    script = Path(sys.executable).with_name("microjulia")
    p = subprocess.Popen([script, "serve", "--model", tmp_path / "plato", "--port", "0", "--device", "cpu"], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = [p.stdout.readline() for _ in range(3)]
    url = lines[0].split()[-1].removesuffix("/v1")
    service = type("Service", (), {"url": url})
    assert "curl -N " + url in lines[2] and call(service, "/v1/models")[2]["data"][0]["id"] == "plato"
    s = connect(service)
    s.sendall(post(chat("tell me", stream=True, max_tokens=300)))
    until(s, b'"content"')
    p.send_signal(signal.SIGTERM)
    assert b"[DONE]" in until(s, b"[DONE]")
    out, err = p.communicate(timeout=60)
    assert p.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM) and "Traceback" not in err and "tell" not in err
    assert [json.loads(line)["path"] for line in err.splitlines()] == ["/v1/models", "/v1/chat/completions"]


@pytest.mark.parametrize("argv,said", [
    ("--host 0.0.0.0", "--no-auth"), ("--long-prompt cut", "crop or reject"), ("--chat-template {role}", "{content}"),
    ("--model nowhere", "nowhere"), ("--port 70000", "port"), ("--host 1.2.3.4 --no-auth", "1.2.3.4")])
def test_the_command_refuses(capsys, argv, said):
    from microjulia.cli import main
    assert main(["serve", *(["--port", "0"] if "port" not in argv else []), *argv.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err


def test_keys_from_the_environment_let_in_other_machines(capsys, monkeypatch):
    from microjulia.cli import main
    monkeypatch.setenv("MICROJULIA_API_KEYS", "one,two")
    assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--model", "nowhere"]) == 2 and "nowhere" in capsys.readouterr().err


def test_a_missing_extra_is_one_line():
    code = "import sys; sys.modules['uvicorn'] = None; from microjulia.cli import main; sys.exit(main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr == "microjulia: error: the server needs uvicorn: pip install 'microjulia[serve]'\n"


def test_a_port_in_use_offers_the_next(capsys, live):
    from microjulia.cli import main
    port = urlsplit(live.url).port
    assert main(["serve", "--port", str(port)]) == 2 and f"--port {port + 1}" in capsys.readouterr().err


# Raw sockets

@pytest.mark.parametrize("raw", [b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/1.1\r\nA:" + b"a" * 99_000,
                                 b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
                                 b"GET / HTTP/1.1\r\n\xff\xfe: x\r\n\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: x\r\n\r\n"])
def test_what_is_not_http_gets_four_keys(live, raw):
    with connect(live) as s:
        s.sendall(raw)
        data = b""
        try:
            while piece := s.recv(65536): data += piece
        except ConnectionError: pass
    if data:
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.split()[1] in (b"400", b"501", b"405") and set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def closes(s):
    "The other side ends the connection; what came before."
    data = b""
    try:
        while piece := s.recv(65536): data += piece
    except ConnectionError: pass
    return data


def test_half_a_head_is_not_waited_for(live):
    with connect(live) as a, connect(live) as b, connect(live) as c:
        a.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        c.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # a second request on the line, of which half comes
        until(c, b'"ok"')
        c.sendall(b"GET /hea")
        assert [closes(s) for s in (a, b, c)] == [b""] * 3


def test_half_a_body_is_not_waited_for(live):
    with connect(live) as s:
        s.sendall(post(chat())[:-5])
        assert b"408" in (data := closes(s)).split(b"\r\n")[0] and b"request_timeout" in data


def test_a_reader_who_does_not_read_is_let_go():
    puppet = Puppet("abcdefgh" * 20_000)  # more than the buffers on the way can hold
    with server(("m", puppet)) as service:
        with connect(service) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.sendall(post(chat(stream=True, chunk_chars=1)))
            assert puppet.empty.wait(WAIT)


def test_requests_in_one_go_are_answered_in_order(live):
    with connect(live) as s:
        s.sendall(b"".join(post(dict(prompt="a", model="plato", max_tokens=n), "/v1/completions") for n in (3, 1, 2))
                  + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = closes(s)
    assert re.findall(rb'"completion_tokens": (\d)', data) == [b"3", b"1", b"2"] and data.endswith(b'{"status": "ok"}')


def test_a_body_in_small_pieces(live):
    raw = json.dumps(dict(prompt="a", max_tokens=1)).encode()
    with connect(live) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for byte in raw: s.sendall(b"1\r\n%c\r\n" % byte)
        s.sendall(b"0\r\n\r\n")
        assert b"200 OK" in closes(s)


def test_a_huge_body_is_heard_of_and_not_kept(live):
    with connect(live) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert b"413" in until(s, b"request_too_large")
    with connect(live) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        data = b""
        try:
            for _ in range(1000): s.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except ConnectionError: pass
        else: raise AssertionError("65 MB were taken")
        try: data = s.recv(65536)
        except ConnectionError: pass
        assert not data or b" 413 " in data


def test_the_clocks_are_the_hosts():
    made = make_server(Service([Served("m", Puppet())], LIMITS))
    assert issubclass(made.config.http, Connection) and made.config.http.limits is LIMITS


def test_a_client_that_leaves_twice_is_counted_out_once(monkeypatch):
    "Cancelled again while its places are being given back."
    async def slow(self, choice, handle):
        try: await asyncio.sleep(WAIT)
        finally: await asyncio.sleep(0.05)

    async def leave():
        service, sent = Service([Served("m", Puppet())], LIMITS), asyncio.Event()
        async def send(message): sent.set()
        live = Live(service, service.models["m"], completion_request(dict(prompt="virtue", stream=True), tok), "c", {})
        task = asyncio.ensure_future(live.run(send))
        await sent.wait()
        assert service.answers == 1
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError): await task
        return service.answers

    monkeypatch.setattr(Live, "pump", slow)
    assert asyncio.run(leave()) == 0


# Fuzzing, from the description that the server gives of itself

schemathesis = pytest.importorskip("schemathesis", reason="requests are made by schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402


OPERATIONS = [(path, method) for path, methods in openapi("1")["paths"].items() for method in methods]
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
          "unsupported_method", "negative_data_rejection")


@pytest.fixture(scope="module")
def described(live): return schemathesis.openapi.from_url(live.url + "/openapi.json")


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path,method", OPERATIONS)
def test_whatever_the_description_allows_or_forbids(described, path, method, mode):
    operation = described[path][method.upper()]
    if mode == "negative" and method == "get": pytest.skip("there is nothing to get wrong")
    checks = schemathesis.checks.CHECKS.get_by_names(CHECKS)

    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def ask(case):
        answer = case.call(timeout=WAIT)
        assert answer.status_code < 500, answer.text
        case.validate_response(answer, checks=checks)
    ask()


def test_nothing_is_left_behind(live):
    "After all the above, and a few hundred short requests more of which many leave early."
    for i in range(300):
        s = connect(live)
        s.sendall(post(dict(prompt="a", max_tokens=1 + i % 7, stream=i % 2 == 0), "/v1/completions"))
        if i % 3 == 0: reset(s)
        elif i % 3 == 1: until(s, b"HTTP/1.1 200"); s.close()
        else: until(s, b'"length"'); s.close()
    for name in "plato", "zeno":
        assert call(live, "/v1/completions", dict(prompt="a", model=name, max_tokens=1))[0] == 200
        engine = live.find(name).engine
        settled = threading.Event()
        for _ in range(200):
            if engine.stats()["active"] == engine.stats()["queued"] == 0 and not live.busy: break
            settled.wait(.05)
        assert engine.stats()["active"] == engine.stats()["queued"] == 0 and not live.busy
