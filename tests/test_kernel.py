"The compiled step against PyTorch: shapes, formats, company, and what it refuses."
import numpy as np
import pytest
import torch

from microjulia.gpt import GPT, GPTConfig
from microjulia.serving.kernel import DTYPES, FastDecoder, supports


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
