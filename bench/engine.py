"""The engine: characters per second of all texts together, from 1 to 64 at once, and the stress that it must stand.

    python bench/engine.py                                      # the small model, about two minutes
    python bench/engine.py --sizes large --batches 1 16 --rounds 2
    python bench/engine.py --stress 10000

All contenders have the same weights, run in one process on one thread and take turns, round by round; a ratio is the median over
the rounds of the ratio within a round. Texts begin with one character and fill the window, temperature 1, all of the distribution.

- `engine`: a request for each text, each with its own seed and sampler, read by `for` one after the other; `engine asyncio`: a
  coroutine for each text; `engine bfloat16`, `engine int8`: the kernel with smaller weights; `engine torch`: without the kernel.
- `kernel`: the bare steps with NumPy's greedy choice, nobody reading: what the engine could reach at most.
- CTranslate2: its whole loop for the whole batch in C++. llama.cpp: through its Python package, one call a step.
- mixed: four times as many requests as places, of 16 characters up to the full window. CTranslate2 runs them in batches, each as long as
  its longest, since its texts cannot join and leave; only the characters that were asked for count.

`--cpu-clock` counts the processor time of the whole process instead of the time on the wall, for a machine that is busy otherwise.

What was measured before is kept in the file of results, so that sizes and batches can be measured one by one. `--stress` sends random
requests from threads and coroutines, with cancellations and readers that leave, to an engine on the kernel and one on PyTorch in `exact`
mode, and compares each whole text with the one generated alone (tests/test_engine.py has the code, and runs fewer).
"""
import argparse
import asyncio
import gc
import json
import random
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from common import machine, save, spread
from generate import CTranslate2, LlamaCpp, Ours, in_turns, make_model

from microjulia.corpus import Corpus
from microjulia.exchange.gguf import write_gguf
from microjulia.exchange.huggingface import write_huggingface
from microjulia.generation import SamplingParams
from microjulia.serving.engine import Engine, TorchDecoder
from microjulia.tokenizer import CharTokenizer

TOK = CharTokenizer()


CLOCK = time.perf_counter


def clocked(run):
    "Seconds that `run` takes."
    start = CLOCK()
    run()
    return CLOCK() - start


class Running:
    "Our engine with a reader for each text; it stands before the clock starts, as a server's does."
    def __init__(self, model, dtype="float32", torch=False, aio=False):
        self.model, self.dtype, self.torch, self.aio, self.engine = model, dtype, torch, aio, None

    def open(self, n):
        if self.engine: self.engine.close()
        decoder = TorchDecoder(self.model, n) if self.torch else None
        self.engine = Engine(self.model, TOK, max_batch=n, max_queue=10**6, dtype=self.dtype, decoder=decoder)

    def run(self, lengths):
        ask = lambda i, n: self.engine.stream([i % 28], SamplingParams(temperature=1., top_k=0, max_new_tokens=n, seed=i))
        if self.aio: asyncio.run(self._all(ask, lengths))
        else:
            for s in [ask(i, n) for i, n in enumerate(lengths)]:
                for _ in s: pass

    async def _all(self, ask, lengths):
        async def read(stream):
            async for _ in stream: stream.ready()
        await asyncio.gather(*[read(ask(i, n)) for i, n in enumerate(lengths)])

    def batch(self, n, steps):
        if not self.engine or self.engine.max_batch != n: self.open(n)
        self.run([steps] * n)


def contenders(model, folder):
    hf, gguf = write_huggingface(folder/"hf", model, TOK), write_gguf(folder/"model.gguf", model, TOK)
    kernel = Ours(model)
    llama = {"llama.cpp q8_0": LlamaCpp(gguf, "q8_0", model.config.block_size)} if find_spec("llama_cpp") else {}
    return {"engine": Running(model), "engine asyncio": Running(model, aio=True), "engine bfloat16": Running(model, "bfloat16"),
            "engine int8": Running(model, "int8"), "engine torch": Running(model, torch=True), "kernel": kernel,
            "CTranslate2 float32": CTranslate2(hf, "float32"), "CTranslate2 int8": CTranslate2(hf, "int8")} | llama


PEERS = "CTranslate2 float32", "CTranslate2 int8", "llama.cpp q8_0"

def figures(times, characters):
    return {name: dict(chars_per_s=spread([characters / s for s in t], 0)) | {
        f"times {p}": spread([y / x for x, y in zip(t, times[p])], 2) for p in PEERS if p in times and p != name} for name, t in times.items()}


def mixed(all_, T, n, rounds):
    "Requests of different lengths: the engine hands places on, CTranslate2 waits for the longest of a batch."
    lengths = np.random.default_rng(0).integers(16, T, 4 * n).tolist()
    def run(name):
        if name.startswith("engine"): return all_[name].run(lengths)
        for i in range(0, len(lengths), n): all_[name].batch(n, max(lengths[i:i + n]))
    return dict(places=n, requests=len(lengths), characters=sum(lengths)) | figures(
        in_turns(rounds, lambda name: clocked(lambda: run(name)), ["engine", "engine asyncio", "CTranslate2 float32", "CTranslate2 int8"]), sum(lengths))


def speed(args, found):
    corpus = Corpus.from_paths()
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            model = make_model(size, corpus, args.steps)
            (Path(folder)/size).mkdir()
            all_, T, part = contenders(model, Path(folder)/size), model.config.block_size, found.setdefault(size, {"contenders": {}})
            names = args.contenders or list(all_)
            for n in args.batches:
                for name, f in figures(in_turns(
                        args.rounds, lambda name: clocked(lambda: all_[name].batch(n, T - 1)), names), n * (T - 1)).items():
                    part["contenders"].setdefault(name, {})[str(n)] = f
                if n == args.mixed: part["mixed"] = mixed(all_, T, n, args.rounds)
                part |= machine() | dict(clock="processor time" if args.cpu_clock else "wall")
                save(args.out, found)
            for c in all_.values():
                if isinstance(c, Running) and c.engine: c.engine.close()


def resident():
    "Megabytes of memory in use."
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def stress(n):
    "Random requests in random company against the same requests alone, in both exact modes."
    sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
    from test_engine import engine, run_stress, text_of
    out = dict(requests=n)
    for way in ("kernel", "exact"):
        with engine(way, max_queue=16, chunk=11) as e:
            run_stress(e, n // 10, seed=1)
            gc.collect()
            before, start = resident(), time.perf_counter()
            asked, texts = run_stress(e, n)
            seconds = time.perf_counter() - start
            gc.collect()
            after, stats = resident(), e.stats()
            whole = [i for i, t in enumerate(texts) if t is not None]
            random.Random(0).shuffle(whole)
            different = sum(texts[i] != text_of(e.stream(*asked[i])) for i in whole)
            out[way] = dict(seconds=round(seconds, 1), whole=len(whole), left_or_cancelled=n - len(whole), different_from_alone=different,
                            free_slots=stats["free"], slots=stats["max_batch"], queued=stats["queued"], ended=stats["ended"],
                            ended_all=sum(stats["ended"].values()) == n + n // 10, tokens=stats["tokens"],
                            megabytes_before=round(before, 1), megabytes_after=round(after, 1))
            print(way, out[way], flush=True)
    return out | machine()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", nargs="+", default=["small"], choices=["small", "large"])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    p.add_argument("--mixed", type=int, default=16, help="the number of places at which requests of different lengths are measured too")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--contenders", nargs="+", help="only these")
    p.add_argument("--cpu-clock", action="store_true", help="count processor time")
    p.add_argument("--steps", type=int, default=100, help="steps that the small model is trained")
    p.add_argument("--stress", type=int, help="send so many random requests instead")
    p.add_argument("--out", type=Path, default=Path(__file__).parent/"results"/"engine.json")
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.cpu_clock: globals()["CLOCK"] = time.process_time
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.stress: save(args.out, found | {"stress": stress(args.stress)})
    else: speed(args, found)


if __name__ == "__main__": main()
