"The compiled step against PyTorch: shapes, formats, company, and what it refuses."
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from microjulia import generation
from microjulia.generation import Generator, Sampler, SamplingParams, sample
from microjulia.gpt import GPT, GPTConfig, capture
from microjulia.serving import kernel
from microjulia.serving.kernel import DTYPES, FastDecoder, choice_of, choose, supports
from microjulia.tokenizer import CharTokenizer

TOK = CharTokenizer()


def small(seed=0, **changes):
    "A model with weights large enough to have opinions."
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
    return model


@torch.no_grad()
def torch_logits(model, ids): return model(torch.as_tensor(ids)).numpy()


def prompt(decoder, ids, slot=0): return decoder.step(ids, np.full(len(ids), slot), np.arange(len(ids)))


@pytest.mark.parametrize("changes", [
    dict(), dict(bias=True), dict(n_embd=6, n_head=3, block_size=5), dict(n_embd=72, n_head=1, n_layer=1), dict(n_embd=80, n_head=5),
    dict(vocab_size=254, block_size=130, bias=True), dict(init="flux", norm_eps=1e-10), dict(vocab_size=2)])
def test_logits_are_those_of_pytorch(changes):
    model = small(**changes)
    c = model.config
    ids = np.random.default_rng(0).integers(0, c.vocab_size, c.block_size)
    expected = torch_logits(model, ids[None])[0]
    assert np.abs(prompt(FastDecoder(model, rows=7), ids) - expected).max() < 1e-4


def test_a_tied_head():
    model = small()
    model.lm_head.weight = model.wte.weight
    ids = np.arange(16)
    assert np.abs(prompt(FastDecoder(model), ids) - torch_logits(model, ids[None])[0]).max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_company_changes_nothing(dtype):
    "Texts that join, leave and reuse slots in random steps, against each alone; to the bit."
    model, rng = small(bias=True), np.random.default_rng(1)
    texts = rng.integers(0, 28, (12, 16))
    alone = [prompt(FastDecoder(model, dtype=dtype), ids) for ids in texts]
    together, waiting, running = FastDecoder(model, 5, dtype, rows=8), list(range(12)), {}
    while waiting or running:
        while waiting and len(running) < 5 and rng.random() < .6:
            running[next(s for s in range(5) if s not in running)] = [waiting.pop(), 0]
        rows = [(slot, text, at + i) for slot, (text, at) in running.items()
                for i in range(min(16 - at, int(rng.integers(0, 5))))]
        if not rows: continue
        got = together.step([texts[t][i] for _, t, i in rows], [s for s, _, _ in rows], [i for _, _, i in rows])
        for (slot, text, i), logits in zip(rows, got):
            assert np.array_equal(logits, alone[text][i])
            running[slot][1] = i + 1
        running = {s: r for s, r in running.items() if r[1] < 16}


@pytest.mark.parametrize("ids, slots, positions", [
    ([-1], [0], [0]), ([28], [0], [0]), ([0], [2], [0]), ([0], [-1], [0]), ([0], [0], [16]), ([0], [0], [-1])])
def test_nothing_outside_is_touched(ids, slots, positions):
    with pytest.raises(ValueError, match="at least 0 and below 28, 2 and 16"): FastDecoder(small(), 2).step(ids, slots, positions)


def test_odd_steps():
    decoder = FastDecoder(small())
    assert decoder.step([], [], []).shape == (0, 28)
    with pytest.raises(ValueError, match="same length"): decoder.step([1, 2], [0], [0])


@pytest.mark.parametrize("dtype, bound", [("bfloat16", .2), ("int8", .5)])
def test_smaller_weights_are_near(dtype, bound):
    model, ids = small(), np.arange(16)
    difference = np.abs(prompt(FastDecoder(model, dtype=dtype), ids) - torch_logits(model, ids[None])[0]).max()
    assert 0 < difference < bound


def test_which_models_fit():
    model = small()
    assert supports(model)
    assert not supports(torch.nn.Sequential(model))
    assert not supports(small().bfloat16())
    odd = small()
    odd.blocks[0].ffwd.net[1] = torch.nn.ReLU()
    assert not supports(odd)
    with pytest.raises(ValueError, match="use PyTorch"): FastDecoder(odd)


# The sampler and the loop

def call(logits, params, u): return choose(logits, u, choice_of(params), *np.empty((2, len(logits))))


scores = st.integers(1, 60).flatmap(lambda n: st.lists(st.floats(-30, 30, width=32), min_size=n, max_size=n))
settings_ = st.builds(SamplingParams, temperature=st.sampled_from([0, 1e-4, .3, .8, 1, 2, 50]), top_k=st.integers(0, 70),
                      top_p=st.one_of(st.just(1.), st.floats(0, 1)), min_p=st.one_of(st.just(0.), st.floats(0, 1)))


@settings(max_examples=1500, deadline=None)
@given(scores, settings_, st.floats(0, 1, exclude_max=True))
def test_choices_are_those_of_the_other_sampler(logits, params, u):
    "Wherever the compiled sampler decides, it decides alike."
    logits = np.array(logits, np.float32)
    fast = call(logits, params, u)
    assert fast in (-1, sample(logits, params, None, u))


def test_it_seldom_declines():
    rng = np.random.default_rng(0)
    all_ = [SamplingParams(**s) for s in (dict(), dict(top_k=5), dict(top_p=.9), dict(min_p=.05), dict(temperature=1.3, top_p=.7))]
    found = [call(rng.normal(0, 3, 28).astype(np.float32), p, rng.random()) for p in all_ for _ in range(2000)]
    assert found.count(-1) <= 2


@pytest.mark.parametrize("logits, changes, u", [
    ([0, 0, 0, 0], dict(), .25), ([0, 0, 0, 0], dict(top_p=.5), .1), ([-np.inf, 0], dict(), .5), ([1, np.nan], dict(), .5),
    ([np.inf, 0], dict(temperature=0), .5)])
def test_it_declines_what_hangs_by_a_thread(logits, changes, u):
    assert call(np.array(logits, np.float32), SamplingParams(**{"temperature": 1, "top_k": 0} | changes), u) == -1


@pytest.mark.parametrize("changes", [
    dict(), dict(temperature=0), dict(top_k=3), dict(top_p=.8, min_p=.02), dict(stop=("a", "qz")), dict(until="sentence"),
    dict(presence_penalty=.3), dict(repetition_penalty=1.2), dict(logit_bias={3: -100}), dict(logprobs=3), dict(max_new_tokens=1)])
@pytest.mark.parametrize("slide", ["anchor", "exact"])
def test_events_are_those_of_pytorch(changes, slide):
    "Past the window too: the prompt of 12 and 70 characters more, in windows of 16."
    model, params = small(3), SamplingParams(**{"seed": 5, "max_new_tokens": 70} | changes)
    fast, slow = (list(Generator(model, TOK, slide, fast=f).stream(TOK.encode("virtue is it"), params)) for f in (True, False))
    assert [(e.text, e.id, e.finish_reason) for e in fast] == [(e.text, e.id, e.finish_reason) for e in slow]
    assert all(abs((a.logprob or 0) - (b.logprob or 0)) < 1e-4 for a, b in zip(fast, slow))
    assert [[t for t, *_ in e.alternatives] for e in fast] == [[t for t, *_ in e.alternatives] for e in slow]


def test_a_seed_is_a_text_however_it_is_read():
    "Streams of one generator that take turns, one that is left, and how far the loop runs ahead; to the bit."
    generator = Generator(small(3), TOK).prepare()
    stream = lambda seed: generator.stream(TOK.encode("virtue"), SamplingParams(seed=seed, max_new_tokens=50))
    alone = [list(stream(seed)) for seed in range(3)]
    next(stream(9))
    assert [list(events) for events in zip(*zip(*map(stream, range(3))))] == alone
    for generator.ahead in (1, 3, 50): assert list(stream(1)) == alone[1]


def test_declined_choices_are_made(monkeypatch):
    "A model that finds everything equally likely, and numbers on the borders between its characters."
    model = small(vocab_size=4)
    with torch.no_grad(): model.lm_head.weight.zero_()
    monkeypatch.setattr(generation, "uniform", lambda seed, position: position % 4 / 4)
    decoder = FastDecoder(model)
    sampler = Sampler(SamplingParams(temperature=1), 4)
    monkeypatch.setattr(kernel, "_write", lambda chosen, *args: args[2].fill(0) or 0)  # declines at once
    ids, logits = [0], None
    for position in range(8):
        new, logits = decoder.write(ids[-1:], position, sampler, 5)
        ids += new
    assert ids[1:] == [0, 1, 2, 3] * 2 and logits.shape == (1, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loop_has_the_scores_of_the_step(dtype):
    "To the bit, so that the generator and an engine write the same text from a seed."
    decoder = FastDecoder(small(3), dtype=dtype)
    ids, logits = decoder.write([5, 7, 9], 0, Sampler(SamplingParams(seed=2), 28), 14)
    assert len(ids) == 14 and np.array_equal(prompt(decoder.fresh(), [5, 7, 9, *ids[:-1]])[2:], logits)


def test_changed_weights_are_seen():
    model = small(3)
    generator, params = Generator(model, TOK), SamplingParams(seed=1, temperature=0, max_new_tokens=12)
    before = generator.generate("virtue", params)
    with torch.no_grad(): model.lm_head.weight.neg_()
    assert generator.generate("virtue", params) == Generator(model, TOK, fast=False).generate("virtue", params) != before
    model.load_state_dict(small(4).state_dict())
    assert generator.generate("virtue", params) == Generator(model, TOK, fast=False).generate("virtue", params)


def test_who_looks_inside_sees():
    model = small(3)
    generator = Generator(model, TOK).prepare()
    with capture(model) as seen: generator.generate("virtue", seed=1, max_new_tokens=1)
    assert seen.attention.shape[0] == 2


def test_a_broken_model_is_an_error():
    model = small()
    with torch.no_grad(): model.wte.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"): Generator(model, TOK).generate("virtue", seed=1)


def test_formats_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="known: float32, bfloat16, int8"): Generator(small(), TOK, dtype="int4").generate("a")
    with pytest.raises(ValueError, match=r"microjulia\[fast\]"): Generator(small().bfloat16(), TOK, dtype="int8").generate("a")


def test_threads_with_decoders_of_their_own():
    decoder, texts = FastDecoder(small()), np.random.default_rng(0).integers(0, 28, (4, 16))
    alone = [prompt(decoder, ids) for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: prompt(decoder.fresh(), texts[i % 4]), range(200)))
    assert all(np.array_equal(y, alone[i % 4]) for i, y in enumerate(found))


def test_a_fresh_decoder_writes_to_nothing_of_the_first():
    decoder, ids = FastDecoder(small()), list(range(9))
    sampler = lambda seed: Sampler(SamplingParams(seed=seed, top_p=.9), 28)
    held = lambda: [a.tobytes() for v in vars(decoder).values() for a in (v if isinstance(v, tuple) else [v]) if isinstance(a, np.ndarray)]
    decoder.write(ids, 0, sampler(0), 5)
    before = held()
    decoder.fresh().write(ids[::-1], 0, sampler(1), 5)
    assert held() == before and len(before) > 10


def test_without_numba():
    "In a process where Numba cannot be found: PyTorch writes, and the kernel says what is missing."
    code = ("import sys; sys.modules['numba'] = None\n"
            "from microjulia.generation import Generator\nfrom microjulia.gpt import GPT, GPTConfig\n"
            "from microjulia.tokenizer import CharTokenizer\nfrom microjulia.serving.kernel import FastDecoder, supports\n"
            "model = GPT(GPTConfig(n_embd=8, n_head=1)); print(len(Generator(model, CharTokenizer()).generate('a', max_new_tokens=5)))\n"
            "print(supports(model))\ntry: FastDecoder(model)\nexcept ImportError as e: print(e)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out == ["5", "False", "the fast kernel needs Numba: pip install 'microjulia[fast]'"]
