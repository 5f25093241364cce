"The long convolution against sums, the gate, every variant's count, decoding with all organelles, ablation."
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_contract import TOLERANCE
from torch.nn import functional as F

from microjulia.family.symbio import (ORGANELLES, AttentionOrganelle, LongConv, SymbioConfig, SymbioMixer, SymbioSLM, ablate,
                                      gate_entropy)
from microjulia.gpt import build_model, capture, config_for


def small(**changes):
    "A small model with all organelles in float64, its gates not all equal."
    torch.manual_seed(0)
    config = SymbioConfig(**dict(n_layer=2, n_embd=16, n_head=2, head_size=8, block_size=16, organelles=ORGANELLES) | changes)
    model = SymbioSLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters(): p += 0.1 * torch.randn_like(p)
    return model


@settings(deadline=None, max_examples=40)
@given(block=st.integers(1, 40), data=st.data(), flip=st.booleans())
def test_fft_is_the_sum(block, data, flip):
    S = data.draw(st.integers(1, block))
    T = data.draw(st.integers(1, S))
    torch.manual_seed(S)
    conv, u = LongConv(3, block, flip).double(), torch.randn(2, S, 3, dtype=torch.float64)
    w = conv.weight if flip else conv.weight.flip(-1)
    slow = torch.stack([sum(w[:, j] * u[:, t - j] for j in range(t + 1)) for t in range(S)], 1)
    torch.testing.assert_close(conv(u, T), slow[:, S - T:])
    room = torch.cat([u, torch.randn(2, block - S, 3)], 1)
    torch.testing.assert_close(conv.step(room, torch.full((2,), S - 1)), slow[:, -1])


def test_impulse_decays_after_it_and_not_before():
    conv = LongConv(1, 8)
    conv.weight.data = 0.5 ** torch.arange(8.)[None]
    u = torch.zeros(1, 8, 1)
    u[0, 3] = 1
    np.testing.assert_allclose(conv(u)[0, :, 0].detach(), [0, 0, 0, 1, .5, .25, .125, .0625], atol=1e-6)


def test_the_port_is_pytorchs_convolution():
    torch.manual_seed(0)
    conv, u = LongConv(4, 16, flip=False), torch.randn(2, 16, 4)
    theirs = F.conv1d(F.pad(u.mT, (15, 0)), conv.weight[:, None], groups=4).mT
    torch.testing.assert_close(conv(u), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flip,loudest", [(True, 0), (False, 63)])
def test_which_distance_starts_loudest(flip, loudest):
    torch.manual_seed(0)
    sizes = LongConv(512, 64, flip).kernel().abs().mean(0)
    assert abs(sizes.argmax() - loudest) < 4 and sizes[63 - loudest] < 0.02 * sizes.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_convolution_under_autocast(dtype):
    conv, u = LongConv(4, 16), torch.randn(1, 9, 4)
    assert conv(u.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16): assert conv(u).isfinite().all()


@pytest.mark.parametrize("config,count", [
    (dict(), 5_052_672),
    (dict(n_layer=6, n_head=4), 4_065_024),
    (dict(n_layer=6, n_head=8), 4_261_632),
    (dict(n_layer=6, n_head=8, gate_temperature=True, skip_gate=True), 4_261_650),
    (dict(n_layer=6, organelles=("conv", "attention", "longconv")), 5_441_280),
    (dict(n_embd=320, organelles=ORGANELLES, gate_temperature=True, skip_gate=True), 11_053_400),
    (dict(n_layer=6, organelles=[["conv"]] + [["conv", "attention"]] * 5, gate_temperature=True, skip_gate=True), 4_784_146),
    (dict(n_embd=64, n_layer=3, organelles=["conv"], gate_temperature=True, skip_gate=True), 203_145),
    (dict(n_embd=64, n_layer=3, organelles=["attention"], gate_temperature=True, skip_gate=True), 251_529),
    (dict(n_embd=64, n_layer=3, organelles=["monarch"], gate_temperature=True, skip_gate=True), 226_953),
    (dict(n_embd=128, n_layer=3, organelles=["conv", "monarch", "attention"], gate_temperature=True, skip_gate=True), 849_417)])
def test_counts_of_the_family_table(config, count):
    assert SymbioSLM(SymbioConfig(vocab_size=2000, **config)).num_params() == count


@pytest.mark.parametrize("size,count", [("5m", 5_052_672), ("5m-attention", 5_441_280), ("4m", 4_065_024), ("4m-8", 4_261_650),
                                        ("10m", 11_053_400), ("student", 4_784_146)])
def test_sizes_by_name(size, count):
    config = config_for("symbioslm", size, vocab_size=2000)
    assert SymbioSLM(config).num_params() == count
    assert SymbioConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "batch_size" in SymbioSLM.sizes[size]


VARIANTS = [dict(), dict(organelles=("conv",)), dict(organelles=("longconv", "attention"), block_size=15),
            dict(organelles=[["conv"], ["attention", "monarch"]]), dict(conv_flip=False, monarch_order="torch"),
            dict(gate_temperature=True, skip_gate=True)]

@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_decoding_and_causality_of_every_variant(changes):
    model = small(**changes)
    T = model.config.block_size
    ids = torch.randint(28, (2, T))
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 1) % 28
    with torch.no_grad():
        full = model(ids)
        torch.testing.assert_close(model(other)[:, :9], full[:, :9])
        for portions in ([T], [1] * T, [7, 1, 1, T - 9], [T - 1, 1]):
            cache, at = model.new_cache(2), 0
            for n in portions:
                torch.testing.assert_close(model(ids[:, at:at + n], cache), full[:, at:at + n])
                at += n


def test_rows_at_different_places():
    model = small()
    ids = torch.randint(28, (3, 16))
    with torch.no_grad():
        full, cache = model(ids), model.new_cache(3)
        model(ids[:, :10], cache)
        cache.length = torch.tensor([10, 4, 7])
        for _ in range(3):
            at = cache.length
            logits = model(torch.stack([ids[i, at[i]:at[i] + 2] for i in range(3)]), cache)
            for i in range(3): torch.testing.assert_close(logits[i], full[i, at[i]:at[i] + 2])


def test_cropping_goes_back():
    model = small()
    a, b = torch.randint(28, (2, 2, 12))
    with torch.no_grad():
        cache = model.new_cache(2)
        model(a, cache)
        cache.crop(5)
        parts = [model(b[:, t:t + 1], cache) for t in range(5, 12)]
        torch.testing.assert_close(torch.cat(parts, 1), model(torch.cat([a[:, :5], b[:, 5:]], 1))[:, 5:])


def test_mixer_is_the_formula():
    model = small(gate_temperature=True)
    mixer, u = model.blocks[0].mixer, torch.randn(2, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.temperature.fill_(0.5)
        s = (mixer.gate / 0.5).softmax(0)
        slow = sum(s[i] * getattr(mixer, name)(u) for i, name in enumerate(mixer.names))
        torch.testing.assert_close(mixer(u), slow)
        mixer.temperature.fill_(-3)  # kept above 0.01
        assert mixer.shares().isfinite().all()


def test_skips_scale_both_halves():
    model = small(skip_gate=True, n_layer=1)
    block, x = model.blocks[0], torch.randn(1, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        block.skip1.fill_(0)
        block.skip2.fill_(0)
        assert torch.equal(block(x), x)
        block.skip2.fill_(2)
        torch.testing.assert_close(block(x), x + 2 * block.ffwd(block.ln2(x)))


def test_gates_start_equal():
    model = SymbioSLM(SymbioConfig(n_layer=2, n_embd=16, block_size=16))
    for b in model.blocks: torch.testing.assert_close(gate_entropy(b.mixer.shares()), torch.full((16,), math.log(3)))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(0, 99))
def test_entropy_lies_between_nothing_and_everything(n, seed):
    torch.manual_seed(seed)
    h = gate_entropy((5 * torch.randn(n, 8)).softmax(0))
    assert (h > -1e-6).all() and (h < math.log(n) + 1e-6).all()
    assert gate_entropy(torch.eye(n)).abs().max() == 0


@pytest.mark.parametrize("out", [("conv",), ("monarch", "attention"), ("conv", "monarch", "longconv")])
def test_ablation_is_the_gate_at_minus_ten_thousand_million(out):
    model = small()
    ids = torch.randint(28, (1, 16))
    with torch.no_grad():
        whole = model(ids)
        with ablate(model, *out): without = model(ids)
        torch.testing.assert_close(model(ids), whole)
        for b in model.blocks:
            for i, name in enumerate(ORGANELLES):
                if name in out: b.mixer.gate[i] = -1e10
        torch.testing.assert_close(model(ids), without)
    assert not torch.allclose(whole, without)


def test_ablating_all_leaves_the_feed_forward():
    model = small(organelles=[["conv"], ["conv", "attention"]])
    ids = torch.randint(28, (1, 16))
    with torch.no_grad(), ablate(model, "conv", "attention"), capture(model) as seen:
        assert model(ids).isfinite().all()
        assert not any(a.any() for a in seen["organelles"]) and not any(g.any() for g in seen["gate"])


def test_ablation_ends_when_something_goes_wrong():
    model = small()
    with pytest.raises(ZeroDivisionError), ablate(model, "conv"): raise ZeroDivisionError
    assert all(b.mixer.ablated == frozenset() for b in model.blocks)
    with pytest.raises(ValueError, match="it has attention, conv, longconv, monarch"), ablate(model, "ribosome"): pass


def test_looking_inside():
    model = small()
    with torch.no_grad(), capture(model) as seen: model(torch.randint(28, (2, 9)))
    assert [g.shape for g in seen["gate"]] == [(4, 16)] * 2 and seen["organelles"][0].shape == (4, 2, 9, 16)
    assert seen.attention.shape == (2, 2, 2, 9, 9) and seen["mixing"][0].shape == (2, 9, 9)
    inside = seen.residual[0] + seen["organelles"][0].sum(0)
    block = model.blocks[0]
    with torch.no_grad(): torch.testing.assert_close(inside + block.ffwd(block.ln2(inside)), seen.residual[1])


def test_attention_organelle_is_attention():
    torch.manual_seed(0)
    organelle, u = AttentionOrganelle(16, 8, 16).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(organelle(u), organelle.attn(u))
        assert organelle.attn.n_head == 2


def test_names_that_converters_use():
    names = {n.replace("blocks.0.", "") for n in SymbioSLM(SymbioConfig(n_layer=1)).state_dict()}
    assert {"mixer.conv.weight", "mixer.monarch.L1", "mixer.monarch.L2", "mixer.longconv.weight", "mixer.gate"} <= names


def test_rebuilt_from_json():
    model = small(organelles=[["conv"], ["attention", "longconv"]])
    again = build_model("symbioslm", json.loads(json.dumps(model.config.to_dict()))).double().eval()
    again.load_state_dict(model.state_dict())
    ids = torch.randint(28, (1, 16))
    torch.testing.assert_close(again(ids), model(ids), **TOLERANCE)


@pytest.mark.parametrize("changes,says", [
    (dict(organelles=["nucleus"]), "unknown organelle 'nucleus'"), (dict(organelles=[]), "at least one"),
    (dict(organelles=["conv", "conv"]), "none twice"), (dict(organelles=[["conv"]]), "1 layers, but n_layer=8"),
    (dict(block_size=17), "16 or 25"), (dict(n_head=3), "n_head=3"),
    (dict(organelles=["attention"], head_size=48), "head_size=48"),
    (dict(monarch_order="x"), "'julia' or 'torch'"), (dict(init="flux"), "'gpt2' or 'lux'"), (dict(dropout=-0.1), "dropout")])
def test_impossible_configs(changes, says):
    with pytest.raises(ValueError, match=says): SymbioConfig(**changes)


def test_without_monarch_any_context_will_do():
    model = SymbioSLM(SymbioConfig(n_layer=1, n_embd=16, block_size=23, organelles=["conv", "longconv"]))
    assert model(torch.zeros(1, 23, dtype=torch.long)).shape == (1, 23, 28)
    assert isinstance(model.blocks[0].mixer, SymbioMixer)
