"Runs of one and of two processes to compare, and a run that loses a process, for tests and benches."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from microjulia.checkpoint import step_paths
from microjulia.corpus import Corpus
from microjulia.generation import Generator, SamplingParams
from microjulia.gpt import GPT, GPTConfig
from microjulia.training import Interrupted, TrainConfig, read_metrics, train

BASE = dict(steps=40, log_interval=1, evals=4, eval_windows=33, dtype="float32", optimizer="adamw", lr=1e-3)
KINDS = {"muon": dict(optimizer="muon", lr=None), "bfloat16": dict(dtype="bfloat16")}
LAYOUTS = {"ddp": {}, "fsdp": dict(fsdp=True)}


class StopAt:
    "Sends a signal to this process, and to no other, when a step has been logged."
    def __init__(self, step): self.step = step
    def start(self, config): pass
    def finish(self): pass
    def log(self, record, step):
        if record["kind"] == "train" and step == self.step: signal.raise_signal(signal.SIGTERM)


def model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=28, n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.))


def run(corpus, out=None, stop=None, resume=False, seed=0, sample=None, **options):
    "Losses and held-out losses of a run; of one that stops, where it was saved."
    callbacks = [StopAt(stop)] if stop else []
    try: history = train(model(seed), corpus, TrainConfig(**BASE | options), out, callbacks, sample, resume, torch.device("cpu"))
    except Interrupted as stopped: return stopped.saved.name
    return {kind: [r[key] for r in history if r["kind"] == kind] for kind, key in
            (("train", "loss"), ("eval", "val_loss"), ("sample", "text"))} | {"norm": [r["grad_norm"] for r in history if r["kind"] == "train"]}


def layouts(folder):
    """Largest difference of a loss from one process, of layouts and pairs of them, `from to`: resumed on `to` half way.

    Also the same for Muon and bfloat16; what the stopped runs saved; whether both processes logged the same."""
    folder, corpus = Path(folder), Corpus.from_paths()
    one = {name: run(corpus, **options) for name, options in dict(adamw={}, **KINDS).items()}
    run(corpus, folder / "one-ddp", stop=20)
    shutil.copytree(folder / "one-ddp", folder / "one-fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(folder)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    if done.returncode: raise RuntimeError(done.stderr)
    first, second = (json.loads((folder / f"rank{i}.json").read_text()) for i in (0, 1))
    two = {name: r for name, r in first.items() if isinstance(r, dict)}
    for name in LAYOUTS: two[f"{name} to 1"] = run(corpus, folder / f"{name}-1", resume=True, seed=8)
    out = {name: dict(losses=len(r["train"]), difference=difference(r, one.get(name, one["adamw"]))) for name, r in two.items()}
    return out | dict(alike=all(first[n]["train"][-20:] == second[n]["train"][-20:] for n in two if n in first),
                      stopped=[r[f"{name} stopped"] for r in (first, second) for name in LAYOUTS])


def difference(a, b):
    "The largest difference of a loss, or of the last held-out loss."
    return max(abs(x - y) for x, y in zip(a["train"] + a["eval"][-1:], b["train"] + b["eval"][-1:]))


def logged(out):
    "The steps in the metrics of the run in `out`."
    return [r["step"] for r in read_metrics(Path(out) / "metrics.jsonl")]


def wait_until(ready, process, seconds=300):
    "Wait until `ready()`, as long as `process` runs."
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None: raise RuntimeError(f"the run ended: {process.communicate()[1]}")
        if time.monotonic() > end: raise TimeoutError(f"nothing came in {seconds} s")
        time.sleep(.05)


def children(pid):
    "Numbers of the processes that `pid` started."
    return [int(p) for p in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]


def killed_worker(out, steps=120, after=25, evals=24, worker=1):
    "Kill a worker of a run under `torchrun --max-restarts`: exit status, steps that are done again, seconds until it goes on."
    from microjulia.scaling.distributed import torchrun
    options = dict(paths=None, out=str(out), steps=steps, evals=evals, log_interval=1, eval_windows=16, resume=True, device="cpu",
                   n_layer=1, n_head=2, n_embd=16, block_size=16)
    with subprocess.Popen(torchrun(2, 2, options), env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: max(logged(out), default=0) >= after, process)
        workers, start = children(process.pid), time.monotonic()
        os.kill(workers[worker], signal.SIGKILL)
        wait_until(lambda: not set(workers) & set(children(process.pid)), process)
        before, saved = logged(out), step_paths(out)[-1]
        wait_until(lambda: len(logged(out)) != len(before), process)
        restart = time.monotonic() - start
        error = process.communicate(timeout=600)[1]
    return dict(status=process.returncode, finished=logged(out)[-1] == steps, steps_lost=before[-1] - int(saved.name[5:]),
                interval=steps // evals, restart_s=restart, error=error)


def main(folder):
    import torch.distributed as dist

    from microjulia.cli import leave
    from microjulia.scaling.distributed import join
    torch.set_num_threads(1)
    join(torch.device("cpu"))
    corpus, out = Corpus.from_paths(), {}
    def sample(m): return Generator(m, corpus.tokenizer).generate("virtue ", SamplingParams(max_new_tokens=10, seed=1))
    for name, options in LAYOUTS.items():
        out[name] = run(corpus, sample=sample, **options)
        out[f"1 to {name}"] = run(corpus, folder / f"one-{name}", resume=True, seed=5, **options)
        out[f"{name} stopped"] = run(corpus, folder / name, stop=20, **options)
    dist.barrier()
    if dist.get_rank() == 0:
        for name in LAYOUTS: shutil.copytree(folder / name, folder / f"{name}-1")
    out["ddp to fsdp"] = run(corpus, folder / "ddp", resume=True, seed=6, fsdp=True)
    out["fsdp to ddp"] = run(corpus, folder / "fsdp", resume=True, seed=7)
    for name, options in KINDS.items(): out[name] = run(corpus, **options)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(out))
    dist.barrier()
    leave(0)


if __name__ == "__main__": main(Path(sys.argv[1]))
