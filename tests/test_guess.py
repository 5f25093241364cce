"Guessing ahead: the tables against the n-gram model, and texts that must not know of it."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from microjulia.corpus import NgramModel
from microjulia.generation import Generator, SamplingParams
from microjulia.serving.guess import Guesser, GuessingDecoder
from microjulia.serving.kernel import DTYPES, FastDecoder
from microjulia.tokenizer import CharTokenizer
from test_kernel import small

TOK, RNG = CharTokenizer(), np.random.default_rng(0)
TEXT = RNG.choice(28, 2000, p=np.arange(1, 29) / np.arange(1, 29).sum())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=60), st.integers(1, 6), st.lists(st.integers(0, 3), max_size=30))
def test_a_state_knows_what_the_ngram_model_knows(text, order, walk):
    text = np.array(text + text)  # twice, for the very first characters have none before them, from which they could be reached
    guesser, model, state = Guesser(text, 4, order), NgramModel(order, 4).fit(text), 0
    for i, id in enumerate(walk):
        state = guesser.next[state, id]
        before = walk[max(0, i + 2 - order):i + 1]
        assert np.allclose(np.exp(guesser.scores[state]), model.probs(before), atol=1e-5)
    assert guesser.next.min() >= 0 and guesser.next.max() < len(guesser.scores)


SETTINGS = [dict(), dict(temperature=1., top_k=0), dict(temperature=0), dict(top_p=.8, min_p=.05), dict(frequency_penalty=.5),
            dict(stop=("e", "th")), dict(until="sentence"), dict(max_new_tokens=1), dict(logprobs=2)]

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 3, 40])
def test_the_text_stays_the_same(dtype, k):
    "With every setting, past the window, at every pace; to the bit, log-probabilities included."
    model = small(block_size=24)
    alone = Generator(model, TOK, dtype=dtype)
    guessing = Generator(model, TOK, dtype=dtype, guesser=Guesser(TEXT, 28, 3)).prepare()
    guessing._idle, guessing._decoder.k = [], k
    guessing._decoder.zeros = np.zeros(k + 1, np.int64)
    for seed, changes in enumerate(SETTINGS):
        params, ids = SamplingParams(**dict(max_new_tokens=90, seed=seed) | changes), RNG.integers(0, 28, 1 + 5 * seed)
        expected = list(alone.stream(ids, params))
        for guessing.ahead in (1, 7, 64): assert list(guessing.stream(ids, params)) == expected


def test_guesses_are_kept():
    "A model that is sure of what comes next, and a guesser that knows it: three of four characters are guessed."
    model, tokens = small(), np.tile(np.arange(28), 40)
    model.lm_head.weight.data, model.wpe.weight.data[:] = 30 * model.wte.weight.data.roll(1, 0), 0
    for block in model.blocks: block.attn.proj.weight.data[:], block.ffwd.net[2].weight.data[:] = 0, 0
    writer = GuessingDecoder(FastDecoder(model), Guesser(tokens, 28), 3)
    generator = Generator(model, TOK)
    text = generator.generate("a", temperature=0, max_new_tokens=15)
    generator._idle = [writer]
    assert generator.generate("a", temperature=0, max_new_tokens=15) == text == TOK.decode((TOK.encode("a")[0] + np.arange(1, 16)) % 28)
    assert writer.tokens == 15 and writer.steps <= 7  # steps of 1, 2, 4 and 8 characters: 1 + 1 + 1 + 2, and what the window cuts


def test_streams_that_take_turns():
    "Two texts of one generator, step by step in turns: each has its own text to guess from."
    model = small(block_size=24)
    alone, guessing = Generator(model, TOK), Generator(model, TOK, guesser=Guesser(TEXT, 28, 3))
    params = [SamplingParams(seed=s, max_new_tokens=80) for s in (1, 2)]
    streams = [guessing.stream([s], p) for s, p in enumerate(params)]
    for events in zip(*streams, *(alone.stream([s], p) for s, p in enumerate(params))): assert events[:2] == events[2:]


def test_without_the_kernel_it_is_not_asked():
    model = small()
    texts = [Generator(model, TOK, fast=False, guesser=g).generate("a", seed=1) for g in (None, Guesser(TEXT, 28, 2))]
    assert texts[0] == texts[1]
