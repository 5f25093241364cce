"JuliaSLM: its counts, both layouts against Julia's memory order and by hand, the windows, both caches."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from model_contract import CHECKS, make, some_ids
from torch import nn
from torch.nn import functional as F

from microjulia.attention import KVCache
from microjulia.checkpoint import load_checkpoint, save_checkpoint
from microjulia.family.juliafluxgpt import JuliaFluxGPT, JuliaFluxGPTConfig, extend_context
from microjulia.family.juliaslm import (IdCache, JuliaSLM, JuliaSLMConfig, RotaryAttention, join_heads, slot_tokens,
                                        split_heads)
from microjulia.generation import Generator, SamplingParams
from microjulia.gpt import capture, config_for, find_model, param_table
from microjulia.tokenizer import CharTokenizer

TINY = dict(vocab_size=28, n_layer=2, n_head=4, n_embd=32, block_size=32)


def tiny(seed=0, **changes):
    "A small model, its weights shaken so that every part of it matters."
    return make("juliaslm", seed, **TINY | changes)


def flat(**changes): return tiny(head_layout="julia_flat", **changes)


# %% counts

@pytest.mark.parametrize("count,fields", [
    (5_037_312, dict()), (5_549_312, dict(tied=False)),
    (1_333_824, dict(n_embd=192, n_layer=3, n_head=3, vocab_size=28)), (1_335_744, dict(n_embd=192, n_layer=3, n_head=3, vocab_size=38)),
    (10_632_576, dict(n_embd=384, n_head=3, vocab_size=28)), (10_636_416, dict(n_embd=384, n_head=3, vocab_size=38)),
    (2_930_112, dict(n_embd=192, n_head=3, hidden=480)), (2_505_792, dict(n_embd=192, n_head=3, hidden=480, n_layer=5)),
    (2_081_472, dict(n_embd=192, n_head=3, hidden=480, n_layer=4)),
    (1_010_816, dict(n_embd=128, n_layer=4))])
def test_counts_of_the_family_table(count, fields):
    with torch.device("meta"): model = JuliaSLM(JuliaSLMConfig(**fields))
    assert model.num_params() == count == sum(n for _, _, n in param_table(model))


def test_attention_alone():
    assert sum(p.numel() for p in RotaryAttention(JuliaSLMConfig()).parameters()) == 262_144


@pytest.mark.parametrize("size,C,L,nh,hs,T,batch,hidden", [
    ("tiny", 192, 3, 3, 64, 128, 32, 512), ("base", 384, 6, 3, 128, 256, 64, 1024), ("5m", 256, 6, 4, 64, 256, 32, 640),
    ("1m", 128, 4, 4, 32, 256, 32, 320)])
def test_named_sizes(size, C, L, nh, hs, T, batch, hidden):
    c = config_for("juliaslm", size, vocab_size=2000)
    assert (c.n_embd, c.n_layer, c.n_head, c.width, c.block_size) == (C, L, nh, hs, T)
    with torch.device("meta"): model = find_model("juliaslm")(c)
    assert model.blocks[0].ffwd.w_gate.weight.shape == (hidden, C) and JuliaSLM.sizes[size]["batch_size"] == batch


def test_names_of_the_tree():
    names = {n.replace("blocks.0.", "") for n, _, _ in param_table(tiny(n_layer=1, tied=False))}
    assert names == {"wte.weight", "ln1.weight", "attn.wq.weight", "attn.wk.weight", "attn.wv.weight", "attn.proj.weight",
                     "ln2.weight", "ffwd.w_gate.weight", "ffwd.w_up.weight", "ffwd.w_down.weight", "ln_f.weight", "lm_head.weight"}
    assert "lm_head.weight" not in tiny().state_dict()


# %% layouts

@pytest.mark.parametrize("T", [1, 5, 8, 12])
@pytest.mark.parametrize("nh,hs", [(4, 3), (3, 8), (1, 6)])
def test_flat_is_julias_memory_order(T, nh, hs):
    "Y = W x, `(nh * hs, T)`, reshaped to `(hs, T, nh)` with the first axis fastest."
    y = np.arange(nh * hs * T).reshape(nh * hs, T)
    julia = y.reshape((hs, T, nh), order="F")                            # [i, t', g]
    ours = split_heads(torch.from_numpy(np.ascontiguousarray(y.T))[None], nh, "julia_flat")[0]
    assert ours.shape == (nh, T, hs) and np.array_equal(ours.numpy(), julia.transpose(2, 1, 0))
    back = julia.reshape((nh * hs, T), order="F")
    assert np.array_equal(join_heads(ours[None], "julia_flat")[0].numpy().T, back) and np.array_equal(back, y)


@pytest.mark.parametrize("layout", ["standard", "julia_flat"])
def test_join_undoes_split(layout):
    x = torch.randn(3, 7, 20)
    assert torch.equal(join_heads(split_heads(x, 5, layout), layout), x)
    one = split_heads(x, 1, layout)
    assert torch.equal(one[:, 0], x)                                     # with one head there is but one layout


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8))
def test_slots(T, nh):
    s = slot_tokens(T, nh)
    assert s.shape == (nh, T) and (s.diff() >= 0).all() and torch.bincount(s.flatten(), minlength=T).eq(nh).all()
    if T % nh == 0: assert torch.equal(s // (T // nh), torch.arange(nh)[:, None].expand(nh, T))


def by_hand(m, x, layout, base=10_000.0):
    "Attention slot by slot in float64: a slot is a head of a token, with a row and a place in it."
    wq, wk, wv, proj = (w.weight.detach().double().numpy() for w in (m.wq, m.wk, m.wv, m.proj))
    T, nh, hs = len(x), m.n_head, wq.shape[0] // m.n_head
    where = {(t, h): divmod(h + nh * t, T) if layout == "julia_flat" else (h, t) for t in range(T) for h in range(nh)}
    def part(w, t, h): return (w @ x[t])[h * hs:(h + 1) * hs]
    def turned(v, p):
        angle = p * base ** (-2 * np.arange(hs // 2) / hs)
        a, b = v[:hs // 2], v[hs // 2:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])
    y = np.zeros((T, nh * hs))
    for (t, h), (row, place) in where.items():
        seen = [s for s, (r, p) in where.items() if r == row and p <= place]
        q = turned(part(wq, t, h), place)
        e = np.exp([q @ turned(part(wk, *s), where[s][1]) / math.sqrt(hs) for s in seen])
        y[t, h * hs:(h + 1) * hs] = e / e.sum() @ np.stack([part(wv, *s) for s in seen])
    return y @ proj.T


@pytest.mark.parametrize("layout", ["standard", "julia_flat"])
@pytest.mark.parametrize("T", [8, 9])
@pytest.mark.parametrize("hs", [None, 6])
def test_attention_by_hand(layout, T, hs):
    torch.manual_seed(0)
    m = RotaryAttention(JuliaSLMConfig(n_embd=16, n_head=4, head_size=hs, block_size=12, head_layout=layout)).double()
    x = torch.randn(2, T, 16, dtype=torch.float64)
    for row, y in zip(x, m(x), strict=True):
        np.testing.assert_allclose(y.detach().numpy(), by_hand(m, row.numpy(), layout), atol=1e-6)


# %% windows

@torch.no_grad()
def heard(model, T, seed=1):
    "`(T, T)`: do the logits at the row's token change with the column's?"
    ids = some_ids(model, B=1, T=T, seed=seed)
    out = []
    for t in range(T):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % model.config.vocab_size
        out.append((model(other) - model(ids)).abs().amax(-1)[0] > 1e-4)
    return torch.stack(out, 1)


@pytest.mark.parametrize("T", [8, 16, 32])
def test_windows_know_nothing_of_each_other(T):
    "In the whole model, through several layers; with T=8: {0,1} {2,3} {4,5} {6,7}."
    window = torch.arange(T) // (T // 4)
    want = (window[:, None] == window) & torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(heard(flat(n_layer=3), T), want)
    assert torch.equal(heard(tiny(n_layer=3), T), torch.ones(T, T, dtype=torch.bool).tril())


def test_token_1_is_not_heard_at_2():
    m = heard(flat(), 8)
    assert m[1, 1] and not m[2:, 1].any()


def test_a_token_between_two_rows_passes_on():
    "T=10, 4 heads: token 2 lies in both of the first rows; in two layers token 4 hears of token 1 through it."
    assert not heard(flat(n_layer=1), 10)[4, 1] and heard(flat(n_layer=2), 10)[4, 1]
    assert not heard(flat(n_layer=6), 10)[5, 4]                          # between the halves there is no such token


@pytest.mark.parametrize("T", [1, 3, 8, 11, 32])
def test_flat_is_causal(T): assert not heard(flat(n_layer=3), T).triu(1).any()


@torch.no_grad()
def test_windows_move_with_the_length():
    model = flat()
    ids = some_ids(model, B=1)
    assert not torch.allclose(model(ids[:, :12])[:, :8], model(ids[:, :8]), atol=1e-3)
    rest = ids.clone()
    rest[:, 11:] = 0
    torch.testing.assert_close(model(rest)[:, :11], model(ids)[:, :11], rtol=1e-4, atol=1e-4)  # not with a fixed length


# %% caches

@torch.no_grad()
@pytest.mark.parametrize("portions", [[1] * 32, [12] + [1] * 20, [5, 3, 23, 1], [32]])
def test_flat_steps_answer_as_full_passes(portions):
    model, at = flat(), 0
    ids, cache = some_ids(model), model.new_cache(2)
    for n in portions:
        torch.testing.assert_close(model(ids[:, at:at + n], cache), model(ids[:, :at + n])[:, -n:], rtol=1e-4, atol=1e-4)
        at += n
        assert cache.length == at


@torch.no_grad()
def test_flat_cache_manners():
    model = flat()
    a, b, cache = some_ids(model, T=9, seed=1), some_ids(model, T=9, seed=2), model.new_cache(2)
    assert isinstance(cache, IdCache) and cache.layers == [] and cache.nbytes == 2 * 32 * 8
    model(a, cache)
    cache.reset()
    torch.testing.assert_close(model(b, cache), model(b))
    cache.crop(4)
    torch.testing.assert_close(model(a[:, 4:], cache), model(torch.cat([b[:, :4], a[:, 4:]], 1))[:, 4:])
    with pytest.raises(ValueError, match="do not fit into block_size=32"): model(some_ids(model), cache)
    assert cache.length == 9
    with pytest.raises(ValueError, match="block_size=32"): model(torch.zeros(1, 33, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["standard", "julia_flat"])
def test_rows_at_their_own_positions(layout):
    model = tiny(head_layout=layout)
    ids, cache = some_ids(model, B=3), model.new_cache(3)
    model(ids[:, :20], cache)
    cache.length = at = torch.tensor([20, 3, 11])
    for _ in range(3):
        logits = model(ids.gather(1, at[:, None]), cache)[:, 0]
        for b, n in enumerate(at.tolist()):
            torch.testing.assert_close(logits[b], model(ids[b:b + 1, :n + 1])[0, -1], rtol=1e-4, atol=1e-4)
        at = at + 1
        assert cache.length.equal(at)


@pytest.mark.parametrize("layout", ["standard", "julia_flat"])
def test_generation_with_and_without_cache(layout):
    "The generator, past the end of the window too, says what a full pass at each step says."
    model, tokenizer = tiny(head_layout=layout), CharTokenizer()
    ids, params = tokenizer.encode("virtue is"), SamplingParams(max_new_tokens=22, seed=5, temperature=1.0)
    events = list(Generator(model, tokenizer).stream(ids, params))
    text = list(ids) + [e.id for e in events if e.id is not None]
    for i, e in enumerate(e for e in events if e.id is not None):
        with torch.no_grad(): logits = model(torch.tensor([text[:len(ids) + i]], dtype=torch.long))[0, -1]
        assert abs(F.log_softmax(logits, -1)[e.id].item() - e.logprob) < 1e-3


# %% the model

@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_contract_with_a_head_of_its_own_and_other_widths(check, monkeypatch):
    "The shared contract, where heads are wider together than the stream and the head is not tied."
    size = dict(vocab_size=28, n_layer=2, n_head=3, head_size=10, n_embd=16, block_size=24, tied=False, hidden=40)
    monkeypatch.setattr(JuliaSLM, "sizes", {"odd": size})
    check("juliaslm")


@torch.no_grad()
def test_the_same_function_as_juliafluxgpt():
    model = tiny()
    c = model.config
    flux = JuliaFluxGPT(JuliaFluxGPTConfig(**{k: v for k, v in TINY.items()}, n_kv_head=4)).eval()
    state = model.state_dict()
    for i in range(c.n_layer):
        a = f"blocks.{i}.attn."
        state[a + "wkv.weight"] = torch.cat([state.pop(a + "wk.weight"), state.pop(a + "wv.weight")])
    flux.load_state_dict(state)
    ids = some_ids(model)
    torch.testing.assert_close(flux(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_starts():
    torch.manual_seed(0)
    for name, p in JuliaSLM(JuliaSLMConfig(n_layer=8, tied=False)).named_parameters():
        p = p.detach()
        if p.dim() == 1: assert (p == 1).all()
        else: assert abs(p.std() / (0.02 / 4 if name.endswith(("proj.weight", "w_down.weight")) else 0.02) - 1) < 0.05, name
    for name, p in JuliaSLM(JuliaSLMConfig.legacy()).named_parameters():
        p = p.detach()
        if name == "wte.weight": assert p.min() >= 0 and p.max() <= 1 and abs(p.mean() - 0.5) < 0.01
        elif p.dim() == 2: assert abs(p.std() / math.sqrt(2 / sum(p.shape)) - 1) < 0.05 and p.abs().max() > 3 * p.std(), name
    assert JuliaSLMConfig.legacy().head_layout == "julia_flat" and JuliaSLMConfig.legacy(n_layer=1).n_layer == 1


@torch.no_grad()
def test_capture():
    for model in (tiny(), flat()):
        with capture(model) as seen: looked = model(some_ids(model, T=8))
        torch.testing.assert_close(looked, model(some_ids(model, T=8)))
        assert seen.attention.shape == (2, 2, 4, 8, 8) and seen.residual.shape == (3, 2, 8, 32)
        torch.testing.assert_close(seen.attention.sum(-1), torch.ones(2, 2, 4, 8))


@pytest.mark.parametrize("changes,says", [
    (dict(n_head=3), "n_embd=256 is not divisible by n_head=3"), (dict(head_size=3), "head_size=3 is odd"), (dict(head_size=0), "head_size=0"),
    (dict(hidden=1.5), "hidden=1.5"), (dict(head_layout="x"), "choose 'standard' or 'julia_flat'"), (dict(init="flux"), "choose 'gpt2' or 'lux'"),
    (dict(dropout=-1), "dropout"), (dict(rope_scaling="x"), "rope_scaling='x'"), (dict(norm_eps=0), "norm_eps"), (dict(n_kv_head=2), "'n_kv_head'")])
def test_impossible_configs(changes, says):
    with pytest.raises(ValueError, match=says): JuliaSLMConfig.from_dict(changes)


@pytest.mark.parametrize("layout", ["standard", "julia_flat"])
def test_checkpoint_keeps_the_layout(layout, tmp_path):
    model = tiny(head_layout=layout, tied=False)
    save_checkpoint(tmp_path / "m", model, CharTokenizer())
    saved, ids = load_checkpoint(tmp_path / "m").model, some_ids(model, T=12)
    assert isinstance(saved, JuliaSLM) and saved.config == model.config and torch.equal(saved(ids), model(ids))


def test_gradients_reach_everything_in_the_flat_layout():
    model = flat()
    ids = some_ids(model)
    F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    assert all(p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_stretching_and_tracing():
    model = tiny()
    assert extend_context(model, 2, "linear")(some_ids(model, T=32).repeat(1, 2)).shape == (2, 64, 28)
    for m in (model, flat()):
        fast, ids = torch.compile(m, backend="eager", fullgraph=True), some_ids(m)
        torch.testing.assert_close(fast(ids), m(ids))
    assert isinstance(model.new_cache(3), KVCache) and not isinstance(model.new_cache(3), IdCache)
    wide = tiny(head_size=10)
    assert wide.new_cache(3).layers[0].k.shape == (3, 4, 32, 10) and nn.Module in type(wide).__mro__
    assert replace(model.config, tied=False).tied is False
