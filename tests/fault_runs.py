"""Faults put into training runs and into what they leave on the disk, for tests and for `bench/faults.py`.

Each function does one kind of fault `n` times and yields for each whether it was `detected` (where there is
something to detect) and whether the run `recovered`: goes on, to the same numbers as if nothing had happened."""
import contextlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import time
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from microjulia import checkpoint
from microjulia.checkpoint import (MANIFEST, STAGES, CheckpointError, DiskFullError, load_checkpoint, manifest_of, newest_whole,
                                   save_checkpoint, step_path, step_paths)
from microjulia.corpus import Corpus
from microjulia.gpt import GPT, GPTConfig
from microjulia.training import Diverged, Interrupted, TrainConfig, read_metrics, run_lock, train

CORPUS = Corpus.from_paths()
STEPS, INTERVAL = 40, 5
BASE = dict(steps=STEPS, evals=STEPS // INTERVAL, eval_windows=16, log_interval=1, dtype="float32")
FAULTS = {}                                                      # name -> what it is, and the function


def fault(name, what):
    def add(f):
        FAULTS[name] = (what, f)
        return f
    return add


def go(out=None, callbacks=(), resume=False, dropout=.2, seed=0, spoil=None, corpus=CORPUS, **options):
    "Train a tiny model; what can be compared with another run."
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=28, n_layer=1, n_head=2, n_embd=16, block_size=16, dropout=dropout))
    if spoil: spoil(model)
    with warnings.catch_warnings(action="ignore"):
        history = train(model, corpus, TrainConfig(**BASE | options), out, callbacks, None, resume, torch.device("cpu"))
    return outcome(history, model)


def outcome(history, model):
    "Every loss and weight of a run, to the bit."
    losses = [(r["step"], r["loss"] and r["loss"].hex()) for r in history if r["kind"] == "train"]
    held_out = [(r["step"], r["val_loss"].hex()) for r in history if r["kind"] == "eval"]
    return dict(losses=losses, held_out=held_out, weights={n: p.numpy().tobytes() for n, p in model.state_dict().items()})


def forked(f):
    "Run `f` in a child process: its number."
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        f()
        status = 0
    except Interrupted as stop: status = 128 + stop.signum
    except BaseException:
        if os.environ.get("FAULTS_DEBUG"): traceback.print_exc(file=open(os.environ["FAULTS_DEBUG"], "a"))
    finally: os._exit(status)


def status_of(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Do:
    "Calls `f` when a step of training has been logged."
    def __init__(self, step, f): self.step, self.f = step, f

    def log(self, record, step):
        if record["kind"] == "train" and step == self.step: self.f()


class Tell:
    "Writes a byte when training starts."
    def __init__(self, pipe): self.pipe = pipe

    def start(self, config): os.write(self.pipe, b".")


def logged(out):
    "The last step in the metrics of a run."
    return max((r["step"] for r in read_metrics(Path(out) / "metrics.jsonl")), default=0)


def debris(out):
    "Files that half a save left behind and nobody cleared away."
    return [p.name for p in (Path(out) / "checkpoints").glob(".*") if not p.name.startswith(".bad-")]


@fault("F1", "kill -9 at random moments, restarted until finished")
def kills(n, work, r):
    start, whole = time.monotonic(), go(work / "whole")
    length, done, runs = time.monotonic() - start, 0, 0
    while done < n:
        out, runs = work / f"run{runs}", runs + 1
        while True:
            pid = forked(lambda: go(out, resume=True))
            time.sleep(r.uniform(0, .8 * length))
            os.kill(pid, signal.SIGKILL)
            if status_of(pid) == 0: break                        # it had come to its end before
            done += 1
            newest = newest_whole(out) if step_paths(out) else None
            at = int(newest.name[5:]) if newest else 0
            yield dict(detected=True, recovered=logged(out) - at <= INTERVAL)
        yield dict(runs=0, recovered=go(out, resume=True) == whole and not debris(out))


@fault("F2", "kill -9 inside each stage of a save")
def kills_in_stages(n, work, r):
    whole = go(work / "whole", keep=1)
    def half(tensors, file, metadata=None):
        save_file(tensors, file, metadata=metadata)
        os.truncate(file, os.path.getsize(file) // 2)
        os._exit(9)
    for i in range(n):
        for name in [*(s for s in STAGES if s != "replace"), "half a file"]:
            out, left = work / f"{name}{i}", [r.randrange(1, 6)]
            def die(stage):
                left[0] -= stage == name
                if not left[0]: os._exit(9)
            def begin(): checkpoint.save_file = half
            def child():
                if name != "half a file": checkpoint.stage = die
                go(out, [Do(left[0] * INTERVAL - 1, begin)] * (name == "half a file"), keep=1)
            killed = status_of(forked(child)) == 9
            newest = newest_whole(out) if step_paths(out) else None
            lost = logged(out) - (int(newest.name[5:]) if newest else 0)
            yield dict(detected=killed, recovered=lost <= INTERVAL and go(out, resume=True, keep=1) == whole and not debris(out))


def limit_files(size):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@fault("F3", "no room on the disk, for a while and for good")
def full_disk(n, work, r):
    whole = go(work / "whole")
    largest = max(p.stat().st_size for p in step_path(work / "whole", STEPS).rglob("*"))
    for i in range(n):
        size, ends = r.randrange(50, largest), i % 2 == 0
        out, told = work / f"run{i}", work / f"told{i}"
        def child():
            events = [Do(7, lambda: limit_files(size))] + [Do(12, lambda: limit_files(-1))] * ends
            try: result = go(out, events)
            except DiskFullError as error:
                limit_files(-1)
                return told.write_text(str(error))
            limit_files(-1)
            told.write_bytes(pickle.dumps(result))
        status_of(forked(child))
        texts = [r["warning"] for r in read_metrics(out / "metrics.jsonl") if "warning" in r]
        if ends: fine = pickle.loads(told.read_bytes()) == whole
        else:
            texts.append(told.read_text())
            fine = newest_whole(out) == step_path(out, 5) and "stops" in texts[-1] and go(out, resume=True) == whole
        yield dict(detected=bool(texts) and all("disk" in t for t in texts), recovered=fine and not debris(out))


def flip(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def two_steps(work):
    "A run with two checkpoints, and the names of the files in each."
    run = work / "run"
    go(run, keep=2, steps=10)
    newest, before = step_paths(run)[::-1]
    return run, newest, before, checkpoint._files(newest)


def judge(run, newest, before, name):
    "Whether damage to `newest` is seen, named, and the one before taken."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try: found = newest_whole(run)
        except CheckpointError: found = None
    told = " ".join(str(w.message) for w in caught)
    return dict(detected=found != newest and newest.name in told and (name.split("/")[-1] in told), recovered=found == before)


def damaged(n, work, r, spoil):
    run, newest, before, files = two_steps(work)
    for i in range(n):
        file = newest / files[i % len(files)]
        data = file.read_bytes()
        while (bad := spoil(data, r)) == data: pass
        file.write_bytes(bad)
        yield judge(run, newest, before, file.name)
        file.write_bytes(data)
    assert newest_whole(run) == newest


@fault("F4", "files cut short")
def cuts(n, work, r): return damaged(n, work, r, lambda data, r: data[:r.randrange(len(data))])


@fault("F5", "single bits turned over")
def bits(n, work, r): return damaged(n, work, r, lambda data, r: flip(data, r.randrange(8 * len(data))))


@fault("F6", "ends of zeros; files missing, added, exchanged; empty folders")
def worse(n, work, r):
    def zeros(data, r): at = r.randrange(len(data)); return data[:at] + bytes(len(data) - at)
    yield from damaged(n, work / "zeros", r, zeros)
    run, newest, before, files = two_steps(work)
    kept = Path(shutil.copytree(newest, work / "kept"))
    for i in range(n):
        for kind in ("missing", "extra", "exchanged", "empty"):
            name = files[i % len(files)]
            if kind == "missing": (newest / name).unlink()
            elif kind == "extra": (newest / (name := f"more{i}.bin")).touch()
            elif kind == "empty":
                shutil.rmtree(newest)
                newest.mkdir()
            elif (newest / name).read_bytes() == (before / name).read_bytes(): continue   # the alphabet is the same in both
            else: shutil.copy(before / name, newest / name)
            yield judge(run, newest, before, "" if kind in ("empty", "exchanged") else name)
            shutil.rmtree(newest)
            shutil.copytree(kept, newest)


@fault("F7", "SIGTERM and SIGINT at random moments, also during evaluation and saving")
def signals(n, work, r):
    start, whole = time.monotonic(), go(work / "whole")
    length = time.monotonic() - start
    for i in range(n):
        out, signum = work / f"run{i}", (signal.SIGTERM, signal.SIGINT)[i % 2]
        while True:
            shutil.rmtree(out, ignore_errors=True)
            read, write = os.pipe()
            pid = forked(lambda: go(out, [Tell(write)]))
            os.read(read, 1)
            time.sleep(r.uniform(0, .7 * length))
            sent = time.monotonic()
            os.kill(pid, signum)
            status, seconds = status_of(pid), time.monotonic() - sent
            os.close(read), os.close(write)
            if status: break                                     # else it had come to its end before
        saved = newest_whole(out)
        steps = [r["step"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"]
        last = int(saved.name[5:]) == max(steps, default=0)
        yield dict(detected=status == 128 + signum, recovered=last and go(out, resume=True) == whole, seconds=seconds)


@fault("F8", "stopped and resumed twice: every loss and weight equal to the bit")
def resumes(n, work, r, compiled=False):
    cells = [dict(optimizer=o, dropout=d, stop=s) for o in ("muon", "adamw") for s in ((10,) if compiled else (1, 10, 37))
             for d in (.2, 0.)]
    for i, cell in enumerate(cells[:n]):
        out, stop, options = work / f"run{i}", cell.pop("stop"), dict(cell, compile=compiled)
        def term(): signal.raise_signal(signal.SIGTERM)
        whole = go(**options)
        for seed, at in ((0, stop), (9, stop + 2)):              # other first weights each time it goes on: they are replaced
            with contextlib.suppress(Interrupted): go(out, [Do(at, term)], resume=True, seed=seed, **options)
        yield dict(recovered=go(out, resume=True, seed=8, **options) == whole)


@fault("F8c", "the same with torch.compile")
def compiled_resumes(n, work, r): return resumes(n, work, r, compiled=True)


def poison(steps, kind=math.nan):
    "Spoil the gradients of a model at some calls of the backward pass that training makes."
    def spoil(model):
        calls = [0]
        def hook(grad):
            calls[0] += 1
            return grad * kind if calls[0] - 4 in steps else grad            # four passes are timed before the first step
        model.lm_head.weight.register_hook(hook)
    return spoil


@fault("F11", "gradients of NaN or infinity, singly and in a row")
def bad_gradients(n, work, r):
    for i in range(n):
        out, row, kind = work / f"run{i}", 1 + i % 4, (math.nan, math.inf)[i % 2]
        first = r.randrange(8, 30)
        steps = set(range(first, first + min(row, 3)))
        if row == 4: steps |= {first + 3 + k for k in range(12)}             # and again after going back
        try:
            go(out, spoil=poison(steps, kind))
            ended = True
        except Diverged as error: ended = str(error)
        records = read_metrics(out / "metrics.jsonl")
        warned = [r["warning"] for r in records if "warning" in r]
        finite = all(t.isfinite().all() for p in step_paths(out) for t in load_checkpoint(p).model.state_dict().values())
        skipped = sum(r.get("skipped", 0) for r in records)
        if row < 3: fine = ended is True and skipped == row and not any("half the learning rate" in w for w in warned)
        elif row == 3: fine = ended is True and any("half the learning rate" in w for w in warned) and records[-1]["progress"] == 1
        else: fine = "lower the learning rate" in str(ended) and newest_whole(out) is not None
        yield dict(detected=bool(warned), recovered=fine and finite)


class Bomb:
    "What opens this as a pickle leaves a folder behind."
    def __init__(self, path): self.path = str(path)

    def __reduce__(self): return os.mkdir, (self.path,)


@fault("F12", "hostile folders whose manifests agree")
def hostile(n, work, r):
    made = save_checkpoint(work / "made", GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)), CORPUS.tokenizer)
    def header(size): return lambda f: f.write_bytes(size.to_bytes(8, "little") + f.read_bytes()[8:])
    def config(**changes):
        def edit(f):
            c = json.loads((f.parent / "config.json").read_text())
            c["hyperparams"] |= {k: v for k, v in changes.items() if k in c["hyperparams"]}
            (f.parent / "config.json").write_text(json.dumps(c | {k: v for k, v in changes.items() if k in c}))
        return edit
    def escape(f):
        raw = f.read_bytes().replace(b'"wte.weight"', b'"../../oops"')
        f.write_bytes(raw)
    ways = [lambda f: f.write_bytes(pickle.dumps(Bomb(work / "bang"), 2)), lambda f: torch.save(Bomb(work / "bang"), f), escape,
            lambda f: torch.save(Bomb(work / "bang"), f.with_suffix(".pt")), *map(header, (2**63, 2**40, 10**8 + 1, 0)),
            lambda f: save_file({"wte.weight": torch.zeros(2, 2)}, f), lambda f: (f.parent / "config.json").write_text("[" * 10**5),
            *(config(**c) for c in (dict(n_embd=1 << 40), dict(n_layer=10**9), dict(block_size=10**12), dict(vocab_size=-1),
                                    dict(n_head=3), dict(arch="os:system"), dict(format_version=9), dict(step="x"),
                                    dict(hyperparams=[]), dict(facts=3)))]
    for i in range(n):
        bad = Path(shutil.copytree(made, work / f"bad{i}"))
        ways[i % len(ways)](bad / "model.safetensors")
        with contextlib.suppress(OSError): (bad / MANIFEST).write_bytes(manifest_of(bad, 0))
        start = time.monotonic()
        try: refused = bool(load_checkpoint(bad)) and False
        except CheckpointError as error: refused = "\n" not in str(error)
        yield dict(detected=refused, recovered=not (work / "bang").exists(), seconds=time.monotonic() - start)


@fault("F13", "out of memory on the first step")
def no_memory(n, work, r):
    whole = go(dropout=0., optimizer="adamw", steps=8)
    for i in range(n):
        fits, told = 8 >> i % 3, []
        def small(model):
            forward = model.forward
            def checked(ids, *args, **kw):
                if len(ids) > fits: raise torch.OutOfMemoryError("CUDA out of memory. (made up)")
                return forward(ids, *args, **kw)
            model.forward = checked
        class Listen:
            def log(self, record, step): told.append(record.get("warning"))
        got = go(None, [Listen()], dropout=0., optimizer="adamw", steps=8, spoil=small)
        near = all(abs(float.fromhex(a[1]) - float.fromhex(b[1])) <= 1e-5 for a, b in zip(got["losses"], whole["losses"], strict=True))
        yield dict(detected=any(t and "out of memory" in t for t in told), recovered=near)


@fault("F14", "resumed on another, shorter or missing text")
def other_text(n, work, r):
    text = "the unexamined life is not worth living. " * 60
    for i in range(n):
        out, file = work / f"run{i}", work / "text.txt"
        file.write_text(text)
        go(out, steps=3, corpus=Corpus.from_paths([file]))
        if i % 3 == 2: file.unlink()
        else: file.write_text([text.replace("life", "love"), text[:-200]][i % 3])
        try: refused = bool(go(out, resume=True, steps=6, corpus=Corpus.from_paths([file]))) and False
        except (ValueError, OSError) as error: refused = str(error)
        if i % 3 == 2: yield dict(detected="text.txt" in str(refused), recovered=newest_whole(out) is not None)
        else: yield dict(detected="other text" in str(refused) and str(refused).count("sha256") == 1,
                         recovered=bool(go(out, resume=True, steps=6, corpus=Corpus.from_paths([file]), other_text=True)))


@fault("F15", "two processes in one folder; a lock left by a dead one")
def two_at_once(n, work, r):
    for i in range(n):
        out = work / f"run{i}"
        out.mkdir()
        read, write = os.pipe()
        def hold():
            with run_lock(out):
                os.write(write, b".")
                signal.pause()
        pid = forked(hold)
        os.read(read, 1)
        try: refused = bool(go(out, steps=2)) and False
        except ValueError as error: refused = "in use" in str(error)
        os.kill(pid, signal.SIGKILL)
        status_of(pid)
        yield dict(detected=refused, recovered=bool(go(out, steps=2)))


def tally(name, n, work, seed=0):
    "Do a fault `n` times: runs, how many were detected and recovered, and the longest of the times taken."
    what, f = FAULTS[name]
    results = list(f(n, Path(work), random.Random(seed)))
    runs = sum(x.get("runs", 1) for x in results)
    count = lambda key: sum(x.get("runs", 1) for x in results if x.get(key, True))
    row = dict(fault=name, what=what, runs=runs, detected=count("detected"), recovered=count("recovered"))
    if any("detected" not in x for x in results): row.pop("detected")
    if failed := [x for x in results if not x.get("runs", 1) and not x["recovered"]]: row["recovered"] -= len(failed)
    seconds = [x["seconds"] for x in results if "seconds" in x]
    return row | (dict(longest_s=round(max(seconds), 2)) if seconds else {})
