"The model: its counts, its arithmetic, its start, the contract of every architecture, and looking inside."
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_contract import CHECKS, make, some_ids
from torch import nn
from torch.nn import functional as F

import microjulia.gpt as gpt
from microjulia.gpt import (GPT, GPTConfig, arch_names, build_model, capture, config_for, find_model, init_weights,
                            param_table)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("arch", arch_names())
def test_contract(arch, check): check(arch)


@pytest.mark.parametrize("V,C,L,T,nh,count", [
    (28, 128, 2, 128, 4, 418_048), (38, 128, 2, 128, 4, 420_608),
    (28, 384, 6, 256, 6, 10_746_624), (38, 384, 6, 256, 6, 10_754_304), (2000, 384, 6, 256, 6, 12_261_120),
    (28, 256, 4, 128, 4, 3_197_440), (254, 256, 4, 128, 4, 3_313_152), (28, 128, 4, 256, 4, 828_672)])
def test_counts_of_the_family_table(V, C, L, T, nh, count):
    model = GPT(GPTConfig(vocab_size=V, n_embd=C, n_layer=L, block_size=T, n_head=nh))
    assert model.num_params() == count == sum(n for _, _, n in param_table(model))


@pytest.mark.parametrize("size,C,L,T", [("small", 128, 2, 128), ("medium", 384, 6, 256), ("large", 384, 6, 256)])
def test_named_sizes(size, C, L, T):
    c = config_for("gpt2", size, vocab_size=38)
    assert (c.n_embd, c.n_layer, c.block_size, c.vocab_size) == (C, L, T, 38)


def forward_by_hand(model, ids):
    "The card's formulas in NumPy, float64, one head and one query at a time."
    w = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    c = model.config

    def norm(x, name):
        var = x.var(-1, keepdims=True)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(var + c.norm_eps) * w[name + ".weight"] + w[name + ".bias"]

    def dense(x, name): return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def gelu(x): return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    def attention(x, name):
        q, k, v = np.split(dense(x, name + ".qkv"), 3, axis=1)
        y, hs = np.zeros_like(x), c.n_embd // c.n_head
        for h in range(c.n_head):
            cols = slice(h * hs, (h + 1) * hs)
            for t in range(len(x)):
                e = np.exp(k[:t + 1, cols] @ q[t, cols] / math.sqrt(hs))
                y[t, cols] = e / e.sum() @ v[:t + 1, cols]
        return dense(y, name + ".proj")

    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    for i in range(c.n_layer):
        b = f"blocks.{i}."
        x = x + attention(norm(x, b + "ln1"), b + "attn")
        x = x + dense(gelu(dense(norm(x, b + "ln2"), b + "ffwd.net.0")), b + "ffwd.net.2")
    return dense(norm(x, "ln_f"), "lm_head")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm_eps", [1e-5, 1e-10])
def test_the_cards_formulas(bias, norm_eps):
    model = make("gpt2", n_embd=32, n_layer=3, block_size=16, vocab_size=11, bias=bias, norm_eps=norm_eps)
    ids, model = some_ids(model), model.double()
    for row, logits in zip(ids, model(ids), strict=True):
        np.testing.assert_allclose(logits.detach().numpy(), forward_by_hand(model, row.numpy()), atol=1e-9)


def test_names_of_the_tree():
    names = {n.replace("blocks.0.", "") for n, _, _ in param_table(GPT(GPTConfig(n_layer=1)))}
    assert names == {"wte.weight", "wpe.weight", "ln1.weight", "ln1.bias", "attn.qkv.weight", "attn.proj.weight",
                     "ln2.weight", "ln2.bias", "ffwd.net.0.weight", "ffwd.net.2.weight", "ln_f.weight", "ln_f.bias",
                     "lm_head.weight"}
    with_bias = {n.replace("blocks.0.", "") for n, _, _ in param_table(GPT(GPTConfig(n_layer=1, bias=True)))}
    assert with_bias - names == {"attn.qkv.bias", "attn.proj.bias", "ffwd.net.0.bias", "ffwd.net.2.bias"}


def test_default_start():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, bias=True))
    for name, p in model.named_parameters():
        p = p.detach()
        if name.endswith("bias"): assert not p.any()
        elif ".ln" in name or name.startswith("ln"): assert (p == 1).all()
        else:
            want = 0.02 / 4 if name.endswith(("attn.proj.weight", "net.2.weight")) else 0.02  # 2 * 8 layers add
            assert abs(p.std() / want - 1) < 0.05 and abs(p.mean()) < want / 10, name


def test_flux_start():
    torch.manual_seed(0)
    for name, p in GPT(GPTConfig.legacy()).named_parameters():
        p = p.detach()
        if name in ("wte.weight", "wpe.weight"): assert abs(p.std() - 1) < 0.05
        elif p.dim() == 2:
            edge = math.sqrt(6 / sum(p.shape))
            assert 0.97 * edge < p.abs().max() <= edge and abs(p.std() - edge / math.sqrt(3)) < 0.03 * edge, name


def test_a_seed_gives_the_same_weights():
    def state(seed):
        torch.manual_seed(seed)
        return GPT(GPTConfig(n_embd=16)).state_dict()
    a, b, c = state(3), state(3), state(4)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["wte.weight"], c["wte.weight"])


def test_init_weights_without_layers_that_add():
    layers = nn.Sequential(nn.Linear(400, 400), nn.Embedding(400, 400))
    init_weights(layers)
    assert all(abs(m.weight.std() - 0.02) < 1e-3 for m in layers) and not layers[0].bias.any()


def test_dropout_where_the_card_has_it():
    model = make("gpt2", dropout=0.5, n_embd=32)
    where = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout)]
    assert where == ["drop", "blocks.0.ffwd.net.3", "blocks.1.ffwd.net.3"]
    ids = some_ids(model)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("changes,says", [
    (dict(n_head=3), "n_embd=128 is not divisible by n_head=3"), (dict(vocab_size=0), "vocab_size=0"),
    (dict(n_layer=-1), "n_layer=-1"), (dict(block_size=1.5), "block_size=1.5"), (dict(n_embd=True), "n_embd=True"),
    (dict(n_embd="128"), "n_embd='128'"), (dict(dropout=1.0), "dropout=1.0"), (dict(dropout=-0.1), "dropout=-0.1"),
    (dict(init="zero"), "choose 'gpt2' or 'flux'"), (dict(norm_eps=0), "norm_eps=0"), (dict(n_heads=4), "'n_heads'")])
def test_impossible_configs(changes, says):
    with pytest.raises(ValueError, match=says): GPTConfig.from_dict(changes)


def test_config_round_trip():
    for c in (GPTConfig(), GPTConfig.legacy(n_layer=3), GPTConfig(bias=True, dropout=0.2)):
        assert GPTConfig.from_dict(c.to_dict()) == c and "arch" not in c.to_dict()
    assert GPTConfig.legacy(dropout=0.0).dropout == 0 and GPTConfig.legacy().norm_eps == 1e-10


def test_ids_need_two_axes():
    with pytest.raises(ValueError, match=r"\(B, T\) is needed"): GPT(GPTConfig())(torch.zeros(5, dtype=torch.long))


@torch.no_grad()
def test_rows_at_their_own_positions():
    "Rows of a batch may stand at different positions of the cache; shapes and values hold."
    model = make("gpt2", n_embd=32, block_size=24)
    ids, cache = some_ids(model, B=3), model.new_cache(3)
    full = model(ids)
    model(ids[:, :20], cache)
    cache.length = at = torch.tensor([20, 3, 11])
    for _ in range(3):
        step = ids.gather(1, at[:, None])
        torch.testing.assert_close(model(step, cache)[:, 0], full[torch.arange(3), at], rtol=1e-4, atol=1e-4)
        at = at + 1
        assert cache.length.equal(at)


def test_bf16_autocast_learns():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_embd=32, block_size=16))
    ids = some_ids(model, B=4)
    opt, first = torch.optim.AdamW(model.parameters(), lr=1e-2), None
    for _ in range(120):
        with torch.autocast("cpu", torch.bfloat16): logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        first = first or loss.item()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert abs(first - math.log(28)) < 0.2 and loss.item() < 0.1 * first


def test_traced_whole():
    "`torch.compile` sees one graph: nothing in the forward pass asks the device for a number."
    model = make("gpt2", n_embd=16, block_size=16)
    fast, ids = torch.compile(model, backend="eager", fullgraph=True), some_ids(model)
    torch.testing.assert_close(fast(ids), model(ids))
    with torch.no_grad():
        cache = model.new_cache(2)
        parts = [fast(ids[:, :5], cache)] + [fast(ids[:, t:t + 1], cache) for t in range(5, 16)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-4)


def test_no_host_synchronisation_and_any_device():
    "On the meta device there are shapes and no values: what needs a value would fail."
    model = GPT(GPTConfig()).to("meta")
    ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
    assert model(ids).shape == (2, 9, 28)
    cache = model.new_cache(2)
    assert cache.layers[0].k.device.type == "meta"
    model(ids, cache)
    assert model(ids[:, :1], cache).shape == (2, 1, 28) and cache.length == 10


@torch.no_grad()
def test_capture_shows_the_last_pass_and_cleans_up():
    model = make("gpt2", n_embd=16, block_size=16)
    a, b = some_ids(model, T=5), some_ids(model, T=7)
    with capture(model) as outer:
        model(a)
        with capture(model) as inner: model(b)
        assert inner.attention.shape == (2, 2, 4, 7, 7)
        model(a)
    assert outer.attention.shape == (2, 2, 4, 5, 5) and outer.residual.shape == (3, 2, 5, 16)
    torch.testing.assert_close(outer.attention.sum(-1), torch.ones(2, 2, 4, 5))
    with pytest.raises(KeyError), capture(model): raise KeyError
    assert not any("observe" in m.__dict__ for m in model.modules()) and not model._forward_pre_hooks


@torch.no_grad()
def test_capture_with_a_cache_and_compiled():
    model = make("gpt2", n_embd=16, block_size=16)
    ids, cache = some_ids(model), model.new_cache(2)
    model(ids[:, :9], cache)
    with capture(model) as seen: model(ids[:, 9:10], cache)
    with capture(model) as whole: model(ids[:, :10])
    torch.testing.assert_close(seen.attention[..., 0, :], whole.attention[..., 9, :])
    fast = torch.compile(model, backend="eager")
    fast(ids)
    with capture(fast) as seen: fast(ids)
    assert seen.attention.shape == (2, 2, 4, 16, 16)


def test_another_package_can_add_a_model(monkeypatch):
    class Other(GPT): arch = "other"
    entry = SimpleNamespace(name="other", load=lambda: Other)
    monkeypatch.setattr(gpt, "entry_points", lambda group: [entry] if group == "microjulia.models" else [])
    assert arch_names() == [*gpt.ARCHS, "other"] and find_model("other") is Other
    assert isinstance(build_model("other", dict(n_embd=16)), Other)
    with pytest.raises(ValueError, match="unknown architecture 'none'; known: gpt2.*other"): find_model("none")


def test_nothing_is_imported_before_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(gpt.ARCHS, "later", "microjulia.no_such_module:Model")
    assert "later" in arch_names() and find_model("gpt2") is GPT
    with pytest.raises(ModuleNotFoundError, match="no_such_module"): find_model("later")
