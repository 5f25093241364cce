"The training loop: determinism, resume, lengths, recipes, interruption and bad input."
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from microjulia.checkpoint import best_whole, read_config, step_paths
from microjulia.corpus import Corpus
from microjulia.gpt import GPT, GPTConfig
from microjulia.training import (RECIPES, Interrupted, TrainConfig, Trainer, accumulation, activation_bytes, evaluate,
                                 lr_at, read_metrics, run_lock, steps_of, train)

torch.set_num_threads(1)
SHAPE = dict(vocab_size=28, n_layer=1, n_head=2, n_embd=16, block_size=16)


@pytest.fixture(scope="module")
def corpus(): return Corpus.from_paths()


def model(dropout=.2, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SHAPE, dropout=dropout))


def losses(history): return [(r["step"], r["loss"]) for r in history if r["kind"] == "train"]


class StopAt:
    "Sends a signal to this process when a step has been logged."
    def __init__(self, step, signum=signal.SIGTERM): self.step, self.signum = step, signum
    def log(self, record, step):
        if record["kind"] == "train" and step == self.step: signal.raise_signal(self.signum)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adam"])
@pytest.mark.parametrize("dropout", [0., .2])
@pytest.mark.parametrize("stop", [1, 7, 12])
def test_resume_is_equal_to_the_bit(corpus, tmp_path, dtype, optimizer, dropout, stop):
    config = TrainConfig(steps=14, dtype=dtype, optimizer=optimizer, log_interval=1, evals=4)
    whole_model, part = model(dropout), model(dropout)
    whole = train(whole_model, corpus, config)
    with pytest.raises(Interrupted) as stopped: train(part, corpus, config, tmp_path, [StopAt(stop)])
    assert stopped.value.saved == step_paths(tmp_path)[-1] and stopped.value.signum == signal.SIGTERM
    again = model(dropout, seed=5)
    history = train(again, corpus, config, tmp_path, resume=True)
    assert losses(history) == losses(whole)
    for (name, a), b in zip(whole_model.state_dict().items(), again.state_dict().values()): assert torch.equal(a, b), name
    assert losses(read_metrics(tmp_path / "metrics.jsonl")) == losses(whole)


@pytest.mark.parametrize("name", ["muon", "adamw", "adam"])
def test_every_parameter_is_in_one_group_and_moves(corpus, name):
    t = Trainer(model(0.), corpus, TrainConfig(steps=2, optimizer=name, warmup_iters=0))
    grouped = [id(p) for g in t.optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in t.model.parameters())
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.train_step()
    assert not [n for n, p in t.model.named_parameters() if torch.equal(p, before[n])]
    assert all(p.grad is None for p in t.model.parameters())


@pytest.mark.parametrize("name", ["muon", "adamw", "adam"])
def test_an_overflow_of_float16_changes_nothing(corpus, name):
    t = Trainer(model(0.), corpus, TrainConfig(steps=3, optimizer=name, dtype="float32", warmup_iters=0))
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.**16)
    t.train_step()
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    t.train_step()
    for n, p in t.model.named_parameters(): assert torch.equal(p, before[n]), n
    assert t.scaler.get_scale() == 2.**15 and all(p.grad is None for p in t.model.parameters())


def test_twice_resumed_is_equal(corpus, tmp_path):
    config = TrainConfig(steps=15, dtype="float32", log_interval=1)
    whole = train(model(), corpus, config)
    for stop in (4, 9):
        with pytest.raises(Interrupted): train(model(), corpus, config, tmp_path, [StopAt(stop, signal.SIGINT)], resume=True)
    assert losses(train(model(), corpus, config, tmp_path, resume=True)) == losses(whole)


def test_a_finished_run_resumes_to_more_steps_or_to_nothing(corpus, tmp_path):
    train(model(), corpus, TrainConfig(steps=5, dtype="float32"), tmp_path)
    done = train(model(), corpus, TrainConfig(steps=5, dtype="float32"), tmp_path, resume=True)
    assert max(r["step"] for r in done) == 5
    more = train(model(), corpus, TrainConfig(steps=8, dtype="float32"), tmp_path, resume=True)
    assert max(r["step"] for r in more) == 8


def test_a_long_run_is_ended_by_resuming_it_with_fewer_steps(corpus, tmp_path):
    config = dict(log_interval=1, evals=2, warmup_iters=2, warmdown_ratio=.5)
    whole, part = model(), model()
    history = train(whole, corpus, TrainConfig(steps=20, **config))
    with pytest.raises(Interrupted): train(part, corpus, TrainConfig(steps=1000, **config), tmp_path, [StopAt(8)])
    assert losses(train(part, corpus, TrainConfig(steps=20, **config), tmp_path, resume=True)) == losses(history)
    rates = [r["lr"] for r in history if r["kind"] == "train"]
    assert len(set(rates[2:11])) == 1 and rates[11] > rates[15] > rates[19] > 0
    for a, b in zip(whole.parameters(), part.parameters(), strict=True): assert torch.equal(a, b)


def test_seed_decides_the_run(corpus):
    config = TrainConfig(steps=6, dtype="float32", log_interval=1)
    one, two = train(model(), corpus, config), train(model(), corpus, config)
    assert losses(one) == losses(two)
    other = train(model(), corpus, TrainConfig(steps=6, dtype="float32", log_interval=1, seed=2))
    assert losses(one) != losses(other)


def test_training_leaves_the_callers_random_state_alone(corpus):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    m = GPT(GPTConfig(**SHAPE))
    torch.set_rng_state(before)
    train(m, corpus, TrainConfig(steps=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pieces", [2, 3, 16])
def test_accumulation_does_not_change_the_step(corpus, pieces):
    def run(n): return losses(train(model(0.), corpus, TrainConfig(
        steps=4, grad_accum_steps=n, dtype="float32", log_interval=1, optimizer="adamw")))
    for (_, a), (_, b) in zip(run(1), run(pieces)): assert a == pytest.approx(b, abs=1e-5)


def test_keeps_the_newest_and_the_best(corpus, tmp_path):
    # a rate so high that the loss rises again: the best checkpoint is an early one
    config = TrainConfig(steps=40, evals=20, keep=2, lr=.3, schedule="cosine", dtype="float32", min_lr=.3)
    history = train(model(0.), corpus, config, tmp_path)
    evals = {r["step"]: r["val_loss"] for r in history if r["kind"] == "eval" and r["step"]}
    best = min(evals, key=evals.get)
    assert [int(p.name[5:]) for p in step_paths(tmp_path)] == sorted({best, 38, 40})
    assert read_config(best_whole(tmp_path))["facts"]["val_loss"] == evals[best]


def test_minutes_end_on_time_and_bring_the_rate_down(corpus):
    history = train(model(), corpus, TrainConfig(minutes=.02, log_interval=1))
    rates = [r["lr"] for r in history if r["kind"] == "train"]
    assert history[-1]["progress"] == 1 and rates[-1] < .2 * max(rates)


def test_lengths():
    assert steps_of(TrainConfig(steps=7), 10**6, 128) == 7
    assert steps_of(TrainConfig(minutes=7), 10**6, 128) is None
    assert steps_of(TrainConfig(epochs=.5), 204_800, 128) == 50
    assert steps_of(TrainConfig(batch_size=64), 64 * 256 * 1000 + 5, 256) == 3000


def test_a_length_nobody_asked_for_is_cut(corpus):
    trainer = Trainer(model(), corpus, TrainConfig(max_minutes=.001))
    trainer.plan()
    assert trainer.steps < 500 and "three epochs" in trainer.history[-1]["text"]
    for config in (TrainConfig(steps=500, max_minutes=.001), TrainConfig(**RECIPES["card"]["train"])):
        asked = Trainer(model(), corpus, config)
        steps = asked.steps
        asked.plan()
        assert asked.steps == steps


def test_card_recipe_is_the_cards():
    c = TrainConfig(**RECIPES["card"]["train"])
    assert (c.optimizer, c.lr, c.min_lr, c.beta1, c.beta2, c.weight_decay, c.dtype, c.schedule) == (
        "adam", 3e-4, 1e-5, .9, .999, 0., "float32", "cosine")
    assert RECIPES["card"]["model"] == dict(dropout=.1, init="flux", norm_eps=1e-10)


def test_card_schedule(corpus):
    # lr(i) of the card: linear to w = min(200, N/10), then cosine from 3e-4 to 1e-5 over N - w
    t = Trainer(model(), corpus, TrainConfig(**RECIPES["card"]["train"], steps=1000))
    assert t.warmup() == 100
    for i in (0, 50, 99, 100, 400, 999):
        t.step = i
        want = 3e-4 * (i + 1) / 100 if i < 100 else 1e-5 + .5 * (1 + math.cos(math.pi * (i - 100) / 900)) * (3e-4 - 1e-5)
        assert t.lr(3e-4) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_never_leaves_its_bounds(schedule):
    for step in range(300):
        assert 0 <= lr_at(step, step / 250, 1., .1, 20, schedule) <= 1
    assert lr_at(10**6, 5., 1., .1, 20, schedule) == pytest.approx(.1)


@pytest.mark.parametrize("free", [10**6, 10**8, 10**9, 10**11])
def test_pieces_fit_or_are_single_windows(free):
    config = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256)
    n = accumulation(config, 64, free)
    assert n >= 64 or activation_bytes(config, math.ceil(64 / n)) <= .7 * free


def test_evaluate_is_the_mean_over_its_windows(corpus):
    m = model(.5)
    m.train()
    assert evaluate(m, corpus.val, 16, 64, batch_size=64) == pytest.approx(evaluate(m, corpus.val, 16, 64, batch_size=7))
    assert m.training


def test_a_run_that_diverges_says_so_and_keeps_no_bad_checkpoint(corpus, tmp_path):
    m = model()
    with torch.no_grad(): m.wte.weight[0] = math.nan
    with pytest.raises(ValueError, match="lower the learning rate"): train(m, corpus, TrainConfig(steps=5), tmp_path)
    assert not step_paths(tmp_path)


def test_text_shorter_than_a_block():
    with pytest.raises(ValueError, match="at least 17"):
        Trainer(model(), Corpus.from_texts({"short": "few words"}), TrainConfig())


def test_the_folder_is_locked(corpus, tmp_path):
    with run_lock(tmp_path), pytest.raises(ValueError, match="in use by another"):
        train(model(), corpus, TrainConfig(steps=2), tmp_path)
    code = f"from microjulia.training import run_lock\nwith run_lock({str(tmp_path)!r}): pass"
    with run_lock(tmp_path):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True).returncode


def test_resume_of_another_shape_or_text_is_refused(corpus, tmp_path):
    train(model(), corpus, TrainConfig(steps=2), tmp_path)
    wide = GPT(GPTConfig(**SHAPE | dict(n_embd=32)))
    with pytest.raises(ValueError, match="another shape"): train(wide, corpus, TrainConfig(steps=4), tmp_path, resume=True)
    other = Corpus.from_texts({"x": "a ship at sea. " * 200}, corpus.tokenizer)
    with pytest.raises(ValueError, match="other text"): train(model(), other, TrainConfig(steps=4), tmp_path, resume=True)


def test_damaged_checkpoints_are_never_a_silent_fresh_start(corpus, tmp_path):
    train(model(), corpus, TrainConfig(steps=2, evals=1), tmp_path)
    for path in step_paths(tmp_path):
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="whole"): train(model(), corpus, TrainConfig(steps=4), tmp_path, resume=True)


def test_metrics_survive_a_cut_line(corpus, tmp_path):
    train(model(), corpus, TrainConfig(steps=4, log_interval=1), tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-9])
    assert all(isinstance(r, dict) for r in read_metrics(file))
    train(model(), corpus, TrainConfig(steps=6, log_interval=1), tmp_path, resume=True)
    for line in file.read_text().splitlines(): json.loads(line)


@pytest.mark.parametrize("bad", [dict(steps=0), dict(minutes=-1), dict(lr=0), dict(dtype="float8"), dict(schedule="up"),
                                 dict(steps=1, epochs=1), dict(minutes=math.nan), dict(batch_size=0)])
def test_bad_configs(bad):
    with pytest.raises(ValueError): TrainConfig(**bad)


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind do not exist on Windows")
def test_a_second_signal_ends_at_once(corpus, tmp_path):
    class Twice(StopAt):
        def log(self, record, step):
            super().log(record, step)
            super().log(record, step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            train(model(), corpus, TrainConfig(steps=9, log_interval=1), tmp_path, [Twice(3, signal.SIGINT)])
    finally: signal.signal(signal.SIGINT, before)
    assert not isinstance(stop.value, Interrupted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "auto", "float32"])
def test_on_cuda(corpus, dtype):
    history = train(model(), corpus, TrainConfig(steps=60, dtype=dtype))
    assert history[-1]["val_loss"] < 3.2


def test_a_run_in_minutes_takes_the_faster_number_of_threads(corpus, monkeypatch):
    used = []
    class Watch(StopAt):
        def log(self, record, step):
            if record["kind"] != "baseline": used.append(torch.get_num_threads())
    torch.set_num_threads(2)
    try:
        for slow, want in ((1, 2), (2, 1)):
            used.clear()
            monkeypatch.setattr(Trainer, "seconds_per_pass", lambda self: float(torch.get_num_threads() == slow))
            train(model(), corpus, TrainConfig(minutes=.002), callbacks=[Watch(0)], device="cpu")
            assert set(used) == {want} and torch.get_num_threads() == 2
    finally: torch.set_num_threads(1)
