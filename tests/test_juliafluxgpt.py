"JuliaFluxGPT: its counts, its parts against slow references, the contract, stretching, the start."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_contract import CHECKS, make, some_ids
from torch import nn
from torch.nn import functional as F

from microjulia.checkpoint import load_checkpoint, save_checkpoint
from microjulia.corpus import Corpus
from microjulia.family.juliafluxgpt import (GroupedQueryAttention, JuliaFluxGPT, JuliaFluxGPTConfig, RMSNorm, SwiGLU,
                                            apply_rope, extend_context, ffn_hidden, rope_tables, share_heads)
from microjulia.gpt import build_model, capture, config_for, find_model, param_table
from microjulia.tokenizer import CharTokenizer
from microjulia.training import TrainConfig, train

TINY = dict(vocab_size=28, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=24)


def tiny(seed=0, **changes):
    "A small model, its weights shaken so that every part of it matters."
    return make("juliafluxgpt", seed, **TINY | changes)


# %% counts

@pytest.mark.parametrize("V,C,nh,nkv,L,count", [
    (2000, 512, 8, 2, 8, 22_790_656), (2000, 384, 6, 2, 6, 10_210_176), (2000, 256, 4, 2, 4, 3_463_424),
    (4000, 512, 8, 2, 8, 23_814_656), (4000, 384, 6, 2, 6, 10_978_176), (4000, 256, 4, 2, 4, 3_975_424),
    (2000, 128, 4, 4, 4, 1_010_816),
    (2000, 256, 4, 2, 8, 6_414_592), (2000, 256, 4, 2, 6, 4_939_008), (2000, 128, 4, 2, 4, 945_280),
    (2000, 384, 6, 2, 8, 13_357_440)])
def test_counts_of_the_family_table(V, C, nh, nkv, L, count):
    with torch.device("meta"):
        model = JuliaFluxGPT(JuliaFluxGPTConfig(vocab_size=V, n_embd=C, n_head=nh, n_kv_head=nkv, n_layer=L))
    assert model.num_params() == count == sum(n for _, _, n in param_table(model))


@pytest.mark.parametrize("size,count,T,batch", [("small", 3_463_424, 128, 16), ("medium", 10_210_176, 256, 16),
                                                ("large", 22_790_656, 512, 64), ("1m", 1_010_816, 256, 32)])
def test_named_sizes(size, count, T, batch):
    with torch.device("meta"): model = build_model("juliafluxgpt", config_for("juliafluxgpt", size, vocab_size=2000).to_dict())
    assert (model.num_params(), model.config.block_size) == (count, T)
    assert find_model("juliafluxgpt") is JuliaFluxGPT and JuliaFluxGPT.sizes[size]["batch_size"] == batch


def test_names_of_the_tree():
    names = {n.replace("blocks.0.", "") for n, _, _ in param_table(tiny(n_layer=1))}
    assert names == {"wte.weight", "ln1.weight", "attn.wq.weight", "attn.wkv.weight", "attn.proj.weight", "ln2.weight",
                     "ffwd.w_gate.weight", "ffwd.w_up.weight", "ffwd.w_down.weight", "ln_f.weight"}


# %% parts

@pytest.mark.parametrize("C,nearest,down", [(128, 320, 320), (192, 512, 512), (256, 704, 640), (320, 832, 832),
                                            (384, 1024, 1024), (512, 1344, 1344), (1, 64, 64), (24, 64, 64)])
def test_hidden_widths(C, nearest, down):
    assert (ffn_hidden(C), ffn_hidden(C, how="floor")) == (nearest, down)


@pytest.mark.parametrize("C", range(1, 900, 7))
@pytest.mark.parametrize("mult", [1, 3, 4])
def test_hidden_widths_are_the_originals_formulas(C, mult):
    assert ffn_hidden(C, mult) == max(64, 64 * math.floor((math.floor(2 * mult * C / 3) + 32) / 64))
    assert ffn_hidden(C, mult, "floor") == max(64, 64 * math.floor(round(2 * mult * C / 3) / 64))


def test_rms_norm():
    x, norm = 5 * torch.randn(3, 7, 48) + 2, RMSNorm(48)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)
    assert RMSNorm(48).weight.eq(1).all() and norm(torch.zeros(1, 48)).eq(0).all()
    small = torch.full((1, 48), 1e-3)
    torch.testing.assert_close(RMSNorm(48, eps=1e-6)(small), torch.full((1, 48), 0.5 ** 0.5))  # eps counts beside 1e-6


def test_swiglu_has_no_bias_and_its_dropout_last():
    m = SwiGLU(16, 64, dropout=0.5)
    assert not any(n.endswith("bias") for n, _ in m.named_parameters())
    x = torch.randn(1, 4, 16)
    y = m.eval()(x)
    torch.testing.assert_close(y, (F.silu(x @ m.w_gate.weight.T) * (x @ m.w_up.weight.T)) @ m.w_down.weight.T)
    torch.manual_seed(0)
    dropped = m.train()(x)
    assert ((dropped == 0) | torch.isclose(dropped, 2 * y)).all() and (dropped == 0).any()


@pytest.mark.parametrize("base", [10_000.0, 500.0])
@pytest.mark.parametrize("hs", [2, 8, 64])
def test_rope_against_complex_numbers(hs, base):
    "The pair (i, i + hs/2) is a complex number, turned by exp(i t base^(-2i/hs))."
    cos, sin = rope_tables(hs, 300, base)
    x = torch.randn(2, 3, 300, hs, dtype=torch.float64)
    theta = torch.arange(300, dtype=torch.float64)[:, None] * base ** (-2 * torch.arange(hs // 2, dtype=torch.float64) / hs)
    z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(theta), theta)
    torch.testing.assert_close(apply_rope(x, cos, sin), torch.cat((z.real, z.imag), -1), atol=1e-5, rtol=1e-5)


def test_rope_keeps_lengths_types_and_the_first_position():
    cos, sin = rope_tables(16, 50)
    x = torch.randn(1, 2, 50, 16)
    y = apply_rope(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, :, 0], x[:, :, 0]) and apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    at = torch.tensor([3, 40])
    two = apply_rope(x[:, :, :5].expand(2, -1, -1, -1), cos, sin, at)
    for row, start in enumerate(at.tolist()): torch.testing.assert_close(two[row], apply_rope(x[:, :, :5], cos, sin, start)[0])


def test_rope_scalings():
    plain, n = rope_tables(32, 64), rope_tables(32, 256, scaling="linear", factor=4.0)
    for a, b in zip(plain, n, strict=True): torch.testing.assert_close(a, b[::4], atol=1e-6, rtol=0)
    ntk = rope_tables(32, 256, scaling="ntk", factor=4.0)
    torch.testing.assert_close(ntk[0][:, 0], rope_tables(32, 256)[0][:, 0])              # the fastest pair as before
    torch.testing.assert_close(ntk[1][4, -1], plain[1][1, -1], atol=1e-7, rtol=1e-4)     # the slowest a quarter
    for how in ("linear", "ntk"): assert torch.equal(rope_tables(32, 9, scaling=how)[0], rope_tables(32, 9)[0])
    assert rope_tables(2, 9, scaling="ntk", factor=2.0)[0].isfinite().all()


def attention_by_hand(m, x, base=10_000.0):
    "One head, one query, one key at a time, in float64."
    wq, wkv, proj = (w.weight.detach().double().numpy() for w in (m.wq, m.wkv, m.proj))
    T, C = x.shape
    hs, nkv = C // m.n_head, wkv.shape[0] // (2 * (C // m.n_head))
    keys, values = (x @ wkv.T)[:, :nkv * hs], (x @ wkv.T)[:, nkv * hs:]
    def turned(v, t):
        angle = t * base ** (-2 * np.arange(hs // 2) / hs)
        a, b = v[:hs // 2], v[hs // 2:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])
    y = np.zeros((T, C))
    for h in range(m.n_head):
        j = h // (m.n_head // nkv)
        for t in range(T):
            q = turned((x @ wq.T)[t, h * hs:(h + 1) * hs], t)
            e = np.exp([q @ turned(keys[s, j * hs:(j + 1) * hs], s) / math.sqrt(hs) for s in range(t + 1)])
            y[t, h * hs:(h + 1) * hs] = e / e.sum() @ values[:t + 1, j * hs:(j + 1) * hs]
    return y @ proj.T


@pytest.mark.parametrize("nh,nkv", [(4, 1), (4, 2), (4, 4), (6, 3)])
def test_attention_by_hand(nh, nkv):
    torch.manual_seed(nh + nkv)
    m = GroupedQueryAttention(JuliaFluxGPTConfig(n_embd=24, n_head=nh, n_kv_head=nkv, block_size=10)).double()
    x = torch.randn(2, 10, 24, dtype=torch.float64)
    for row, y in zip(x, m(x), strict=True):
        np.testing.assert_allclose(y.detach().numpy(), attention_by_hand(m, row.numpy()), atol=1e-6)


def test_key_head_j_serves_neighbouring_query_heads():
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert share_heads(x, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2] and share_heads(x, 3) is x
    torch.manual_seed(0)
    m = GroupedQueryAttention(JuliaFluxGPTConfig(n_embd=32, n_head=4, n_kv_head=2, block_size=8)).eval()
    nn.init.eye_(m.proj.weight)
    x = torch.randn(1, 8, 32)
    before = m(x)
    with torch.no_grad(): m.wkv.weight[16 + 8:] += 1  # the values of key head 1
    changed = (m(x) != before).view(8, 4, 8).any(-1).any(0)
    assert changed.tolist() == [False, False, True, True]


# %% the model

@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_contract_of_the_published_million(check, monkeypatch):
    "The shared contract, with every query head having its own keys."
    small = dict(JuliaFluxGPT.sizes["1m"], block_size=48, n_layer=2)
    monkeypatch.setattr(JuliaFluxGPT, "sizes", {"1m": small})
    check("juliafluxgpt")


@torch.no_grad()
def test_rows_at_their_own_positions():
    model = tiny()
    ids, cache = some_ids(model, B=3), model.new_cache(3)
    full = model(ids)
    model(ids[:, :20], cache)
    cache.length = at = torch.tensor([20, 3, 11])
    for _ in range(3):
        step = ids.gather(1, at[:, None])
        torch.testing.assert_close(model(step, cache)[:, 0], full[torch.arange(3), at], rtol=1e-4, atol=1e-4)
        at = at + 1


def test_the_cache_is_as_small_as_promised():
    sizes = {nkv: tiny(n_kv_head=nkv).new_cache(3).nbytes for nkv in (1, 2, 4)}
    assert sizes[4] == 2 * sizes[2] == 4 * sizes[1] == 2 * 2 * 3 * 4 * 24 * 8 * 4


@torch.no_grad()
def test_captured_attention():
    model = tiny()
    with capture(model) as seen: model(some_ids(model, T=9))
    assert seen.attention.shape == (2, 2, 4, 9, 9) and seen.residual.shape == (3, 2, 9, 32)
    torch.testing.assert_close(seen.attention.sum(-1), torch.ones(2, 2, 4, 9))
    assert not seen.attention.triu(1).any()


def test_head_is_the_table_and_both_ends_train_it():
    model = tiny()
    x = torch.randn(1, 2, 32)
    torch.testing.assert_close(model.head(x), x @ model.wte.weight.T)
    ids = torch.zeros(1, 5, dtype=torch.long)
    model(ids)[..., 7].sum().backward()
    grad = model.wte.weight.grad
    assert grad[0].any() and grad[7].any() and not grad[3].any()  # read as input 0, scored as output 7


def test_starts():
    torch.manual_seed(0)
    for name, p in JuliaFluxGPT(JuliaFluxGPTConfig(n_layer=8)).named_parameters():
        p = p.detach()
        if p.dim() == 1: assert (p == 1).all()
        else: assert abs(p.std() / (0.02 / 4 if name.endswith(("proj.weight", "w_down.weight")) else 0.02) - 1) < 0.05, name
    for name, p in JuliaFluxGPT(JuliaFluxGPTConfig.legacy()).named_parameters():
        p = p.detach()
        if name == "wte.weight": assert abs(p.std() - 1) < 0.01
        elif p.dim() == 2:
            edge = math.sqrt(6 / sum(p.shape))
            assert 0.97 * edge < p.abs().max() <= edge
    assert JuliaFluxGPTConfig.legacy().dropout == 0.1 and JuliaFluxGPTConfig.legacy(dropout=0.0).dropout == 0


def test_dropout_where_the_original_has_it():
    model = tiny(dropout=0.5)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Dropout)] == ["drop", "blocks.0.ffwd.drop", "blocks.1.ffwd.drop"]
    ids = some_ids(model)
    assert torch.equal(model(ids), model(ids))
    assert not torch.equal(model.train()(ids), model(ids))


@pytest.mark.parametrize("changes,says", [
    (dict(n_head=3), "n_embd=256 is not divisible by n_head=3"), (dict(n_kv_head=3), "n_head=4 is not divisible by n_kv_head=3"),
    (dict(n_kv_head=0), "n_kv_head=0"), (dict(n_kv_head=8), "n_kv_head=8"), (dict(n_embd=12), "head_size=3 is odd"),
    (dict(dropout=1.0), "dropout=1.0"), (dict(init="lux"), "choose 'gpt2' or 'flux'"), (dict(norm_eps=0.0), "norm_eps"),
    (dict(rope_base=1.0), "rope_base"), (dict(rope_factor=0.0), "rope_factor"), (dict(rope_scaling="x"), "rope_scaling='x'"),
    (dict(bias=False), "unknown hyperparameter 'bias'")])
def test_impossible_configs(changes, says):
    with pytest.raises(ValueError, match=says): JuliaFluxGPTConfig.from_dict(changes)


@torch.no_grad()
def test_stretching():
    model = tiny()
    ids = some_ids(model)
    same = extend_context(model, 3, "none")
    torch.testing.assert_close(same(ids), model(ids))
    assert same.config.block_size == 72 and same(some_ids(same)).shape == (2, 72, 28)
    twice = extend_context(extend_context(model, 2, "linear"), 3, "linear")
    assert (twice.config.rope_factor, twice.config.block_size) == (6.0, 144)
    torch.testing.assert_close(twice.blocks[0].attn.cos[::6], model.blocks[0].attn.cos, atol=1e-6, rtol=0)
    assert (model.config.block_size, model.config.rope_scaling) == (24, "none")
    cache, parts = twice.new_cache(2), []
    ids = some_ids(twice, T=100)
    for piece in (ids[:, :70], ids[:, 70:]): parts.append(twice(piece, cache))
    torch.testing.assert_close(torch.cat(parts, 1), twice(ids), rtol=1e-4, atol=1e-4)
    assert extend_context(model.train(), 2).training


def test_traced_whole():
    model = tiny()
    fast, ids = torch.compile(model, backend="eager", fullgraph=True), some_ids(model)
    torch.testing.assert_close(fast(ids), model(ids))
    with torch.no_grad():
        cache = model.new_cache(2)
        parts = [fast(ids[:, :5], cache)] + [fast(ids[:, t:t + 1], cache) for t in range(5, 24)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-4)


def test_bf16_autocast():
    model = tiny()
    ids = some_ids(model)
    with torch.autocast("cpu", torch.bfloat16): logits = model.train()(ids)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    torch.testing.assert_close(logits.float(), model(ids), atol=0.15, rtol=0.1)
    half = tiny().bfloat16()
    assert half(ids).dtype == torch.bfloat16 and half.new_cache(1).layers[0].k.dtype == torch.bfloat16


def test_trains_resumes_and_reloads(tmp_path):
    "Through the loop and the checkpoint, which know no architecture by name."
    corpus = Corpus.from_texts({"a": "the unexamined life is not worth living. " * 40})
    model, steps = tiny(block_size=16), dict(batch_size=4, evals=2)
    history = train(model, corpus, TrainConfig(steps=30, **steps), out=tmp_path / "run")
    again = tiny(block_size=16)
    train(again, corpus, TrainConfig(steps=30, **steps), out=tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    evals = [r["val_loss"] for r in history if r["kind"] == "eval"]
    assert evals[-1] < evals[0]
    save_checkpoint(tmp_path / "m", model, CharTokenizer())
    saved = load_checkpoint(tmp_path / "m").model
    ids = some_ids(model)
    assert isinstance(saved, JuliaFluxGPT) and saved.config == model.config and torch.equal(saved(ids), model.eval()(ids))
    assert replace(saved.config, n_layer=3) != model.config
