"Attention over many shapes: equality of its forms, causality, the cache, and where rows differ."
import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from microjulia.attention import (CausalSelfAttention, KVCache, LayerCache, attend, causal_attention,
                                  causal_mask, mask_rows)

SHAPES = [(1, 1, 1, 1), (2, 3, 7, 4), (1, 4, 32, 16), (3, 6, 17, 64)]  # B, nh, T, hs


def formula(q, k, v, mask):
    "The paper's formula in float64, one query at a time."
    q, k, v, mask = (t.double() for t in (q, k, v, mask))
    out = torch.zeros_like(q)
    for i in range(q.size(2)):
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, i], k) / math.sqrt(q.size(3)) + mask[i]
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out[:, :, i] = torch.einsum("bhs,bhsd->bhd", weights, v)
    return out


def layer_cache(B, attn, T, C): return LayerCache(*torch.zeros(2, B, attn.n_head, T, C // attn.n_head))


@pytest.mark.parametrize("B,nh,T,hs", SHAPES)
def test_forms_agree(B, nh, T, hs):
    torch.manual_seed(T)
    q, k, v = torch.randn(3, B, nh, T, hs)
    mask = causal_mask(T + 3)
    y, att = attend(q, k, v, mask[:T, :T])
    want = formula(q, k, v, mask[:T, :T]).float()
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(causal_attention(q, k, v, mask), want)
    assert att.shape == (B, nh, T, T) and not att.triu(1).any()


@pytest.mark.parametrize("B,nh,T,hs", SHAPES)
def test_gradients_agree(B, nh, T, hs):
    torch.manual_seed(T)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, B, nh, T, hs).unbind())
    grads = [torch.autograd.grad((y * y).sum(), (q, k, v)) for y in
             (attend(q, k, v, causal_mask(T))[0], F.scaled_dot_product_attention(q, k, v, is_causal=True))]
    for a, b in zip(*grads, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 9), T=st.integers(1, 6), seed=st.integers(0, 99))
def test_any_part_of_the_context(start, T, seed):
    "Queries from any position on, against all keys so far, get what the whole pass gives them."
    torch.manual_seed(seed)
    S = start + T
    q, k, v = torch.randn(3, 2, 3, S, 8)
    mask = causal_mask(16)
    want = causal_attention(q, k, v, mask)[:, :, start:]
    got = causal_attention(q[:, :, start:], k, v, mask, start)
    torch.testing.assert_close(got, want)
    observed = causal_attention(q[:, :, start:], k, v, mask, start, observe=lambda *_: None)
    torch.testing.assert_close(observed, want)


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_cache_in_any_portions(steps, seed):
    torch.manual_seed(seed)
    attn, T = CausalSelfAttention(12, 3, 20), sum(steps)
    x, cache, parts, at = torch.randn(2, T, 12), layer_cache(2, attn, 20, 12), [], 0
    with torch.no_grad():
        for n in steps:
            parts.append(attn(x[:, at:at + n], cache, at))
            at += n
        torch.testing.assert_close(torch.cat(parts, 1), attn(x))


def test_rows_at_their_own_positions():
    torch.manual_seed(0)
    attn = CausalSelfAttention(16, 4, 12)
    x, cache = torch.randn(3, 12, 16), layer_cache(3, attn, 12, 16)
    with torch.no_grad():
        full = attn(x)
        attn(x[:, :10], cache, torch.zeros(3, dtype=torch.long))
        at = torch.tensor([10, 4, 0])
        part = torch.stack([x[i, p:p + 2] for i, p in enumerate(at)])
        y = attn(part, cache, at)
    for i, p in enumerate(at): torch.testing.assert_close(y[i], full[i, p:p + 2])


def test_what_lies_behind_is_never_looked_at():
    "A cache full of rubbish behind the filled part changes nothing."
    torch.manual_seed(0)
    attn, x = CausalSelfAttention(16, 4, 12), torch.randn(2, 5, 16)
    with torch.no_grad():
        for start in (0, torch.zeros(2, dtype=torch.long)):
            cache = LayerCache(*torch.full((2, 2, 4, 12, 4), 1e4))
            torch.testing.assert_close(attn(x, cache, start), attn(x))


@pytest.mark.parametrize("dtype,eps", [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
def test_other_types(dtype, eps):
    torch.manual_seed(0)
    attn = CausalSelfAttention(32, 4, 16)
    x = torch.randn(2, 9, 32)
    want = attn(x)
    other = copy.deepcopy(attn).to(dtype)
    assert other.mask.dtype == dtype and other(x.to(dtype)).dtype == dtype
    assert (other(x.to(dtype)).float() - want).abs().max() < max(eps, 1e-5)
    with torch.no_grad(): assert (other(x.to(dtype)).float() - want).abs().max() < max(eps, 1e-5)


def test_autocast_training_and_cache():
    torch.manual_seed(0)
    attn, x = CausalSelfAttention(32, 4, 16), torch.randn(2, 9, 32)
    want = attn(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = attn(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        with torch.no_grad():
            cache = layer_cache(2, attn, 16, 32)
            z = torch.cat([attn(x[:, :6], cache), attn(x[:, 6:8], cache, 6), attn(x[:, 8:], cache, 8)], 1)
    assert (y - want).abs().max() < 2e-2 and (z - want).abs().max() < 2e-2
    assert all(p.grad.isfinite().all() for p in attn.parameters())


def test_observer_is_shown_the_weights_that_are_used():
    torch.manual_seed(0)
    attn, x, seen = CausalSelfAttention(8, 2, 16), torch.randn(2, 5, 8), []
    plain = attn(x)
    attn.observe = lambda name, att: seen.append((name, att))
    torch.testing.assert_close(attn(x), plain)
    (name, att), = seen
    v = attn.qkv(x)[..., 16:].view(2, 5, 2, 4).transpose(1, 2)
    assert name == "attention"
    torch.testing.assert_close(attn.proj((att @ v).transpose(1, 2).reshape(2, 5, 8)), plain)


def test_traced_whole():
    "One graph without breaks, trained and with a cache."
    torch.manual_seed(0)
    attn, x = CausalSelfAttention(8, 2, 16), torch.randn(2, 5, 8)
    fast = torch.compile(attn, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(x), attn(x))
    with torch.no_grad():
        cache = layer_cache(2, attn, 16, 8)
        torch.testing.assert_close(torch.cat([fast(x[:, :3], cache, 0), fast(x[:, 3:], cache, 3)], 1), attn(x))


def test_mask():
    assert causal_mask(3).tolist() == [[0, -math.inf, -math.inf], [0, 0, -math.inf], [0, 0, 0]]
    mask = causal_mask(6)
    assert mask_rows(mask, 2, 3, 5).equal(mask[2:5, :5])
    assert mask_rows(mask, torch.tensor([1, 4]), 2, 6).equal(torch.stack([mask[1:3], mask[4:6]])[:, None])


def test_state_holds_weights_only():
    assert set(CausalSelfAttention(8, 2, 16).state_dict()) == {"qkv.weight", "proj.weight"}
    assert set(CausalSelfAttention(8, 2, 16, bias=True).state_dict()) == {
        "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


@pytest.mark.parametrize("n_head", [0, -2, 3, 16])
def test_heads_must_share_the_width(n_head):
    with pytest.raises(ValueError, match="n_embd=8 is not divisible"): CausalSelfAttention(8, n_head, 4)


def test_kv_cache_counts():
    cache = KVCache(3, 2, 4, 10, 5, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 2 * (2 * 4 * 10 * 5) * 2 and len(cache.layers) == 3
    cache.advance(4), cache.advance(3)
    assert cache.length == 7
    cache.crop(5)
    assert cache.length == 5
    for bad in (-1, 6):
        with pytest.raises(ValueError, match="cannot keep"): cache.crop(bad)
    cache.reset()
    assert cache.length == 0
    cache.length = torch.tensor([3, 8])
    cache.advance(2)
    assert cache.length.tolist() == [5, 10]


def test_the_form_that_is_used(monkeypatch):
    "In bfloat16 on a CPU the open form is used where gradients are wanted, else the fused one."
    attn, x, fused = CausalSelfAttention(8, 2, 16).bfloat16(), torch.randn(1, 5, 8).bfloat16(), []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: fused.append(1) or real(*a, **k))
    attn(x)
    assert not fused
    with torch.no_grad(): attn(x)
    attn.float()(x.float())
    assert len(fused) == 2
