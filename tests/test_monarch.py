"Monarch matrices against loops, their masked form against the realised one, decoding, counts."
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microjulia.family.monarch import (CausalConv, History, HistoryCache, Monarch, MonarchConfig, MonarchMixer, MonarchSLM,
                                       ask, causal_monarch, monarch_matrix, side)
from microjulia.gpt import capture, config_for


def loops(L1, L2, order):
    "The entry of every pair of positions, one by one; blocks stored [block, from, to]."
    p = len(L1)
    place = (lambda a, b: a + p * b) if order == "julia" else (lambda a, b: a * p + b)
    M = np.zeros((p * p, p * p))
    for a in range(p):
        for b in range(p):
            for a2 in range(p):
                for b2 in range(p):
                    M[place(a2, b2), place(a, b)] = L1[a2, b, b2] * L2[b, a, a2]
    return M


@pytest.mark.parametrize("order", ["julia", "torch"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_einsum_is_the_double_loop(p, order):
    torch.manual_seed(p)
    L1, L2 = torch.randn(2, 3, p, p, p, dtype=torch.float64)
    for i, M in enumerate(monarch_matrix(L1, L2, order)):
        np.testing.assert_allclose(M.numpy(), loops(L1[i].numpy(), L2[i].numpy(), order), atol=1e-12)


def test_formula_of_the_original():
    "M[(a',b'),(a,b)] = L1[b',b,a'] L2[a',a,b] with Julia's column-major arrays, which arrive with their axes reversed."
    p, rng = 4, np.random.default_rng(0)
    J1, J2 = rng.normal(size=(2, p, p, p))
    M = np.zeros((p, p, p, p))
    for a2, b2, a, b in np.ndindex(p, p, p, p): M[b2, a2, b, a] = J1[b2, b, a2] * J2[a2, a, b]
    L1, L2 = (torch.from_numpy(np.ascontiguousarray(J.transpose(2, 1, 0)))[None] for J in (J1, J2))
    np.testing.assert_allclose(monarch_matrix(L1, L2)[0].numpy(), M.reshape(p * p, p * p), atol=1e-12)


def test_orders_differ_by_a_renaming_that_the_mask_forbids():
    torch.manual_seed(0)
    L1, L2 = torch.randn(2, 1, 4, 4, 4)
    julia, port = (monarch_matrix(L1, L2, order)[0] for order in ("julia", "torch"))
    rename = torch.arange(16).view(4, 4).T.flatten()
    assert torch.equal(port, julia[rename][:, rename])
    assert not torch.allclose(port.tril(), julia.tril()[rename][:, rename])


@settings(deadline=None, max_examples=40)
@given(p=st.integers(1, 6), nh=st.integers(1, 3), first=st.integers(0, 5), last=st.integers(1, 6), seed=st.integers(0, 99))
def test_causal_monarch_is_the_masked_matrix(p, nh, first, last, seed):
    first, last = min(first, p - 1), min(last, p)
    if first >= last: return
    torch.manual_seed(seed)
    L1, L2 = torch.randn(2, nh, p, p, p, dtype=torch.float64)
    x = torch.randn(nh, p, p, 5, dtype=torch.float64)
    slow = (monarch_matrix(L1, L2).tril() @ x.flatten(1, 2)).view(x.shape)
    _, z = causal_monarch(L1, L2, x)
    y, handed = causal_monarch(L1, L2, x[:, first:last], z[:, :first] if first else None)
    torch.testing.assert_close(y, slow[:, first:last])
    torch.testing.assert_close(handed, z[:, first:last])


@pytest.mark.parametrize("order", ["julia", "torch"])
def test_gradients_are_those_of_the_realised_form(order):
    torch.manual_seed(0)
    mix, u = Monarch(6, 3, 25, order).double(), torch.randn(2, 18, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 18, 6, dtype=torch.float64)
    slow = torch.einsum("hts,bshc->bthc", mix.matrix()[:, :18, :18], u.view(2, 18, 3, 2)).reshape(2, 18, 6)
    inputs = [u, mix.L1, mix.L2]
    for a, b in zip(torch.autograd.grad((mix(u) * weight).sum(), inputs),
                    torch.autograd.grad((slow * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", ["julia", "torch"])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_portions_give_the_whole(order, data):
    "Pieces of any size, cropping back now and then, end in the same results."
    torch.manual_seed(0)
    mixer, T = MonarchMixer(6, 2, 16, 3, order).double().eval(), 16
    u = torch.randn(2, T, 6, dtype=torch.float64)
    cache = History(torch.zeros(2, T, 6, dtype=torch.float64), mixer.monarch.new_history(2, 6))
    with torch.no_grad():
        full, at = mixer(u), 0
        for _ in range(data.draw(st.integers(1, 8))):
            n = data.draw(st.integers(1, T - at)) if at < T else 0
            if n: torch.testing.assert_close(mixer(u[:, at:at + n], cache, at), full[:, at:at + n])
            at = data.draw(st.integers(0, at + n))
            other = torch.randn(2, T - at, 6, dtype=torch.float64)
            if len(other[0]): mixer(other[:, :3], cache, at)  # overwritten by what comes next


@pytest.mark.parametrize("order", ["julia", "torch"])
def test_rows_at_different_places(order):
    torch.manual_seed(0)
    model = MonarchSLM(MonarchConfig(n_layer=2, n_embd=12, n_head=3, block_size=16, monarch_order=order)).double().eval()
    ids = torch.randint(28, (3, 16))
    with torch.no_grad():
        full, cache = model(ids), model.new_cache(3)
        model(ids[:, :9], cache)
        cache.length = torch.tensor([9, 4, 7])
        for _ in range(3):
            at = cache.length
            new = torch.stack([ids[i, at[i]:at[i] + 2] for i in range(3)])
            logits = model(new, cache)
            for i in range(3): torch.testing.assert_close(logits[i], full[i, at[i]:at[i] + 2])
            assert torch.equal(cache.length, at + 2)


def test_matrix_is_realised_once_a_generation():
    model = MonarchSLM(MonarchConfig(n_layer=2, n_embd=8, n_head=2, block_size=16, monarch_order="torch")).eval()
    made = []
    for block in model.blocks:
        plain = block.mixer.monarch.matrix
        block.mixer.monarch.matrix = lambda plain=plain: made.append(1) or plain()
    with torch.no_grad():
        cache = model.new_cache()
        for t in range(12): model(torch.full((1, 1), t), cache)
    assert len(made) == 2


def test_julias_order_makes_no_matrix():
    model = MonarchSLM(MonarchConfig(n_layer=1, n_embd=8, n_head=2, block_size=16)).eval()
    def never(): raise AssertionError("a matrix was made")
    model.blocks[0].mixer.monarch.matrix = never
    with torch.no_grad():
        cache = model.new_cache()
        model(torch.zeros(1, 5, dtype=torch.long), cache)
        model(torch.zeros(1, 1, dtype=torch.long), cache)
        model(torch.zeros(1, 16, dtype=torch.long))


def test_convolution():
    torch.manual_seed(0)
    conv, u = CausalConv(5, 4), torch.randn(2, 9, 5)
    with torch.no_grad():
        for t in range(9):
            slow = sum(u[:, t - 3 + k] * conv.weight[:, 0, k] for k in range(4) if t - 3 + k >= 0)
            torch.testing.assert_close(conv(u)[:, t], slow)
            torch.testing.assert_close(conv(u, 1 + 8 - t)[:, 0], slow)
            torch.testing.assert_close(conv.step(u, torch.tensor([t, t])), slow)


def test_mixer_is_the_formula():
    torch.manual_seed(0)
    mixer, u = MonarchMixer(8, 2, 16), torch.randn(2, 16, 8)
    mixer.gate.data = torch.randn(8)
    with torch.no_grad():
        for i in range(2):
            mine = slice(4 * i, 4 * i + 4)
            slow = mixer.gate.sigmoid()[mine] * (mixer.conv(u)[..., mine] + mixer.monarch.matrix()[i] @ u[..., mine])
            torch.testing.assert_close(mixer(u)[..., mine], slow)


def test_ask_of_a_single_position_for_all_rows():
    conv, u = CausalConv(3), torch.randn(2, 6, 3)
    cache = History(torch.zeros(2, 9, 3))
    with torch.no_grad():
        ask([conv], u[:, :5], cache, 0)
        torch.testing.assert_close(ask([conv], u[:, 5:], cache, 5)[0], conv(u, 1))


def test_counts():
    assert MonarchSLM(config_for("monarchslm", "5m", vocab_size=2000)).num_params() == 4_983_040
    assert sum(p.numel() for p in MonarchMixer(256, 8, 256).parameters()) == 66_816
    assert 0.9e6 < MonarchSLM(config_for("monarchslm", "1m", vocab_size=2000)).num_params() < 1.1e6


@pytest.mark.parametrize("V,C,L,T,nh,K", [(28, 64, 1, 64, 4, 3), (300, 96, 3, 144, 6, 5)])
def test_count_formula(V, C, L, T, nh, K):
    model = MonarchSLM(MonarchConfig(vocab_size=V, n_embd=C, n_layer=L, block_size=T, n_head=nh, conv_kernel=K))
    f = max(64, 64 * (round(8 * C / 3) // 64))
    assert model.num_params() == V * C + L * (K * C + 2 * nh * math.isqrt(T) ** 3 + C + 3 * C * f + 2 * C) + C


def test_starts():
    torch.manual_seed(0)
    default, legacy = (MonarchSLM(make(n_layer=2, n_embd=128, n_head=4)) for make in (MonarchConfig, MonarchConfig.legacy))
    for model, size in ((default, 0.1), (legacy, 1)):
        block = model.blocks[0].mixer
        assert abs(block.monarch.L1.std() * 4 / size - 1) < 0.05 and abs(block.monarch.L2.std() * 4 - 1) < 0.05
        assert abs(block.conv.weight.std() * 2 - 1) < 0.1 and not block.gate.any()
    assert 0 <= legacy.wte.weight.min() < 0.01 and 0.99 < legacy.wte.weight.max() <= 1
    w = legacy.blocks[0].ffwd.w_up.weight
    assert abs(w.std() / math.sqrt(2 / sum(w.shape)) - 1) < 0.02


def test_looking_inside():
    model = MonarchSLM(MonarchConfig(n_layer=3, n_embd=8, n_head=2, block_size=16)).eval()
    with torch.no_grad(), capture(model) as seen: model(torch.zeros(1, 10, dtype=torch.long))
    assert [g.shape for g in seen["gate"]] == [(8,)] * 3 and [m.shape for m in seen["mixing"]] == [(2, 10, 10)] * 3
    assert seen.residual.shape == (4, 1, 10, 8) and not seen["mixing"][0].triu(1).any()


def test_cache_counts_its_memory():
    model = MonarchSLM(MonarchConfig(n_layer=2, n_embd=8, n_head=2, block_size=16))
    cache = model.new_cache(3)
    assert isinstance(cache, HistoryCache) and cache.nbytes == 2 * 2 * 3 * 16 * 8 * 4 and cache.batch_size == 3


@pytest.mark.parametrize("field,value,says", [
    ("block_size", 200, "196 or 225"), ("n_head", 7, "multiple"), ("monarch_order", "c", "'julia' or 'torch'"),
    ("init", "flux", "'gpt2' or 'lux'"), ("dropout", 1.0, "dropout"), ("norm_eps", 0, "norm_eps"),
    ("conv_kernel", 0, "conv_kernel")])
def test_impossible_configs(field, value, says):
    with pytest.raises(ValueError, match=says): MonarchConfig(**{field: value})


@pytest.mark.parametrize("n", [1, 4, 9, 16384])
def test_side(n): assert side(n) ** 2 == n


def test_dropout_only_while_training():
    torch.manual_seed(0)
    model = MonarchSLM(MonarchConfig(n_layer=1, n_embd=16, n_head=2, block_size=16, dropout=0.5))
    ids = torch.zeros(1, 16, dtype=torch.long)
    assert not torch.equal(model(ids), model(ids)) and torch.equal(model.eval()(ids), model(ids))


def test_committed_measurements():
    path = Path(__file__).resolve().parents[1] / "bench" / "results" / "monarch.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"256", "1024", "4096", "16384"} <= set(result["forward"]["Monarch"])
    assert result["slope"]["Monarch"] < result["slope"]["attention, bare"] < 2.2 and result["threads"] == 1
