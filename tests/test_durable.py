"A few of each fault of `bench/faults.py`; and the mirror, the trackers, the writer and what a run shows of itself."
import json
import os
import signal
import sys
import threading
import types
import warnings

import pytest
import torch

from fault_runs import Do, go, tally
from microjulia.checkpoint import CheckpointError, DiskFullError, newest_whole, step_path, step_paths
from microjulia.scaling import durable
from microjulia.scaling.durable import Mirror, Softly, Writer, copy_checkpoint
from microjulia.training import Interrupted, LivePlot, ProgressBar, TrainConfig, Trainer, baselines_of, read_metrics

torch.set_num_threads(1)
FEW = dict(F1=5, F2=1, F3=2, F4=6, F5=24, F6=2, F7=6, F8=2, F8c=1, F11=4, F12=20, F13=1, F14=3, F15=1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("name", FEW)
def test_fault(name, tmp_path):
    if not hasattr(os, "fork"): pytest.skip("needs fork")
    row = tally(name, FEW[name], tmp_path)
    assert row["runs"] >= FEW[name] and row["recovered"] == row.get("detected", row["runs"]) == row["runs"], row


def stopped(out, at=20, **options):
    "A run that SIGTERM ended at a step."
    with pytest.raises(Interrupted): go(out, [Do(at, lambda: signal.raise_signal(signal.SIGTERM))], **options)


def damage(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


# The mirror

def test_only_the_mirror_survives(tmp_path):
    whole, out, mirror = go(), tmp_path / "out", tmp_path / "drive" / "mirror"
    stopped(out, mirror=str(mirror))
    assert newest_whole(mirror) == step_path(mirror, 20) and len(step_paths(mirror)) <= 2
    for gone in (lambda: os.rename(out, tmp_path / "lost"), lambda: [damage(p) for p in step_paths(out)]):
        gone()
        again = go(out, resume=True, mirror=str(mirror), seed=4)
        assert again["weights"] == whole["weights"] and again["losses"] == whole["losses"]
    assert read_metrics(mirror / "metrics.jsonl")[-1]["step"] == 40


def test_a_mirror_of_another_run_is_refused(tmp_path):
    go(tmp_path / "a", steps=2, mirror=str(tmp_path / "m"))
    with pytest.raises(ValueError, match="holds a run already"): go(tmp_path / "b", steps=2, mirror=str(tmp_path / "m"))
    with pytest.raises(ValueError, match="needs a run folder"): go(None, steps=2, mirror=str(tmp_path / "n"))


def test_a_copy_that_comes_out_wrong_is_set_aside_and_training_goes_on(tmp_path, monkeypatch):
    real = durable.shutil.copytree
    def bad(src, dst, *args, **kw):
        real(src, dst, *args, **kw)
        if os.path.exists(f"{dst}/model.safetensors"): damage(dst)
    monkeypatch.setattr(durable.shutil, "copytree", bad)
    go(tmp_path / "a", steps=5)
    with pytest.raises(CheckpointError, match="bytes instead of"): copy_checkpoint(step_path(tmp_path / "a", 5), step_path(tmp_path / "c", 5))
    with pytest.warns(UserWarning, match="the copy failed"):
        m = Mirror(tmp_path / "m")
        m.run = tmp_path / "a"
        m.finish()
    assert not step_paths(tmp_path / "m") and all(p.name.startswith(".bad-") for p in (tmp_path / "m" / "checkpoints").iterdir())


# The writer

def test_the_background_writes_what_was_and_tells_what_went_wrong(tmp_path):
    ran, hold = [], threading.Event()
    w = Writer()
    w.submit(lambda: (hold.wait(60), ran.append(1)))
    assert w.busy() and not ran
    hold.set()
    w.submit(lambda: 1 / 0)                                      # waits for the one before
    assert ran == [1]
    with pytest.raises(ZeroDivisionError): w.submit(lambda: ran.append(2))
    assert w.wait() is None and ran == [1, 2]
    with pytest.raises(ZeroDivisionError): Writer(background=False).submit(lambda: 1 / 0)


def test_a_run_with_the_background_writer_is_the_same(tmp_path, monkeypatch):
    whole = go()
    monkeypatch.setattr("microjulia.training.WRITER", lambda background: Writer(True))
    assert go(tmp_path / "r") == whole
    assert newest_whole(tmp_path / "r") == step_path(tmp_path / "r", 40)


def test_keep_every(tmp_path):
    go(tmp_path / "r", keep=1, keep_every=15)
    steps = [int(p.name[5:]) for p in step_paths(tmp_path / "r")]
    assert set(steps) >= {0, 15, 30, 40} and not set(steps) & {5, 25}


def test_a_new_checkpoint_that_is_not_whole_removes_nothing(tmp_path, monkeypatch):
    go(tmp_path / "r", steps=5, keep=1)
    t = types.SimpleNamespace(out=tmp_path / "r", config=TrainConfig(keep=1))
    damage(step_path(tmp_path / "r", 5))
    before = step_paths(tmp_path / "r")
    with pytest.raises(CheckpointError): Trainer.remove_old(t, step_path(tmp_path / "r", 5), 0)
    assert step_paths(tmp_path / "r") == before


def test_damaged_checkpoints_are_set_aside_on_resuming(tmp_path):
    whole = go()
    stopped(tmp_path / "r")
    damage(step_path(tmp_path / "r", 20))
    assert go(tmp_path / "r", resume=True)["weights"] == whole["weights"]
    assert (tmp_path / "r" / "checkpoints" / ".bad-step-00000020").is_dir()


# Guards

def test_no_room_three_times_in_a_row_ends_the_run(tmp_path, monkeypatch):
    def full(path, tensors): raise DiskFullError(f"{path}: no room on the disk")
    go(tmp_path / "r", steps=5)
    monkeypatch.setattr("microjulia.checkpoint._check_room", full)
    with pytest.raises(DiskFullError, match="third time.*step-00000005 is safe"): go(tmp_path / "r", resume=True)


def test_out_of_memory_later_names_what_would_do(tmp_path):
    class Late:
        def log(self, record, step):
            if record["kind"] == "train" and step == 9: raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="at step 9.*grad_accum_steps=2"): go(None, [Late()])


def test_a_bad_start_without_a_folder_goes_on_at_half_the_rate():
    calls = []
    def spoil(model):
        model.lm_head.weight.register_hook(lambda g: calls.append(1) or (g * float("inf") if 8 < len(calls) < 12 else g))
    class Rates:
        seen = []
        def log(self, record, step): self.seen += [record["lr"]] if record["kind"] == "train" else []
    go(None, [Rates()], spoil=spoil, schedule="linear", warmup_iters=0)
    straight = [Rates.seen[0] * (1 - i / 40) for i in range(40)]
    assert Rates.seen[:7] == pytest.approx(straight[:7]) and Rates.seen[7:] == pytest.approx([x / 2 for x in straight[7:]])


# Progress

class Recorder:
    "Stands for a tracker's module: keeps what it is told."
    def __init__(self, fail=""): self.calls, self.fail = [], fail

    def __getattr__(self, name):
        def call(*args, **kw):
            self.calls.append(name)
            if name == self.fail: raise ConnectionError("no network")
        return call


@pytest.mark.parametrize("fail, calls", [("", {"init", "log", "finish"}), ("init", {"init"}), ("log", {"init", "log"})])
def test_a_tracker_that_fails_warns_once_and_stops_nothing(monkeypatch, fail, calls):
    module = Recorder(fail)
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = Softly("wandb")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker.open(types.SimpleNamespace(out=None))
        tracker.start({"step": 0})
        for step in (1, 2): tracker.log(dict(kind="train", step=step, loss=1., text="x"), step)
        tracker.finish()
    assert set(module.calls) == calls and len(caught) == bool(fail)
    if fail: assert module.calls.count(fail) == 1 and "ConnectionError: no network" in str(caught[0].message)


def test_a_tracker_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.warns(UserWarning, match="pip install trackio"): Softly("trackio").start({"step": 0})
    with pytest.raises(ValueError, match="known: tensorboard, wandb, trackio"): go(steps=2, track="wand")


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    go(tmp_path / "r", steps=5, track="tensorboard")
    seen = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "eval/bits_per_char", "bigram"} <= set(seen.Tags()["scalars"])
    assert [e.step for e in seen.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_records_say_what_one_wants_to_know(tmp_path, capsys):
    go(tmp_path / "r", [ProgressBar()])
    records = read_metrics(tmp_path / "r" / "metrics.jsonl")
    last = [r for r in records if r["kind"] == "train"][-1]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "left", "memory", "skipped", "progress"} <= set(last)
    assert last["left"] == 0 and last["memory"] > 10**7
    assert 2 < baselines_of(records)["trigram"] < baselines_of(records)["bigram"] < 4
    shown = capsys.readouterr()
    assert "held out in bits/char; bigram 3.18" in shown.out + shown.err and "MB" in shown.out + shown.err


def test_metrics_wait_for_room(tmp_path):
    import resource
    from fault_runs import forked, limit_files, status_of
    def child():
        go(tmp_path / "r", [Do(9, lambda: limit_files(resource.RLIM_INFINITY)), Do(3, lambda: limit_files(1200))], steps=10, evals=1)
    assert status_of(forked(child)) == 0
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [r["step"] for r in map(json.loads, lines) if r["kind"] == "train"] == list(range(1, 11))


def test_the_live_figure_is_one_and_ends_as_a_picture(monkeypatch):
    shown = []
    class Handle:
        def update(self, figure): shown.append(figure)
    monkeypatch.setattr("IPython.display.display", lambda figure, display_id: shown.append(figure) or Handle())
    go(None, [LivePlot()])
    assert len(shown) == 8 and len(shown[-1].axes) == 4


def test_two_kills_before_the_second_checkpoint_leave_the_first_evaluation(tmp_path):
    from fault_runs import forked, status_of
    whole = go(tmp_path / "whole")
    for step in (3, 4):
        assert status_of(forked(lambda: go(tmp_path / "run", [Do(step, lambda: os._exit(9))], resume=True))) == 9  # noqa: B023
    assert go(tmp_path / "run", resume=True) == whole


@pytest.mark.parametrize("at", [0, 25])
def test_a_signal_during_an_evaluation_leaves_its_record_once(tmp_path, at):
    whole = go(tmp_path / "whole")
    class Stop:
        def log(self, record, step):
            if record["kind"] == "eval" and step == at: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted): go(tmp_path / "run", [Stop()])
    assert go(tmp_path / "run", resume=True) == whole
