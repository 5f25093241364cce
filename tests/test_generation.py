"Sampling against a slow reference, stop strings cut anywhere, seeds across processes, windows of any size."
import math
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from microjulia.checkpoint import load_checkpoint, save_checkpoint
from microjulia.corpus import uniform
from microjulia.generation import (Continuation, Event, Generator, Sampler, SamplingParams, StopMatcher, announced,
                                   derive_seed, draw, encode_prompt, evaluating, keep_top_k, keep_top_p, log_probs, predictions,
                                   probabilities, score, score_summary)
from microjulia.gpt import GPT, GPTConfig
from microjulia.tokenizer import CharTokenizer

tok = CharTokenizer()
V = tok.vocab_size


def small(block_size=16, seed=0, **changes):
    "A model with weights large enough to have opinions."
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": block_size, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2 * torch.randn_like(p))
    return model


def text_of(events): return "".join(e.text for e in events)


# Choosing

def slow_probabilities(logits, p, counts, seen):
    "The definition, one token at a time, in plain Python."
    x = [float(v) for v in logits]
    for id, bias in (p.logit_bias or {}).items(): x[id] += bias
    for i in range(len(x)):
        if seen[i]: x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
        if counts[i]: x[i] -= p.presence_penalty + counts[i] * p.frequency_penalty
    if p.temperature == 0:
        best = max(range(len(x)), key=lambda i: (x[i], -i))
        return [float(i == best) for i in range(len(x))]
    x = [v / p.temperature for v in x]
    if 0 < p.top_k < len(x):
        limit = sorted(x)[-p.top_k]
        x = [v if v >= limit else -math.inf for v in x]
    e = [math.exp(v - max(x)) for v in x]
    q = [v / sum(e) for v in e]
    if p.top_p < 1:
        kept, mass = set(), 0.0
        for i in sorted(range(len(q)), key=lambda i: (-q[i], i)):
            kept.add(i)
            mass += q[i]
            if mass >= p.top_p: break
        q = [v if i in kept else 0.0 for i, v in enumerate(q)]
        q = [v / sum(q) for v in q]
    q = [v if v >= p.min_p * max(q) else 0.0 for v in q]
    return [v / sum(q) for v in q]


settings_of = st.builds(
    SamplingParams, temperature=st.sampled_from([0, 0.3, 0.8, 1, 1.7]), top_k=st.sampled_from([0, 1, 2, 5, 40]),
    top_p=st.sampled_from([0.0, 0.31, 0.77, 1.0]), min_p=st.sampled_from([0.0, 0.07, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]), presence_penalty=st.sampled_from([0.0, 1.1, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.3]), logit_bias=st.sampled_from([None, {0: -100, 3: 2.5}]))


@given(settings_of, st.integers(0, 10_000))
@settings(max_examples=300, deadline=None)
def test_every_setting_agrees_with_the_definition(params, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 9).astype(np.float32)
    counts = rng.integers(0, 3, 9)
    seen = (counts > 0) | (rng.random(9) < 0.3)
    np.testing.assert_allclose(probabilities(logits, params, counts, seen),
                               slow_probabilities(logits, params, counts, seen), atol=1e-12)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), min_size=1, max_size=12).filter(sum),
       st.floats(0, 1, exclude_max=True))
def test_what_has_no_probability_is_never_drawn(weights, u):
    probs = np.array(weights) / sum(weights)
    assert probs[draw(probs, u)] > 0
    assert probs[draw(probs, np.nextafter(1, 0))] > 0


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_ties_at_the_threshold_are_kept(k):
    scores = np.array([1.0, 3.0, 1.0, 2.0, 1.0])
    assert keep_top_k(scores, k).sum() == {1: 1, 2: 2}.get(k, 5)


def test_equal_probabilities_leave_top_p_in_id_order():
    assert keep_top_p(np.full(10, 0.1), 0.25).nonzero()[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("p,kept", [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (1, 3)])
def test_top_p_stops_where_it_is_reached(p, kept): assert keep_top_p(np.array([0.25, 0.5, 0.25]), p).sum() == kept


@pytest.mark.parametrize("temperature", [1e-308, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy_without_a_warning(temperature, recwarn):
    logits = np.array([1.0, 5.0, 4.999, -300.0])
    assert probabilities(logits, SamplingParams(temperature=temperature)).tolist()[1] > 0.7
    assert not recwarn.list


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_broken_model_is_an_error(logits, temperature):
    with pytest.raises(ValueError, match="not finite"): probabilities(logits, SamplingParams(temperature=temperature))


def test_a_forbidden_token_of_the_model_is_never_taken():
    p = probabilities([-np.inf, 0.0, 0.0], SamplingParams())
    assert p.tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize("bad", [
    dict(temperature=-0.1), dict(temperature=math.inf), dict(temperature=math.nan), dict(top_k=-1), dict(top_p=-0.1),
    dict(top_p=1.1), dict(min_p=2), dict(repetition_penalty=0), dict(repetition_penalty=-1),
    dict(presence_penalty=math.nan), dict(frequency_penalty=math.inf), dict(max_new_tokens=-1),
    dict(min_new_tokens=-1), dict(stop=("",)), dict(stop=(1,)), dict(until="noon")])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): SamplingParams(**bad)


# Seeds

def test_a_choice_is_a_function_of_seed_and_position():
    logits = np.random.default_rng(0).normal(size=V)
    sampler = Sampler(SamplingParams(seed=9), V)
    ids = [sampler(logits) for _ in range(40)]
    p = probabilities(logits, SamplingParams())
    assert ids == [draw(p, uniform(9, i)) for i in range(40)]
    assert sampler.counts.tolist() == np.bincount(ids, minlength=V).tolist()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -2**63])
def test_any_seed_of_64_bits(seed):
    gen = Generator(small(), tok)
    a, b = (gen.generate("virtue", seed=seed, max_new_tokens=12) for _ in range(2))
    assert a == b
    assert derive_seed(seed, 0) == seed
    assert 0 <= derive_seed(seed, 1) < 2**63


def test_without_a_seed_one_is_drawn_once_for_each_request(monkeypatch):
    import microjulia.generation as g
    drawn = iter([3, 4])
    monkeypatch.setattr(g, "secrets", SimpleNamespace(randbits=lambda n: next(drawn)))
    gen = Generator(small(), tok)
    for seed in 3, 4: assert gen.generate("virtue") == gen.generate("virtue", seed=seed)
    with pytest.raises(StopIteration): next(drawn)


def test_unseeded_texts_differ():
    gen = Generator(small(), tok)
    assert gen.generate("virtue", temperature=1.5) != gen.generate("virtue", temperature=1.5)


def test_nobody_elses_random_numbers_are_touched():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    Generator(MODEL, tok).generate("virtue")
    assert (torch.rand(1), np.random.rand()) == expected


MODEL = small()
PARAMS = SamplingParams(seed=11, max_new_tokens=60)

CHILD = """
import sys
import torch
from microjulia.checkpoint import load_checkpoint
from microjulia.generation import Generator, SamplingParams
c = load_checkpoint(sys.argv[1])
print(Generator(c.model, c.tokenizer).generate("what is virtue", SamplingParams(seed=11, max_new_tokens=60)), end="")
"""


def test_the_same_text_streamed_saved_loaded_and_in_another_process(tmp_path):
    gen = Generator(MODEL, tok)
    text = gen.generate("what is virtue", PARAMS)
    assert len(text) == 60
    assert text_of(gen.stream(encode_prompt(tok, "what is virtue"), PARAMS)) == text
    path = save_checkpoint(tmp_path / "m", MODEL, tok)
    c = load_checkpoint(path)
    assert Generator(c.model, c.tokenizer).generate("what is virtue", PARAMS) == text
    env = {**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, env=env, timeout=300)
    assert run.stdout == text, run.stderr


def test_streams_that_take_turns_do_not_disturb_each_other():
    gen, prompts = Generator(MODEL, tok), ["what is virtue", "a", "on the shortness of life and death"]
    alone = [list(gen.stream(encode_prompt(tok, p), PARAMS)) for p in prompts]
    streams = [gen.stream(encode_prompt(tok, p), PARAMS) for p in prompts]
    together = [list(events) for events in zip(*zip(*streams, strict=True), strict=True)]
    assert together == alone


def test_streams_in_threads_do_not_disturb_each_other():
    gen, texts = Generator(MODEL, tok), {}
    alone = [gen.generate("virtue", PARAMS, seed=i) for i in range(4)]
    run = lambda i: texts.update({i: gen.generate("virtue", PARAMS, seed=i)})
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [texts[i] for i in range(4)] == alone


# Where a text ends

letters = st.text("ab.", max_size=14)
stops = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3)


@given(letters, stops, st.lists(st.integers(1, 4), min_size=14, max_size=14))
@settings(max_examples=400)
def test_stop_strings_wherever_the_text_is_cut(text, stop, sizes):
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[:min(ends)[1]] if ends else text
    matcher, shown, at, done = StopMatcher(stop), "", 0, False
    for size in sizes:
        if at >= len(text) or done: break
        piece, done = matcher.push(text[at:at + size])
        at, shown = min(at + size, len(text)), shown + piece
        assert expected.startswith(shown)                                      # nothing leaks
        if not done:
            assert shown + matcher.held == text[:at]                           # nothing is lost
            rest = [n for n in range(1, at + 1) if any(s.startswith(text[:at][-n:]) for s in stop)]
            assert len(matcher.held) == max(rest, default=0)                   # no more is held than must be
    assert done == bool(ends)
    assert shown + matcher.flush() == expected


def spell(text, tokenizer=tok, ids=None, **changes):
    "The events of a model that is certain of `text`."
    run = Continuation([0], SamplingParams(temperature=0, **changes), tokenizer)
    events = []
    for id in tokenizer.encode(text) if ids is None else ids:
        events.append(run.step(np.eye(tokenizer.vocab_size)[id]))
        if run.finish_reason: break
    return events + [run.end()]


@pytest.mark.parametrize("text,changes,shown,reason", [
    ("ab.c", dict(stop=(".",)), "ab", "stop"),
    ("ab.c", dict(stop=("x", "b.c")), "a", "stop"),
    ("aab", dict(stop=("ab",)), "a", "stop"),
    ("abc", dict(stop=("cd",), max_new_tokens=3), "abc", "length"),
    ("ab. cd.", dict(until="sentence"), "ab.", "stop"),
    ("ab. cd.", dict(until="sentence", min_new_tokens=3), "ab.", "stop"),
    ("ab. cd.", dict(until="sentence", min_new_tokens=4), "ab. cd.", "stop"),
    ("ab. cd.", dict(until="sentence", max_new_tokens=2), "ab", "length"),
    ("ab. cd.", dict(until="sentence", stop=(". c",)), "ab.", "stop"),
    ("ab. cd.", dict(until="sentence", stop=("b.",)), "a", "stop"),
    (".", dict(until="sentence"), ".", "stop")])
def test_endings(text, changes, shown, reason):
    events = spell(text, **changes)
    assert (text_of(events), events[-1].finish_reason) == (shown, reason)
    assert events[-1].id is None and all(e.finish_reason is None and e.id is not None for e in events[:-1])


def test_a_stop_string_may_hold_text_over_many_events():
    events = spell("the end of the ending", stop=("the ending",))
    assert [e.text for e in events[:9]] == [""] * 7 + ["the end "] + ["o"]
    assert text_of(events) == "the end of "


class Bytes:
    "A tokenizer of single UTF-8 bytes."
    vocab_size = 256
    def encode(self, text): return np.frombuffer(text.encode(), np.uint8)
    def decode(self, ids): return bytes(int(i) for i in ids).decode("utf-8", "replace")


def test_letters_of_several_tokens_come_whole():
    events = spell("né€", Bytes(), max_new_tokens=6)
    assert [e.text for e in events] == ["n", "", "é", "", "", "€", ""]
    assert text_of(spell("né€", Bytes(), max_new_tokens=5)) == "né\ufffd"        # cut inside a letter
    broken = spell("", Bytes(), ids=[0xFF] * 9 + [65], max_new_tokens=10)         # never a letter: not held for ever
    assert text_of(broken).endswith("A") and [e.text for e in broken[:4]] == ["", "", "", "\ufffd" * 4]


# The generator

def test_log_probabilities_are_those_of_the_raw_scores():
    ids = tok.encode("what is")
    params = SamplingParams(seed=1, temperature=0.3, top_k=3, repetition_penalty=2, max_new_tokens=8, logprobs=4)
    events = list(Generator(MODEL, tok).stream(ids, params))[:-1]
    whole = np.concatenate([ids, [e.id for e in events]])
    with torch.no_grad(): logits = MODEL(torch.tensor(whole[None].astype(int)))[0].numpy()
    for e, row in zip(events, logits[len(ids) - 1:-1], strict=True):
        logp = log_probs(row)
        assert e.logprob == pytest.approx(logp[e.id], abs=1e-4)
        assert [i for _, i, _ in e.alternatives] == np.argsort(-logp)[:4].tolist()
        assert all(t == tok.decode([i]) and p == pytest.approx(logp[i], abs=1e-4) for t, i, p in e.alternatives)


@pytest.mark.parametrize("slide", ["anchor", "exact"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
def test_prompts_of_any_length_in_windows_of_any_size(block_size, length, slide):
    model, ids = small(block_size), np.arange(length) % V
    params = SamplingParams(seed=1, max_new_tokens=25)
    events = list(Generator(model, tok, slide).stream(ids, params))
    assert len(events) == 26
    context = ids[-block_size:].tolist()
    sampler = Sampler(params, V, context)
    for e in events[:-1]:  # the same by whole windows, without a cache
        with torch.no_grad(): assert sampler(model(torch.tensor([context]))[0, -1].numpy()) == e.id
        context.append(e.id)
        if len(context) > block_size: context = context[-(block_size if slide == "exact" else max(1, block_size // 2)):]


class Spy(nn.Module):
    "Keeps the shape of all that the model is given."
    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.new_cache, self.seen = model, model.config, model.new_cache, []
    def forward(self, ids, cache=None):
        self.seen.append(ids.shape[1])
        return self.model(ids, cache)


def test_what_the_model_reads():
    spy = Spy(small(16))
    Generator(spy, tok).generate("abcde", max_new_tokens=40, seed=1)
    # the prompt once, then one at a time until 16 are in; then half of them once, and so on
    assert spy.seen == ([5] + [1] * 11 + ([8] + [1] * 8) * 4)[:40]
    spy.seen.clear()
    Generator(spy, tok).generate("abcde", max_new_tokens=0)
    assert spy.seen == []
    events = Generator(spy, tok).stream([1, 2, 3], SamplingParams(max_new_tokens=5))
    next(events)
    assert spy.seen == [3]  # the first character does not wait for the second


def test_the_reader_of_events_is_not_in_inference_mode():
    for _ in Generator(MODEL, tok).stream([1, 2], SamplingParams(max_new_tokens=20)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_a_model_in_training_goes_on_training():
    model = small(dropout=0.5).train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    text = Generator(model, tok).generate("virtue", PARAMS)
    assert text == Generator(small(dropout=0.5), tok).generate("virtue", PARAMS)  # without dropout
    events = Generator(model, tok).stream([1], PARAMS)
    next(events)
    assert [m.training for m in model.modules()] == modes  # between two events as well
    events.close()
    score(model, [1, 2, 3])
    with pytest.raises(RuntimeError), evaluating(model): raise RuntimeError
    assert [m.training for m in model.modules()] == modes
    loss = model(torch.tensor([[1, 2]])).sum()
    loss.backward()


class Bigram(nn.Module):
    "The least that keeps the contract."
    def __init__(self):
        super().__init__()
        self.table, self.config = nn.Parameter(torch.randn(V, V)), SimpleNamespace(block_size=4)
    def new_cache(self, batch_size=1): return None
    def forward(self, ids, cache=None): return self.table[ids]


def test_any_model_that_keeps_the_contract():
    torch.manual_seed(0)
    model = Bigram()
    texts = {Generator(model, tok, slide).generate("virtue", PARAMS) for slide in ("anchor", "exact")}
    assert len(texts) == 1
    ids = tok.encode("know thyself")
    expected = -model.table.log_softmax(-1)[ids[:-1].astype(int), ids[1:].astype(int)].detach().numpy()
    np.testing.assert_allclose(score(model, ids), expected, atol=1e-6)


def test_scores_past_the_alphabet_are_never_chosen():
    class Padded(Bigram):
        def forward(self, ids, cache=None):
            return nn.functional.pad(super().forward(ids), (0, 4), value=50.0)  # 4 tokens nobody can spell
    assert len(Generator(Padded(), tok).generate("virtue", max_new_tokens=30)) == 30


@pytest.mark.parametrize("ids", [[], [[1, 2]], [-1], [V]])
def test_bad_prompts_are_errors_at_the_call(ids):
    with pytest.raises(ValueError, match="prompt"): Generator(MODEL, tok).stream(ids)


@pytest.mark.parametrize("prompt", ["", "\u6f22\u5b57", "\u200b"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_prompt_of_which_nothing_is_left(prompt):
    with pytest.raises(ValueError, match="nothing is left of the prompt"): Generator(MODEL, tok).generate(prompt)


def test_a_space_is_a_prompt(): assert len(Generator(MODEL, tok).generate("\n", max_new_tokens=3)) == 3


def test_an_unknown_id_in_the_bias_is_an_error_at_the_call():
    with pytest.raises(ValueError, match="logit_bias"):
        Generator(MODEL, tok).stream([1], SamplingParams(logit_bias={-1: 3}))


def test_bias_and_penalties_reach_the_text():
    gen, e = Generator(MODEL, tok), tok.chars.index("e")
    assert gen.generate("virtue", max_new_tokens=9, logit_bias={e: 100}) == "e" * 9
    assert "e" not in gen.generate("virtue", max_new_tokens=99, logit_bias={e: -100}, top_k=0)
    once = gen.generate("virtue", max_new_tokens=28, presence_penalty=1000, temperature=0)
    assert len(set(once)) == 28  # every character once


def test_the_last_event(): assert list(Generator(MODEL, tok).stream([1], SamplingParams(max_new_tokens=0))) == [
    Event("", None, None, (), "length")]


# Scoring

def slow_score(model, ids):
    "One character at a time, each from the context that the rule of the windows gives it."
    T, nats = model.config.block_size, []
    half = max(1, T // 2)
    for t in range(1, len(ids)):
        start = 0 if t <= T else math.ceil((t - T) / half) * half
        assert t - start >= min(t, T / 2)
        with torch.no_grad(): logp = model(torch.tensor([list(map(int, ids[start:t]))]))[0, -1].log_softmax(-1)
        nats.append(-logp[int(ids[t])].item())
    return nats


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 9, 10, 12, 13, 40])
def test_scores_agree_with_one_character_at_a_time(block_size, n):
    model, ids = small(block_size), np.random.default_rng(n).integers(0, V, n)
    for batch_size in (1, 3, 32): np.testing.assert_allclose(score(model, ids, batch_size), slow_score(model, ids), atol=1e-4)


def test_scores_of_any_kind_of_array(tmp_path):
    ids = np.random.default_rng(0).integers(0, V, 100).astype(np.uint8)
    ids.tofile(tmp_path / "ids")
    expected = score(MODEL, ids)
    for same in ids.tolist(), ids.astype(np.int64), np.memmap(tmp_path / "ids", np.uint8), tuple(ids):
        np.testing.assert_array_equal(score(MODEL, same), expected)
    assert expected.dtype == np.float64 and expected.shape == (99,)


def test_a_text_is_as_surprising_to_read_as_it_was_to_write():
    gen, ids = Generator(MODEL, tok), tok.encode("what")
    events = list(gen.stream(ids, SamplingParams(seed=1, max_new_tokens=10, temperature=1)))[:-1]
    whole = np.concatenate([ids, [e.id for e in events]])
    np.testing.assert_allclose(score(MODEL, whole)[len(ids) - 1:], [-e.logprob for e in events], atol=1e-4)


def test_prompt_events_are_the_scores():
    ids = np.random.default_rng(0).integers(0, V, 50)
    events = list(Generator(MODEL, tok).prompt_events(ids, 2))
    np.testing.assert_allclose([-e.logprob for e in events[1:]], score(MODEL, ids), atol=1e-5)
    assert [e.id for e in events] == ids.tolist() and text_of(events) == tok.decode(ids)
    assert events[0].logprob is None and {len(e.alternatives) for e in events[1:]} == {2}
    assert [e.id for e in Generator(MODEL, tok).prompt_events([5])] == [5]


def test_predictions_cover_the_text_once():
    for n in range(1, 60): assert sum(len(p) for p in predictions(MODEL, np.zeros(n, int))) == n - 1


def test_summary():
    got = score_summary(np.full(10, math.log(2)))
    assert got == dict(characters=10, nats_per_char=pytest.approx(math.log(2)), bits_per_char=pytest.approx(1))
    assert score_summary(np.full(10, math.log(2)), 20)["bits_per_char"] == pytest.approx(0.5)


def test_too_short_to_score():
    with pytest.raises(ValueError, match="two tokens"): score(MODEL, [1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_step_on_a_gpu_is_one_graph():
    from microjulia.generation import GraphStep, TorchWriter
    model = small().cuda()
    ids, slow = list(range(12)), TorchWriter(model, V)
    assert isinstance(slow.step, GraphStep)
    expected = model(torch.tensor([ids]).cuda())[0].float().detach().cpu().numpy()
    for _ in range(2):
        slow.read(ids[:5], 0)
        found = [slow.read([id], 5 + i) for i, id in enumerate(ids[5:])]
        assert np.abs(np.stack(found) - expected[5:]).max() < 1e-4
    params = SamplingParams(seed=1, max_new_tokens=40)
    assert Generator(model, tok).generate("virtue", params) == Generator(model.cpu(), tok, fast=False).generate("virtue", params)


def test_what_takes_long_is_announced(capsys):
    with announced('compiling', after=0) as timer: timer.join(60)
    with announced('not this', after=60): pass
    assert capsys.readouterr().err == 'compiling\n'
