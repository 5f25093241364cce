"The engine against nudging, against itself in scalars and against PyTorch; the twin against the family's table."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from microjulia.family.autograd import (Adam, Array, JuliaGPT, JuliaGPTConfig, Value, ancestry, cross_entropy,
                                        engine_tensors, fit, from_engine, micro_gpt, numeric_grad, rms, softmax,
                                        start_weights, to_engine)
from microjulia.gpt import config_for


def gradients(model):
    "PyTorch's gradients under the engine's names."
    grads = {}
    for name, t in engine_tensors(model).items():
        if t.is_leaf: grads[name] = t.grad.numpy()
    for i, b in enumerate(model.blocks):
        grads |= {f"layer{i}.attn_w{n}": g.numpy() for n, g in zip("qkv", b.attn.qkv.weight.grad.chunk(3), strict=True)}
    return grads


def pair(seed=0, B=3, **config):
    "A twin in float64, its weights for the engine, and a batch."
    torch.manual_seed(seed)
    model = JuliaGPT(JuliaGPTConfig(**dict(vocab_size=11, block_size=7, n_embd=12, init="micro") | config)).double()
    ids = np.random.default_rng(seed).integers(model.config.vocab_size, size=(B, model.config.block_size + 1))
    return model, to_engine(model), ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("embedding_norm", [True, False])
@pytest.mark.parametrize("n_layer,n_head", [(1, 1), (1, 4), (3, 2)])
def test_gradients_are_pytorchs(n_layer, n_head, embedding_norm):
    model, w, x, y = pair(n_layer=n_layer, n_head=n_head, embedding_norm=embedding_norm)
    logits = micro_gpt(w, x, n_head, embedding_norm)
    loss = cross_entropy(logits, y)
    loss.backward()
    theirs = model(torch.from_numpy(x))
    np.testing.assert_allclose(logits.data, theirs.detach().numpy(), atol=1e-10)
    F.cross_entropy(theirs.flatten(0, 1), torch.from_numpy(y).flatten()).backward()
    grads = gradients(model)
    assert set(grads) == set(w) and len(w) == 3 + 6 * n_layer
    for name, g in grads.items(): np.testing.assert_allclose(w[name].grad, g, atol=1e-6, err_msg=name)


def test_gradients_in_float32():
    model, w, x, y = pair(n_layer=2, n_head=4)
    small = {n: Array(a.data.astype(np.float32)) for n, a in w.items()}
    for weights in (w, small): cross_entropy(micro_gpt(weights, x), y).backward()
    for n, a in small.items():
        assert a.grad.dtype == np.float32
        np.testing.assert_allclose(a.grad, w[n].grad, atol=1e-6)


@pytest.mark.parametrize("detach_keys", [False, True])
def test_detached_keys(detach_keys):
    "The defect cuts off keys and values, and nothing of the forward pass shows it."
    _, w, x, y = pair(n_layer=2)
    loss = cross_entropy(micro_gpt(w, x, detach_keys=detach_keys), y)
    loss.backward()
    untouched = {n for n, a in w.items() if a.grad is None or not a.grad.any()}
    assert untouched == ({f"layer{i}.attn_w{n}" for i in (0, 1) for n in "kv"} if detach_keys else set())
    assert loss.data == cross_entropy(micro_gpt(w, x), y).data


def test_detached_keys_as_pytorch_detaches():
    model, w, x, y = pair(n_head=4)
    cross_entropy(micro_gpt(w, x, detach_keys=True), y).backward()
    attn = model.blocks[0].attn
    detach = lambda m, i, out: torch.cat([out[..., :12], out[..., 12:].detach()], -1)
    with_hook = attn.qkv.register_forward_hook(detach)
    F.cross_entropy(model(torch.from_numpy(x)).flatten(0, 1), torch.from_numpy(y).flatten()).backward()
    with_hook.remove()
    grads = gradients(model)
    for name in ("wte", "wpe", "layer0.attn_wq", "layer0.attn_wo", "lm_head"):
        np.testing.assert_allclose(w[name].grad, grads[name], atol=1e-10)


def test_adam_is_pytorchs():
    model, w, x, y = pair()
    ours = Adam(w, lr=0.02)
    theirs = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.85, 0.99))
    for _ in range(15):
        cross_entropy(micro_gpt(w, x), y).backward()
        ours.step()
        theirs.zero_grad()
        F.cross_entropy(model(torch.from_numpy(x)).flatten(0, 1), torch.from_numpy(y).flatten()).backward()
        theirs.step()
    for n, t in engine_tensors(model).items(): np.testing.assert_allclose(w[n].data, t.detach().numpy(), atol=1e-8)


shapes = st.sampled_from([(), (1,), (3,), (2, 1), (2, 3), (4, 2, 3), (4, 1, 1)])

@settings(deadline=None, max_examples=40)
@given(shapes, shapes, st.integers(0, 5))
def test_broadcasting(a, b, seed):
    try: np.broadcast_shapes(a, b)
    except ValueError: return
    rng = np.random.default_rng(seed)
    x, y = Array(rng.normal(size=a)), Array(rng.uniform(0.5, 2, size=b))
    tx, ty = (torch.tensor(v.data, requires_grad=True) for v in (x, y))
    ((x * y - x / y) ** 2.0).sum().backward()
    ((tx * ty - tx / ty) ** 2).sum().backward()
    np.testing.assert_allclose(x.grad, tx.grad.numpy(), atol=1e-10)
    np.testing.assert_allclose(y.grad, ty.grad.numpy(), atol=1e-10)


@pytest.mark.parametrize("a,b", [((3,), (3,)), ((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((5, 2, 3), (5, 3, 2)),
                                 ((2, 1, 2, 3), (4, 3, 2))])
def test_matmul(a, b):
    rng = np.random.default_rng(0)
    x, y = Array(rng.normal(size=a)), Array(rng.normal(size=b))
    if len(a) == 1: x, y = x.reshape(1, 3), y.reshape(3, 1)
    tx, ty = (torch.tensor(v.data, requires_grad=True) for v in (x, y))
    weight = rng.normal(size=(x.data @ y.data).shape)
    ((x @ y) * weight).sum().backward()
    ((tx @ ty) * torch.from_numpy(weight)).sum().backward()
    np.testing.assert_allclose(x.grad, tx.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(y.grad, ty.grad.numpy(), atol=1e-12)


def test_used_twice_adds_up():
    x = Array([2.0, 3.0])
    (x * x + x).sum().backward()
    np.testing.assert_allclose(x.grad, [5, 7])
    assert np.array_equal(fit(np.ones((2, 4, 3)), (4, 1)), np.full((4, 1), 6.0))


def test_gradients_of_several_losses_add_up_until_forgotten():
    w = {"a": Array([1.0, 2.0])}
    for _ in range(2): (w["a"] * 3.0).sum().backward()
    assert np.array_equal(w["a"].grad, [6, 6])
    Adam(w).step()
    assert w["a"].grad is None


def test_masked_scores_have_no_gradient():
    x = Array(np.array([[1.0, 2.0, 3.0]]))
    y = softmax(x + np.array([[0, 0, -np.inf]]))
    (y * np.array([[1.0, 5.0, 9.0]])).sum().backward()
    assert y.data[0, 2] == 0 and x.grad[0, 2] == 0 and np.isfinite(x.grad).all()


def test_large_scores_do_not_overflow():
    x = Array(np.array([[1e4, 0.0, -1e4]]))
    loss = cross_entropy(x, np.array([0]))
    loss.backward()
    assert loss.data == 0 and np.isfinite(x.grad).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.integers(0, 4))
def test_scalars_are_arrays_of_one(scores, right):
    right %= len(scores)
    v = [Value(s) for s in scores]
    total = sum((u.exp() for u in v), Value(0.0))
    loss = total.log() - v[right]
    loss.backward()
    x = Array(np.array([scores]))
    other = cross_entropy(x, np.array([right]))
    other.backward()
    assert math.isclose(loss.data, float(other.data), abs_tol=1e-9)
    np.testing.assert_allclose(x.grad[0], [u.grad for u in v], atol=1e-9)


def test_a_long_chain_needs_no_recursion():
    x = Value(1.0)
    y = x
    for _ in range(5000): y = y + 0.001
    y.backward()
    assert x.grad == 1 and len(ancestry(y)) == 10001


def test_numeric_grad_leaves_its_input():
    x = np.array([[1.0, -2.0], [0.5, 3.0]])
    g = numeric_grad(lambda: (x ** 3).sum(), x)
    np.testing.assert_allclose(g, 3 * x ** 2, atol=1e-6)
    assert np.array_equal(x, [[1.0, -2.0], [0.5, 3.0]])


def test_rms_is_torchs():
    x = np.random.default_rng(0).normal(size=(4, 6))
    np.testing.assert_allclose(rms(Array(x)).data, F.rms_norm(torch.from_numpy(x), (6,), eps=1e-5).numpy(), atol=1e-12)


@pytest.mark.parametrize("V,T,count", [(28, 256, 8_064), (29, 256, 8_096), (49, 256, 8_736), (28, 64, 4_992)])
def test_counts_of_micro_julia(V, T, count):
    assert sum(a.data.size for a in start_weights(V, T).values()) == count
    assert JuliaGPT(JuliaGPTConfig(vocab_size=V, block_size=T, n_embd=16)).num_params() == count


@pytest.mark.parametrize("size,count", [("large", 3_231_232), ("medium", 435_968), ("small", 70_528)])
def test_counts_of_juliagpt(size, count):
    assert JuliaGPT(config_for("juliagpt", size, vocab_size=39)).num_params() == count


def test_legacy_start():
    torch.manual_seed(0)
    model = JuliaGPT(JuliaGPTConfig.legacy(n_embd=128))
    for p in model.parameters(): assert abs(p.std().item() - 0.08) < 0.002


def test_weights_go_there_and_back():
    model, w, x, _ = pair(n_layer=2)
    other, *_ = pair(seed=5, n_layer=2)
    from_engine(other, w)
    for a, b in zip(model.parameters(), other.parameters(), strict=True): assert torch.equal(a, b)
    w["wte"].data[:] = 0
    assert model.wte.weight.any(), "the engine has copies of its own"


@pytest.mark.parametrize("field,value", [("n_head", 5), ("init", "flux"), ("n_layer", 0), ("block_size", 1.5)])
def test_impossible_configs(field, value):
    with pytest.raises(ValueError, match=field): JuliaGPTConfig(**{field: value})
