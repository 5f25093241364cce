"Steps by tensors, captured steps, steps left out, float16, and the faster forms beside the readable ones."
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from microjulia.corpus import Corpus
from microjulia.gpt import GPT, GPTConfig
from microjulia.scaling.fast import CapturedStep, MuonAdamW, TensorStep, fast_forward, orthogonalize
from microjulia.training import TrainConfig, Trainer, load_optimizer_tensors, optimizer_tensors

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CORPUS = Corpus.from_paths()


def trainer(device="cpu", dropout=.1, **config):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=dropout))
    t = Trainer(model, CORPUS, TrainConfig(**dict(steps=12, batch_size=8) | config), device=torch.device(device))
    t.model.train()
    return t


def losses(t, n=12): return [tuple(x.item() for x in t.train_step()) for _ in range(n)]


@pytest.mark.parametrize("config", [
    dict(optimizer="muon", dtype="float32"), dict(optimizer="adamw", dtype="float32"), dict(optimizer="muon", dtype="bfloat16"),
    dict(optimizer="muon", dtype="float32", grad_accum_steps=2, schedule="cosine")], ids=str)
def test_a_step_by_tensors_is_the_plain_step_to_the_bit(config):
    plain, by_tensors = trainer(**config), trainer(**config)
    by_tensors.take_step = TensorStep(by_tensors)
    assert losses(by_tensors) == losses(plain)
    assert all(torch.equal(a, b) for a, b in zip(by_tensors.model.parameters(), plain.model.parameters()))
    assert all(isinstance(g["lr"], float) for g in by_tensors.optimizer.param_groups)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_no_step_asks_the_device_for_a_value(dtype, optimizer, monkeypatch):
    t = trainer(dtype=dtype, optimizer=optimizer)
    t.tokens = torch.from_numpy(t.tokens.copy())
    step = TensorStep(t)
    t.train_step()
    def asked(*args): raise AssertionError("the step waits for a value")
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"): monkeypatch.setattr(torch.Tensor, name, asked)
    t.compute_step(step.number)


def state_of(t):
    tensors = [p.detach().clone() for p in t.model.parameters()]
    return tensors + [v.clone() for s in t.optimizer.state.values() for v in s.values()]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_changes_nothing(optimizer, dtype, poison):
    t = trainer(optimizer=optimizer, dtype=dtype)
    losses(t, 3)
    before, scale = state_of(t), t.scaler.get_scale()
    hook = next(t.model.blocks.parameters()).register_hook(lambda grad: grad * poison)
    t.train_step()
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(t)))
    assert t.scaler.get_scale() == (scale / 2 if dtype == "float16" else scale)
    t.train_step()
    assert not torch.equal(before[0], state_of(t)[0])


def test_float16_trains_with_its_own_orthogonalisation():
    t = trainer(steps=60, dtype="float16", dropout=0.)
    t.optimizer.dtype = torch.float16
    found = losses(t, 60)
    same = losses(trainer(steps=60, dtype="float32", dropout=0.), 60)
    assert found[-1][0] < found[0][0] - .5 and abs(found[-1][0] - same[-1][0]) < .1


@pytest.mark.parametrize("shape", [(4, 4), (3, 8, 32), (2, 32, 8), (1, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonalize_is_the_plain_iteration(shape, dtype):
    torch.manual_seed(0)
    G = 1e-6 * torch.randn(shape)
    X = (G.mT if shape[-2] > shape[-1] else G).double()
    X = X / X.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    X = X.mT if shape[-2] > shape[-1] else X
    got = orthogonalize(G, dtype=dtype)
    assert got.shape == G.shape and got.dtype == G.dtype
    assert (got - X).norm() / X.norm() < .2


def test_the_models_own_form_comes_back_after_an_error():
    model = GPT(GPTConfig(block_size=8))
    with pytest.raises(ValueError): fast_forward(model, torch.bfloat16)(torch.zeros(1, 9, dtype=torch.long))
    assert model.blocks[0].ffwd.net[1].approximate == "tanh"


def test_weight_decay_of_muon_and_plain_rates():
    W = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = MuonAdamW([dict(params=[W], muon=True, parts=1, weight_decay=.5)], lr=.1)
    W.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.allclose(W, torch.full((4, 4), .95))


def test_a_graph_without_a_card_is_an_error():
    with pytest.raises(ValueError, match="CUDA device"): trainer(graph=True)


class PretendedGraph:
    "What the tests below need of `torch.cuda`: a recording computes nothing, a replay computes the step anew."
    recordings = 0
    def __init__(self): PretendedGraph.recordings += 1

    @staticmethod
    @contextmanager
    def record(graph, stream):
        t, kept, drawn = graph.step.trainer, state_of(graph.step.trainer), torch.get_rng_state()
        yield
        torch.set_rng_state(drawn)
        for now, before in zip([*t.model.parameters(), *(v for s in t.optimizer.state.values() for v in s.values())], kept):
            with torch.no_grad(): now.copy_(before)

    def replay(self):
        for held, new in zip(self.step.results, self.step.trainer.compute_step(self.step.number)): held.copy_(new)


@pytest.fixture
def pretended(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(Stream=lambda device: stream, current_stream=lambda: stream, stream=lambda s: nullcontext(),
                            graph=PretendedGraph.record, CUDAGraph=PretendedGraph).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(PretendedGraph, "recordings", 0)
    def captured(t):
        t.take_step = PretendedGraph.step = CapturedStep(t)
        for group in t.optimizer.param_groups: group["capturable"] = False        # a CPU has no such form
        return t
    return captured


def test_the_order_of_a_capture_without_a_card(pretended):
    plain, captured = trainer(dtype="float32"), pretended(trainer(dtype="float32"))
    found = losses(captured)
    assert found == losses(plain) and PretendedGraph.recordings == 1
    assert len({loss for loss, _ in found}) > 10                                  # each its own copy, not the last


def test_exchanged_memory_is_recorded_anew(pretended):
    plain, captured = trainer(dtype="float32", steps=24), pretended(trainer(dtype="float32", steps=24))
    for t in (plain, captured):
        losses(t, 8)
        load_optimizer_tensors(t.model, t.optimizer, optimizer_tensors(t.model, t.optimizer))
    assert losses(captured) == losses(plain) and PretendedGraph.recordings == 2


@gpu
@pytest.mark.parametrize("dtype", ["float32", "auto", "float16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_captured_step_is_the_plain_step(dtype, optimizer):
    config = dict(device="cuda", dtype=dtype, optimizer=optimizer, steps=20)
    plain, captured = losses(trainer(**config), 20), losses(trainer(**config, graph=True), 20)
    for a, b in zip(plain, captured): assert a == pytest.approx(b, rel=2e-3)


@gpu
def test_a_captured_step_goes_on_with_memory_that_was_exchanged():
    config = dict(device="cuda", dtype="float32", steps=20)
    a, b = trainer(**config), trainer(**config, graph=True)
    for t in (a, b):
        losses(t, 8)
        load_optimizer_tensors(t.model, t.optimizer, optimizer_tensors(t.model, t.optimizer))
    for x, y in zip(losses(a, 8), losses(b, 8)): assert x == pytest.approx(y, rel=2e-3)


@gpu
def test_a_captured_step_leaves_out_what_overflows():
    t = trainer(device="cuda", dtype="float16", graph=True, steps=20)
    losses(t, 6)
    t.scaler._scale.fill_(2.**40)                            # the scaled loss has no place in float16
    before = state_of(t)
    t.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(t))) and t.scaler.get_scale() == 2.**39
