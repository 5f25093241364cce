"Several processes: the same losses as one, on any layout; resume on another; loss of a process; what is refused."
import os
import signal
import subprocess
import sys

import distributed_runs as runs
import pytest
import torch

from microjulia.checkpoint import newest_whole, read_config
from microjulia.corpus import Corpus
from microjulia.scaling.distributed import check_restarts, check_supported, launch, rows_of, torchrun
from microjulia.training import TrainConfig, launched, make_trainer, read_metrics

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun with gloo is used on Linux and macOS")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, eval_windows=16, log_interval=1)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory): return runs.layouts(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("pair", ["ddp", "fsdp", "1 to ddp", "1 to fsdp", "ddp to 1", "fsdp to 1", "ddp to fsdp", "fsdp to ddp"])
def test_every_layout_has_the_losses_of_one_process(layouts, pair):
    assert layouts[pair]["losses"] == 40 and layouts[pair]["difference"] <= 1e-6


@pytest.mark.parametrize("name", ["muon", "bfloat16"])
def test_muon_and_bfloat16(layouts, name): assert layouts[name]["difference"] <= 1e-2


def test_all_processes_log_the_same_and_stop_together(layouts):
    assert layouts["alike"]
    assert layouts["stopped"] == ["step-00000020"] * 4


def start(out, steps, restarts=0, **options):
    command = torchrun(2, restarts, dict(TINY, paths=None, out=str(out), steps=steps, device="cpu", **options))
    return subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_killed_worker_loses_at_most_one_interval(tmp_path):
    told = runs.killed_worker(tmp_path / "run")
    assert told["status"] == 0, told["error"]
    assert told["finished"] and told["steps_lost"] <= told["interval"]


def test_sigterm_to_the_launcher_saves_the_last_step(tmp_path):
    with start(tmp_path / "run", 100_000) as process:
        runs.wait_until(lambda: max(runs.logged(tmp_path / "run"), default=0) >= 30, process)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=300)[1]
    saved = read_config(newest_whole(tmp_path / "run"))["step"]
    assert saved == read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] >= 30 and "stopped by SIGTERM; saved" in error


def test_launch_tells_what_is_wrong_in_one_line(tmp_path, capfd):
    with pytest.raises(ValueError, match="3 processes in equal shares: use a multiple of 3, such as batch_size 18$"):
        launch(None, tmp_path / "run", nproc=3, batch_size=16, steps=2, device="cpu", **TINY)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("size, world", [(16, 1), (16, 2), (12, 3), (64, 8)])
def test_rows_are_dealt_once_each(size, world):
    assert sorted(r for rank in range(world) for r in rows_of(rank, world, size).tolist()) == list(range(size))


def test_what_is_not_there_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="above 0"): launch(nproc=0)
    with pytest.raises(ValueError, match="cannot be sent"): launch(nproc=1, device="cpu", progress=[print])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 graphics cards, and this machine has 1"): launch(nproc=2)


def test_one_process_does_not_shard():
    corpus = Corpus.from_paths()
    with pytest.raises(ValueError, match="here is one"): make_trainer(runs.model(), corpus, TrainConfig(fsdp=True, optimizer="adamw"))
    assert not launched()


@pytest.mark.parametrize("options, message", [(dict(), "muon needs whole ones"), (dict(optimizer="adamw", dtype="float16"), "float16"),
                                              (dict(optimizer="adamw", compile=True), "compile"), (dict(graph=True), "one process")])
def test_fsdp_refuses_what_it_cannot_do(options, message):
    config = TrainConfig(fsdp=True, **options)
    with pytest.raises(ValueError, match=message): check_supported(config, getattr(torch, config.dtype, torch.float32))


def test_a_restart_that_would_not_go_on_is_refused(monkeypatch):
    check_restarts(False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="add --resume"): check_restarts(False)
    check_restarts(True)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each"): check_restarts(True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [dict(), dict(fsdp=True, optimizer="adamw", dtype="float32")])
def test_on_cuda(tmp_path, options):
    out = launch(None, tmp_path / "run", nproc=min(2, torch.cuda.device_count()), steps=30, **TINY, **options)
    assert launch(None, out, nproc=1, steps=40, resume=True, **TINY, **options) == out
    assert read_metrics(out / "metrics.jsonl")[-1]["val_loss"] < 3.3


def under_torchrun(*words, restarts=0, **variables):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", f"--max-restarts={restarts}",
               "-m", "microjulia", "train", *words]
    return subprocess.run(command, env=ENV | variables, capture_output=True, text=True, timeout=300)


def test_the_command_under_torchrun(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The good is what all things aim at. " * 200)
    shape = ["--steps", "3", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "16", "--device", "cpu"]
    done = under_torchrun(str(text), "--out", str(tmp_path / "run"), *shape)
    assert done.returncode == 0 and done.stderr.count("microjulia: saved") == 1
    assert "name it by --out" in under_torchrun(str(text), *shape).stderr
