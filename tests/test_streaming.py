"The OpenAI format against the types and the client of the `openai` package, and requests of every wrong kind."
import importlib
import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from microjulia.generation import Continuation, Event, Generator, SamplingParams, derive_seed, score
from microjulia.gpt import GPT, GPTConfig
from microjulia.streaming import (Answer, APIError, Request, chat_completion, chat_request, completion_request, sse,
                                  stream_chat, stream_completion, text_completion)
from microjulia.tokenizer import CharTokenizer

openai = pytest.importorskip("openai", reason="the types of the API come from the openai package")
from openai.types import Completion, ErrorObject  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402

tok = CharTokenizer()
torch.manual_seed(0)
source = Generator(GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32)), tok)


def chat(content="What is virtue?", **more): return {"messages": [{"role": "user", "content": content}], **more}


def joined(chunks, index=0):
    choices = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def strict(cls, obj):
    "`obj` is of type `cls`, without any conversion, and survives JSON; the API's own null of an echo is put aside."
    obj = json.loads(json.dumps(obj, allow_nan=False))
    for choice in obj["choices"]:
        lp = choice.get("logprobs") or {}
        if lp.get("token_logprobs") and lp["token_logprobs"][0] is None:
            lp["token_logprobs"][0], lp["top_logprobs"][0] = 0.0, {}
    got = cls.model_validate(obj, strict=True)
    extra = [m for m in [got, *got.choices, *(getattr(c, "delta", c) for c in got.choices)] if m.model_extra]
    assert not extra, extra
    return got


# The shape of answers

@pytest.mark.parametrize("n,logprobs,usage,size", [*product([1, 3], [None, 0, 2], [False, True], [1, 4, None])])
def test_chat_objects(n, logprobs, usage, size):
    body = chat(n=n, seed=1, max_tokens=12)
    if logprobs is not None: body |= dict(logprobs=True, top_logprobs=logprobs)
    whole = chat_completion(source, body, id="chatcmpl-x", created=7)
    assert strict(ChatCompletion, whole).usage.total_tokens == 15 + 12 * n
    streamed = body | dict(stream=True) | (dict(stream_options={"include_usage": True}) if usage else {})
    chunks = list(stream_chat(source, streamed, id="chatcmpl-x", created=7, chunk_chars=size))
    for c in chunks: strict(ChatCompletionChunk, c)
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks} == {
        ("chatcmpl-x", 7, "microjulia", "chat.completion.chunk")}
    if usage:
        *chunks, last = chunks
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert all(c["usage"] is None for c in chunks)
    assert all(len(c["choices"]) == 1 for c in chunks)
    assert usage or not any("usage" in c for c in chunks)
    for i in range(n):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert (mine[-1]["delta"], mine[-1]["finish_reason"], mine[-1]["logprobs"]) == ({}, "length", None)
        assert all(set(c["delta"]) == {"content"} and c["delta"]["content"] and c["finish_reason"] is None
                   for c in mine[1:-1])
        sizes = [len(c["delta"]["content"]) for c in mine[1:-1]]
        assert sizes == {1: [1] * 12, 4: [1, 4, 4, 3], None: [1] * 12}[size]  # None: all that is ready
        assert joined(chunks, i) == whole["choices"][i]["message"]["content"]
        if logprobs is None: assert all(c["logprobs"] is None for c in mine)
        else:
            tokens = [t for c in mine[1:-1] for t in c["logprobs"]["content"]]
            assert tokens == whole["choices"][i]["logprobs"]["content"]
            for c in mine[1:-1]: assert "".join(t["token"] for t in c["logprobs"]["content"]) == c["delta"]["content"]
            assert {len(t["top_logprobs"]) for t in tokens} == {logprobs}
            assert all(bytes(t["bytes"]).decode() == t["token"] and t["logprob"] < 0 for t in tokens)


@pytest.mark.parametrize("prompt,n,logprobs,echo", [*product(
    ["virtue", ["virtue", "is"], [1, 2, 3], [[1, 2], [3]]], [1, 2], [None, 0, 3], [False, True])])
def test_text_objects(prompt, n, logprobs, echo):
    body = dict(prompt=prompt, n=n, logprobs=logprobs, echo=echo, seed=3, max_tokens=6)
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    texts = [p if isinstance(p, str) else tok.decode(p) for p in prompts]
    whole = text_completion(source, body, id="cmpl-x", created=7)
    assert strict(Completion, whole).usage.prompt_tokens == sum(map(len, texts))
    assert [c["index"] for c in whole["choices"]] == list(range(len(texts) * n))
    chunks = list(stream_completion(source, body | dict(stream=True), id="cmpl-x", created=7))
    for c in chunks:  # the package has one type for pieces and whole, in which the reason is never null
        strict(Completion, {**c, "choices": [{**x, "finish_reason": x["finish_reason"] or "stop"} for x in c["choices"]]})
    for c in whole["choices"]:
        start = texts[c["index"] // n] if echo else ""
        assert c["text"].startswith(start) and len(c["text"]) == len(start) + 6 and c["finish_reason"] == "length"
        assert joined(chunks, c["index"]) == c["text"]
        lp = c["logprobs"]
        if logprobs is None:
            assert lp is None
            continue
        assert "".join(lp["tokens"]) == c["text"] and lp["text_offset"] == list(range(len(c["text"])))
        first = [None] * bool(echo)
        assert lp["token_logprobs"][:len(first)] == first and all(p < 0 for p in lp["token_logprobs"][len(first):])
        for token, p, top in list(zip(lp["tokens"], lp["token_logprobs"], lp["top_logprobs"], strict=True))[len(first):]:
            assert top[token] == p and logprobs <= len(top) <= logprobs + 1
        pieces = [x["choices"][0]["logprobs"] for x in chunks if x["choices"][0]["index"] == c["index"]][:-1]
        for key in lp: assert [v for p in pieces for v in p[key]] == lp[key]


def test_scoring_a_text_longer_than_the_window():
    text = "the unexamined life is not worth living for a man. " * 3
    whole = text_completion(source, dict(prompt=text, echo=True, logprobs=0, max_tokens=0))
    assert whole["choices"][0]["text"] == text and whole["choices"][0]["finish_reason"] == "length"
    got = whole["choices"][0]["logprobs"]["token_logprobs"][1:]
    np.testing.assert_allclose(got, -score(source.model, tok.encode(text)), atol=1e-5)
    assert whole["usage"] == dict(prompt_tokens=len(text), completion_tokens=0, total_tokens=len(text))


def test_a_cropped_prompt_shows_in_usage():
    body = chat("x" * 100, max_tokens=1)
    assert chat_completion(source, body)["usage"] == dict(prompt_tokens=32, completion_tokens=1, total_tokens=33)
    with pytest.raises(APIError) as e: chat_request(body, tok, max_prompt=32)
    assert (e.value.code, e.value.param, e.value.status) == ("context_length_exceeded", "messages", 400)
    assert "100" in str(e.value) and "32" in str(e.value)


def test_fresh_ids_and_the_clock():
    ids = {chat_completion(source, chat(max_tokens=1))["id"] for _ in range(5)}
    assert len(ids) == 5 and all(i.startswith("chatcmpl-") for i in ids)
    answer = text_completion(source, dict(prompt="a", max_tokens=0))
    assert answer["id"].startswith("cmpl-") and isinstance(answer["created"], int) and answer["created"] > 1.7e9


def test_the_name_of_the_model():
    assert chat_completion(source, chat(max_tokens=1, model="plato"))["model"] == "plato"
    assert chat_request(chat(), tok, model="default").model == "default"
    assert chat_request(chat(model=None), tok).model == "microjulia"


# Seeds and choices

def test_choices_have_seeds_of_their_own():
    one = chat_completion(source, chat(seed=5))["choices"][0]["message"]
    three = chat_completion(source, chat(seed=5, n=3))["choices"]
    assert three[0]["message"] == one
    texts = [c["message"]["content"] for c in three]
    assert len(set(texts)) == 3
    assert texts[2] == source.generate("What is virtue?", seed=derive_seed(5, 2))


def test_an_answer_does_not_depend_on_what_was_asked_beside_it():
    ask = lambda prompt: [c["text"] for c in text_completion(source, dict(prompt=prompt, seed=5, n=2))["choices"]]
    assert ask(["virtue", "is"]) == ask("virtue") + ask("is")


def test_unseeded_choices_differ():
    texts = {c["message"]["content"] for c in chat_completion(source, chat(n=4, temperature=2))["choices"]}
    assert len(texts) == 4


# Stop strings

class Reciter:
    "A source that is certain of a text, and counts."
    tokenizer, block_size = tok, 64
    def __init__(self, text): self.text, self.steps, self.closed = text, 0, False
    def stream(self, ids, params):
        self.events = self.run(ids, params)  # as an engine would, which keeps what it runs
        return self.events
    def run(self, ids, params):
        run = Continuation(ids, params, tok)
        try:
            for id in tok.encode(self.text):
                self.steps += 1
                yield run.step(np.where(np.arange(28) == id, 30.0, 0.0))
                if run.finish_reason: break
            run.finish_reason = run.finish_reason or "length"
            yield run.end()
        finally: self.closed = True


@pytest.mark.parametrize("size", [1, 2, 5, None])
@pytest.mark.parametrize("stop,shown,reason", [
    ("the end", "in the beginning and at ", "stop"), (["zebra", "ning"], "in the begin", "stop"),
    (["of all"], "in the beginning and at the end of a", "length"), ([], "in the beginning and at the end of a", "length")])
def test_no_stop_string_leaks(stop, shown, reason, size):
    body = chat(stop=stop, temperature=0, logprobs=True)
    reciter = Reciter("in the beginning and at the end of a")
    chunks = list(stream_chat(reciter, body | dict(stream=True), chunk_chars=size))
    assert joined(chunks) == shown and chunks[-1]["choices"][0]["finish_reason"] == reason
    tokens = [t["token"] for c in chunks for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert "".join(tokens) == shown
    whole = chat_completion(Reciter(reciter.text), body)
    assert whole["choices"][0]["message"]["content"] == shown
    assert whole["usage"]["completion_tokens"] == reciter.steps
    if size == 1: assert {len(c["choices"][0]["delta"].get("content", "")) for c in chunks} <= {0, 1}


def test_a_character_leaves_when_it_is_made_and_a_reader_who_leaves_ends_the_work():
    reciter = Reciter("abcdef")
    chunks = stream_chat(reciter, chat(temperature=0))
    assert reciter.steps == 0
    next(chunks)
    assert reciter.steps == 0  # the role needs no model
    for i, c in enumerate("abc", 1):
        assert next(chunks)["choices"][0]["delta"]["content"] == c and reciter.steps == i
    chunks.close()
    assert reciter.closed and reciter.steps == 3


def test_the_first_character_leaves_alone_and_at_once():
    reciter = Reciter("abcdefg")
    chunks = stream_chat(reciter, chat(temperature=0), chunk_chars=3)
    next(chunks)
    for text, steps in ("a", 1), ("bcd", 4), ("efg", 7):
        assert next(chunks)["choices"][0]["delta"]["content"] == text and reciter.steps == steps


def test_text_that_waits_is_one_chunk():
    answer = Answer(chat_request(chat(temperature=0), tok), Reciter("abcdef"))
    choice, = answer.choices
    events = list(answer.source.stream(choice.ids, choice.params))
    for e in events: choice.push(e)
    deltas = [c["choices"][0]["delta"] for c in answer.chunks(choice)]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "bcdef"}, {}]


def test_minus_infinity_is_not_json():
    class Sure(Reciter):
        def stream(self, ids, params):
            yield Event("a", 2, -math.inf, (("a", 2, 0.0), ("b", 3, -math.inf)))
            yield Event("", finish_reason="stop")
    whole = chat_completion(Sure(""), chat(logprobs=True, top_logprobs=2))
    strict(ChatCompletion, whole)
    assert whole["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


# Requests

RANGES = [("temperature", [0, 0.5, 2], [-0.1, 2.1, "1", True, math.nan, math.inf]),
          ("top_p", [0, 0.5, 1], [-0.1, 1.1, []]),
          ("presence_penalty", [-2, 2], [-2.1, 2.1]), ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
          ("n", [1, 128], [0, 129, 1.0, "1", True]), ("seed", [-2**63, 0, 2**63 - 1], [2**63, -2**63 - 1, 1.5, "x"]),
          ("max_tokens", [1, 10**6], [0, -1, 2.5, "9", False]), ("max_completion_tokens", [1, 10**6], [0, -1, {}]),
          ("top_k", [-1, 0, 1, 10**9], [-2, 0.5]), ("min_p", [0, 1], [-0.1, 1.1]),
          ("repetition_penalty", [0.01, 1.2, 100], [0, -1, 101]), ("min_tokens", [0, 5], [-1, 0.5]),
          ("stop", ["x", [], ["a", "b", "c", "d"], "\n"], ["", [""], list("abcde"), 3, [1], {}, "x" * 1001]),
          ("stream", [True, False], [1, "true"]), ("logprobs", [True, False], [1, "x"]), ("until", ["sentence"], ["x", 1, [], {}]),
          ("logit_bias", [{}, {"a": 100, "0": -100, " ": 0.5}], [[], {"28": 1}, {"-1": 1}, {"": 1}, {"A": 1}, {"ab": 1},
                                                                {"a": "1"}, {"a": 101}, {"9" * 5000: 1}, {"a": True}]),
          ("model", ["x"], [1, []]), ("response_format", [{"type": "text"}], [{"type": "json_object"}, "text"]),
          ("tool_choice", ["auto", "none"], ["required", {"type": "function"}]), ("best_of", [1], [2, 0]),
          ("chunk_chars", [1, 10**6], [0, 1.5, "1", True]), ("modalities", [["text"]], [["text", "audio"]]), ("stream_options", [], [{}, {"include_usage": True}, 3])]


@pytest.mark.parametrize("name,value", [(name, v) for name, good, _ in RANGES for v in [*good, None]])
def test_good_values(name, value): assert isinstance(chat_request(chat(**{name: value}), tok), Request)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name,value", [(name, v) for name, _, bad in RANGES for v in bad])
def test_bad_values(name, value):
    with pytest.raises(APIError) as e: chat_request(chat(**{name: value}), tok)
    assert (e.value.param, e.value.status) == (name, 400)
    assert name in e.value.message and len(e.value.message) < 300
    ErrorObject.model_validate(e.value.body()["error"], strict=True)
    assert set(e.value.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("more,ok", [
    (dict(logprobs=True, top_logprobs=20), True), (dict(logprobs=True, top_logprobs=21), False),
    (dict(top_logprobs=0), False), (dict(stream=True, stream_options={"include_usage": True}), True),
    (dict(stream=True, stream_options={"include_usage": "yes"}), False), (dict(stream=True, stream_options={}), True),
    (dict(n=2, best_of=2), True), (dict(n=2, best_of=1), False)])
def test_values_that_depend_on_others(more, ok):
    if ok: chat_request(chat(**more), tok)
    else:
        with pytest.raises(APIError): chat_request(chat(**more), tok)


@pytest.mark.parametrize("more,expected", [
    ({}, 200), (dict(max_tokens=5), 5), (dict(max_completion_tokens=6), 6),
    (dict(max_tokens=5, max_completion_tokens=6), 6), (dict(max_tokens=5, max_completion_tokens=None), 5)])
def test_the_number_of_tokens(more, expected): assert chat_request(chat(**more), tok).params.max_new_tokens == expected


def test_the_defaults_can_be_the_hosts():
    mine = SamplingParams(temperature=1, top_k=0, max_new_tokens=7, stop=("x",), until="sentence")
    assert chat_request(chat(), tok, defaults=mine).params == mine
    p = chat_request(chat(temperature=0.5, stop="y", max_tokens=9), tok, defaults=mine).params
    assert (p.temperature, p.top_k, p.stop, p.max_new_tokens, p.until) == (0.5, 0, ("y",), 9, "sentence")
    assert completion_request(dict(prompt="a"), tok, defaults=mine).params.max_new_tokens == 16


def test_unknown_fields_are_ignored():
    request = chat_request(chat(user="u", metadata={"a": 1}, store=True, tools=[{"type": "function"}], whatever=[1]), tok)
    assert request.params == SamplingParams()


@pytest.mark.parametrize("messages,prompt", [
    ([("system", "be wise"), ("user", "A"), ("assistant", "b"), ("user", "C"), ("assistant", "d")], "c"),
    ([("system", "Only this")], "only this"), ([("developer", "x"), ("assistant", "y")], "y"),
    ([("user", [{"type": "text", "text": "A"}, {"type": "text", "text": "b"}])], "a b")])
def test_the_prompt_is_the_last_message_of_the_user(messages, prompt):
    body = dict(messages=[dict(role=r, content=c) for r, c in messages])
    assert tok.decode(chat_request(body, tok).prompts[0]) == prompt


def test_a_template_sees_all_messages():
    body = dict(messages=[dict(role="user", content="A"), dict(role="assistant", content=None), dict(role="user", content="b")])
    template = lambda messages: " ".join(f"{m['role']} {m['content']}." for m in messages)
    assert tok.decode(chat_request(body, tok, template=template).prompts[0]) == "user a. assistant . user b."


@pytest.mark.parametrize("messages", [
    None, [], {}, "hi", [1], [None], [{}], [{"content": "x"}], [{"role": 1, "content": "x"}], [{"role": ["user"]}],
    [{"role": "user", "content": 1}], [{"role": "user", "content": [1]}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], [{"role": "user", "content": None}],
    [{"role": "user", "content": ""}], [{"role": "user", "content": []}], [{"role": "user", "content": "\u200b"}]])
def test_bad_messages(messages):
    with pytest.raises(APIError) as e: chat_request(dict(messages=messages), tok)
    assert e.value.param == "messages"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_prompt_of_another_script_is_an_error():
    with pytest.raises(APIError, match="nothing is left"): chat_request(chat("\u6f22\u5b57"), tok)
    with pytest.raises(APIError, match="nothing is left"): completion_request(dict(prompt=["a", "\u6f22"]), tok)


@pytest.mark.parametrize("call", [stream_chat, chat_completion, stream_completion, text_completion])
def test_a_wrong_request_is_an_error_at_the_call(call):
    with pytest.raises(APIError): call(source, {})
    with pytest.raises(APIError): call(source, chat("a", temperature=9) | dict(prompt="a"))


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                           lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=6)
names = [name for name, _, _ in RANGES] + ["top_logprobs", "messages", "prompt", "echo", "suffix"]


@given(st.dictionaries(st.sampled_from(names), json_values), st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_json_is_a_request_or_an_error(body, whole):
    for make, base in (chat_request, chat()), (completion_request, dict(prompt="a")):
        try: assert isinstance(make({**base, **body} if whole else body, tok), Request)
        except APIError as e:
            assert e.status == 400 and isinstance(e.message, str) and len(e.message) < 400
            json.dumps(e.body())


@pytest.mark.parametrize("body", [None, [], "x", 1])
@pytest.mark.parametrize("make", [chat_request, completion_request])
def test_a_body_that_is_no_object(body, make):
    with pytest.raises(APIError, match="JSON object"): make(body, tok)


# The wire, with the real client

def test_server_sent_events():
    lines = list(sse([{"a": "\u00e9\n\n"}, {"b": 1}]))
    assert lines == ['data: {"a":"\\u00e9\\n\\n"}\n\n', 'data: {"b":1}\n\n', "data: [DONE]\n\n"]
    with pytest.raises(ValueError): list(sse([{"a": math.nan}]))


@pytest.fixture
def client():
    "The official client, whose requests end in a function instead of a network."
    base = importlib.import_module("openai._base_client")
    http = getattr(base, "httpx2", None) or getattr(base, "httpx", None)
    if http is None: pytest.skip("this openai package speaks HTTP by other means")
    def handle(request):
        body = json.loads(request.content)
        is_chat = request.url.path.endswith("/chat/completions")
        stream, whole = (stream_chat, chat_completion) if is_chat else (stream_completion, text_completion)
        try:
            if not body.get("stream"): return http.Response(200, json=whole(source, body))
            return http.Response(200, content="".join(sse(stream(source, body))), headers={"content-type": "text/event-stream"})
        except APIError as e: return http.Response(e.status, json=e.body())
    with openai.OpenAI(api_key="none", base_url="http://none/v1", max_retries=0,
                       http_client=http.Client(transport=http.MockTransport(handle))) as client: yield client


def test_the_client_streams(client):
    ask = dict(model="microjulia", messages=[{"role": "user", "content": "What is virtue?"}], seed=3, max_tokens=20)
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert len(whole.choices[0].message.content) == 20 and chunks[-1].usage == whole.usage
    text = client.completions.create(model="microjulia", prompt="virtue", seed=3, extra_body={"top_k": 1})
    assert text.choices[0].text == source.generate("virtue", top_k=1, max_new_tokens=16)
    pieces = client.completions.create(model="microjulia", prompt="virtue", stream=True, extra_body={"top_k": 1})
    assert "".join(p.choices[0].text for p in pieces) == text.choices[0].text


def test_the_client_understands_errors(client):
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], temperature=9)
    assert (e.value.param, e.value.code, e.value.type) == ("temperature", None, "invalid_request_error")
    assert "from 0 to 2" in e.value.message
