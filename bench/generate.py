"""Generation against the engines people use: one stream, several at once, the first character, past the window.

    python bench/generate.py --nanogpt PATH                    # both sizes, everything; about ten minutes
    python bench/generate.py --nanogpt PATH --text BOOKS --steps 1000    # with a small model, and guesses, from real books
    python bench/generate.py --nanogpt PATH --parts stream --sizes small --rounds 9

Needs `pip install 'microjulia[bench]'` and PATH, a checkout of karpathy/nanoGPT. All contenders run in one process on one thread
and take turns, round by round; a ratio is the median over the rounds of the ratio within a round. All have the same weights, carried
over by our own export: the small model is trained on `--text`, or else the text of the package, the large one is random. Before anything
is timed, each contender writes greedily from the same start; float32 must say what PyTorch says, and for the others it is
noted after how many characters they part.

- stream: from one character to the full window, temperature 1, all of the distribution; a turn is as many texts as take
  50 ms. llama.cpp is driven through its Python package, one call a token, sampling in its own code; `--llama-bench PROGRAM` adds its native bench program. CTranslate2 runs its
  whole loop in C++. Ours is `Generator.generate`, `ours torch` the same without the kernel, and `guessing` the same with a guesser
  counted on the text that the small model was trained on; `per_step` is how many characters a step then yields.
- batch: so many texts at once, in step, characters per second of all together. `ours` is the kernel with NumPy's greedy choice,
  `engine` the whole engine with its sampler and a reader for each text.
- first: from the request to the first character on a loaded model; a step of several rows; compiling and loading the kernel.
- past: a text of four windows. nanoGPT and `exact` recompute the window for each character, `anchor` re-reads half of it when it is
  full; beside them the bits per character of both rules on held-out text.
"""
import argparse
import ctypes
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common import machine, save, spread

from microjulia.corpus import Corpus
from microjulia.exchange.gguf import write_gguf
from microjulia.exchange.huggingface import write_huggingface, write_nanogpt
from microjulia.generation import Generator, SamplingParams, fast_decoder, score
from microjulia.gpt import GPT, config_for
from microjulia.serving.engine import Engine
from microjulia.serving.guess import Guesser
from microjulia.tokenizer import CharTokenizer
from microjulia.training import TrainConfig, train

TOK, START = CharTokenizer(), 0
CLOCK = time.perf_counter


class Ours:
    "Our generator; a batch is the bare kernel."
    def __init__(self, model, **options):
        self.generator, self.T = Generator(model, TOK, **options).prepare(), model.config.block_size
        self.options = {k: v for k, v in options.items() if k == "dtype"}
        self.seed = 0

    def write(self, n, greedy=False):
        self.seed += 1
        params = SamplingParams(temperature=0. if greedy else 1., top_k=0, max_new_tokens=n, seed=self.seed)
        return TOK.encode(self.generator.generate(TOK.decode([START]), params)).tolist()

    def batch(self, n, steps):
        decoder, slots = fast_decoder(self.generator.model, n, **self.options), np.arange(n)
        ids = slots % 28
        start = CLOCK()
        for t in range(steps): ids = decoder.step(ids, slots, np.full(n, t)).argmax(1)
        return CLOCK() - start


class Running:
    "Our engine with a reader for each of its texts."
    def __init__(self, model): self.model = model

    def batch(self, n, steps):
        with Engine(self.model, TOK, max_batch=n, decoder=fast_decoder(self.model, n)) as engine:
            params = [SamplingParams(temperature=1., top_k=0, max_new_tokens=steps, seed=i) for i in range(n)]
            start = CLOCK()
            for stream in [engine.stream([i % 28], p) for i, p in enumerate(params)]: assert sum(1 for _ in stream) == steps + 1
            return CLOCK() - start


class NanoGPT:
    "nanoGPT's `generate`; its head is untied, as ours is, and its GELU the approximate one."
    def __init__(self, path, folder, model):
        if str(path) not in sys.path: sys.path.insert(0, str(path))
        import model as nano
        with warnings.catch_warnings(action="ignore"): data = torch.load(write_nanogpt(folder/"ckpt.pt", model, TOK), weights_only=True)
        self.model = nano.GPT(nano.GPTConfig(**data["model_args"])).eval()
        self.model.transformer.wte.weight = torch.nn.Parameter(self.model.lm_head.weight.clone())
        self.model.load_state_dict(data["model"], strict=False)
        for block in self.model.transformer.h: block.mlp.gelu = torch.nn.GELU(approximate="tanh")

    @torch.no_grad()
    def write(self, n, greedy=False):
        return self.model.generate(torch.tensor([[START]]), n, top_k=1 if greedy else None)[0, 1:].tolist()


class HuggingFace:
    "`GPT2LMHeadModel.generate` with its cache."
    def __init__(self, folder, model):
        from transformers import AutoModelForCausalLM
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def _generate(self, n, steps, **options):
        x = torch.arange(n)[:, None] % 28 if n > 1 else torch.tensor([[START]])
        return self.model.generate(x, attention_mask=torch.ones_like(x), min_new_tokens=steps, max_new_tokens=steps, pad_token_id=0,
                                   eos_token_id=None, suppress_tokens=[28], **options)[:, 1:].tolist()

    def write(self, n, greedy=False): return self._generate(1, n, **(dict(do_sample=False) if greedy else dict(do_sample=True, top_k=0)))[0]

    def batch(self, n, steps):
        start = CLOCK()
        self._generate(n, steps, do_sample=True, top_k=0)
        return CLOCK() - start


class CTranslate2:
    def __init__(self, folder, compute_type):
        import ctranslate2
        path = folder.parent/"ct2"
        if not path.exists(): ctranslate2.converters.TransformersConverter(str(folder)).convert(str(path))
        self.engine = ctranslate2.Generator(str(path), compute_type=compute_type, inter_threads=1, intra_threads=1)
        self.id = {c: i for i, c in enumerate(TOK.chars)}

    def _generate(self, starts, n, k):
        result = self.engine.generate_batch([[TOK.chars[i]] for i in starts], max_batch_size=len(starts), min_length=n, max_length=n,
                                            sampling_topk=k, sampling_temperature=1, include_prompt_in_result=False, suppress_sequences=[["<bos>"]])
        return [[self.id[w] for w in r.sequences[0]] for r in result]

    def write(self, n, greedy=False): return self._generate([START], n, 1 if greedy else 0)[0]

    def batch(self, n, steps):
        start = CLOCK()
        self._generate([i % 28 for i in range(n)], steps, 0)
        return CLOCK() - start


class LlamaCpp:
    "llama.cpp through its Python package: one `llama_decode` a step, its own sampler."
    def __init__(self, file, kind, block_size, sequences=1):
        import llama_cpp as L
        self.L, L.llama_log_set = L, L.llama_log_set
        self._quiet = L.llama_log_callback(lambda *_: None)
        L.llama_log_set(self._quiet, ctypes.c_void_p(0))
        L.llama_backend_init()
        if kind and not Path(f"{file}.{kind}").exists():
            p = L.llama_model_quantize_default_params()
            p.ftype, p.nthread = {"f16": 1, "q8_0": 7}[kind], 1
            if L.llama_model_quantize(str(file).encode(), f"{file}.{kind}".encode(), ctypes.byref(p)): raise SystemExit(f"no {kind}")
        self.file, self.block_size = f"{file}.{kind}" if kind else str(file), block_size
        self.model = L.llama_model_load_from_file(self.file.encode(), L.llama_model_default_params())
        self._open(sequences)

    def _open(self, sequences):
        L, p = self.L, self.L.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = self.block_size * sequences, max(512, sequences), 512, sequences
        p.n_threads = p.n_threads_batch = 1
        self.n, self.context, self.batch_ = sequences, L.llama_init_from_model(self.model, p), L.llama_batch_init(sequences, 0, 1)
        self.dist, self.first = L.llama_sampler_init_dist(1), L.llama_sampler_init_greedy()
        self.bias = L.llama_sampler_init_logit_bias(29, 1, (L.llama_logit_bias * 1)(L.llama_logit_bias(28, -math.inf)))

    def _run(self, ids, steps, sampler):
        L, b = self.L, self.batch_
        chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
        L.llama_sampler_chain_add(chain, self.bias), L.llama_sampler_chain_add(chain, sampler)
        L.llama_memory_clear(L.llama_get_memory(self.context), True)
        out = []
        for t in range(steps):
            b.n_tokens = len(ids)
            for i, id in enumerate(ids): b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = id, t, 1, i, 1
            if L.llama_decode(self.context, b): raise SystemExit("llama_decode failed")
            ids = [L.llama_sampler_sample(chain, self.context, i) for i in range(len(ids))]
            out.append(ids)
        return out

    def write(self, n, greedy=False): return [ids[0] for ids in self._run([START], n, self.first if greedy else self.dist)]

    def batch(self, n, steps):
        if n != self.n: self._open(n)
        start = CLOCK()
        self._run([i % 28 for i in range(n)], steps, self.dist)
        return CLOCK() - start


def make_model(size, corpus, steps):
    "The small model learns; the large one only needs its size."
    torch.manual_seed(1)
    model = GPT(config_for("gpt2", size))
    if size == "small": train(model, corpus, TrainConfig(steps=steps, seed=1))
    else:
        with torch.no_grad():
            for p in model.parameters(): p.add_(.02 * torch.randn_like(p))
    return model.eval()


def contenders(model, folder, nanogpt, guesser):
    "Everybody with the same weights."
    T = model.config.block_size
    guessing = {f"ours {d}, guessing": Ours(model, dtype=d, guesser=guesser) for d in ("float32", "bfloat16", "int8")} if guesser else {}
    hf, gguf = write_huggingface(folder/"hf", model, TOK), write_gguf(folder/"model.gguf", model, TOK)
    return {"nanoGPT": NanoGPT(nanogpt, folder, model), "Hugging Face": HuggingFace(hf, model),
            "llama.cpp f32": LlamaCpp(gguf, "", T), "llama.cpp f16": LlamaCpp(gguf, "f16", T), "llama.cpp q8_0": LlamaCpp(gguf, "q8_0", T),
            "CTranslate2 float32": CTranslate2(hf, "float32"), "CTranslate2 int8": CTranslate2(hf, "int8"),
            "ours torch": Ours(model, fast=False), "ours float32": Ours(model), "ours bfloat16": Ours(model, dtype="bfloat16"),
            "ours int8": Ours(model, dtype="int8"), **guessing, "engine": Running(model)}


EXACT = "nanoGPT", "Hugging Face", "llama.cpp f32", "CTranslate2 float32", "ours torch", "ours float32", "ours float32, guessing"

def same_text(all_, n):
    "How many greedy characters each contender has in common with PyTorch."
    expected = all_["ours torch"].write(n, greedy=True)
    common = {}
    for name, c in all_.items():
        if not hasattr(c, "write"): continue
        found = c.write(n, greedy=True)
        common[name] = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), n)
    if wrong := [name for name in EXACT if name in common and common[name] < n]: raise SystemExit(f"another greedy text: {wrong}, {common}")
    return dict(characters=n, in_common=common)


def in_turns(rounds, run, names, seldom=()):
    "Seconds of each contender in each round; those that are very slow run in one round only."
    times = {name: [] for name in names}
    for r in range(rounds + 1):
        for name in names:
            if name in seldom and r > 1: continue
            start = CLOCK()
            seconds = run(name)
            if r: times[name].append(seconds if seconds is not None else CLOCK() - start)  # round 0 warms up
        print(f"  round {r}", flush=True)
    return times


def table(times, characters, base):
    "Characters per second, and the ratio to `base` within a round."
    return {name: dict(chars_per_s=spread([characters / s for s in t], 0)) | {
        f"times {b}": spread([y / x for x, y in zip(t, times[b])], 2) for b in base if b in times} for name, t in times.items()}


def stream(all_, T, rounds, llama_bench):
    seconds, writers = {}, {n: c.generator._idle[0] for n, c in all_.items() if "guessing" in n}
    for w in writers.values(): w.steps = w.tokens = 0
    def write(name):
        n = max(1, int(.05 / seconds.get(name, 1)))
        start = CLOCK()
        for _ in range(n): all_[name].write(T - 1)
        seconds[name] = (CLOCK() - start) / n
        return seconds[name]
    names = [n for n, c in all_.items() if hasattr(c, "write")]
    slow = ("nanoGPT",) if T > 128 else ()
    out = dict(characters=T - 1, contenders=table(in_turns(rounds, write, names, slow), T - 1,
               ("CTranslate2 float32", "llama.cpp f32", "llama.cpp f16", "llama.cpp q8_0", "Hugging Face", "nanoGPT", "ours float32")))
    if writers: out["per_step"] = {n: round(w.tokens / w.steps, 2) for n, w in writers.items()}
    if llama_bench:
        files = {n: c.file for n, c in all_.items() if isinstance(c, LlamaCpp)}
        run = lambda f: json.loads(subprocess.run([llama_bench, "-m", f, "-p", "0", "-n", str(T - 1), "-t", "1", "-r", str(rounds), "-o", "json"],
                                                  capture_output=True, check=True).stdout)[0]
        out["llama-bench"] = {n: round(run(f)["avg_ts"]) for n, f in files.items()}
    return out


def batches(all_, T, rounds, sizes):
    out = {}
    for n in sizes:
        names = [name for name, c in all_.items() if hasattr(c, "batch") and name != "ours torch" and "guessing" not in name and (name != "Hugging Face" or n * T <= 16 * 128)]
        out[n] = table(in_turns(rounds, lambda name: all_[name].batch(n, T - 1), names), n * (T - 1),
                       ("CTranslate2 float32", "llama.cpp f32", "llama.cpp q8_0"))
    return {str(n): t for n, t in out.items()}


def first(all_, T, trials=200):
    "Milliseconds from the request to the first character, after a prompt of one character and of half a window."
    out = {}
    for name, n in itertools.product(("ours float32", "ours torch"), (1, T // 2)):
        ms, prompt = [], TOK.decode(np.arange(n) % 28)
        for seed in range(trials):
            start = time.perf_counter()
            next(iter(all_[name].generator.stream(TOK.encode(prompt), SamplingParams(seed=seed))))
            ms.append(1e3 * (time.perf_counter() - start))
        out[f"{name}, prompt of {n}"] = spread(ms, 3)
    return out


def past(all_, model, corpus, rounds):
    "A text of four windows by each rule, and what the rules cost in bits."
    T, n = model.config.block_size, 4 * model.config.block_size
    run = {"nanoGPT": lambda: all_["nanoGPT"].write(n)}
    for name, options in {"anchor": {}, "exact": dict(slide="exact"), "anchor torch": dict(fast=False)}.items():
        c = Ours(model, **options)
        run[name] = lambda c=c: c.write(n) and None
    text = np.array(corpus.val[:6_000], dtype=np.int64)
    windows = torch.from_numpy(text).unfold(0, T + 1, 1)
    with torch.no_grad():
        full = torch.cat([torch.log_softmax(model(w[:, :-1])[:, -1], -1).gather(1, w[:, -1:])[:, 0] for w in windows.split(256)])
    bits = dict(anchor=score(model, text)[T - 1:].mean() / math.log(2), exact=-full.mean().item() / math.log(2))
    return dict(characters=n, contenders=table(in_turns(rounds, lambda name: run[name]() and None, run), n, ("nanoGPT",)),
                bits_per_char={k: round(v, 4) for k, v in bits.items()}, scored=len(full))


def rows(model, repeats=200):
    "Microseconds of a step that reads 1 to 7 characters of one text: what guessing ahead would cost."
    decoder, out = fast_decoder(model), {}
    for n in range(1, 8):
        at, us = [np.arange(n) % 28, np.zeros(n, np.int64), np.arange(n) + model.config.block_size // 2], []
        for _ in range(repeats):
            start = time.perf_counter()
            decoder.step(*at)
            us.append(1e6 * (time.perf_counter() - start))
        out[n] = round(statistics.median(us), 1)
    return out


PREPARE = """
import time, torch
from microjulia.generation import Generator
from microjulia.gpt import GPT, GPTConfig
from microjulia.tokenizer import CharTokenizer
torch.set_num_threads(1)
generator, start = Generator(GPT(GPTConfig()), CharTokenizer()), time.perf_counter()
generator.prepare()
print(time.perf_counter() - start)
"""

def compiling():
    "Seconds until the kernel is ready in a new process: the first time on a machine, and after that."
    with tempfile.TemporaryDirectory() as cache:
        run = lambda: float(subprocess.run([sys.executable, "-c", PREPARE], env=os.environ | {"NUMBA_CACHE_DIR": cache},
                                           capture_output=True, text=True, check=True).stdout)
        return dict(compile_s=round(run(), 2), load_s=round(run(), 2))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    p.add_argument("--sizes", nargs="+", default=["small", "large"], choices=["small", "large"])
    p.add_argument("--parts", nargs="+", default=["stream", "batch", "first", "past"], choices=["stream", "batch", "first", "past"])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    p.add_argument("--text", nargs="+", help="files, folders or patterns that the small model is trained on and the guesser counted on")
    p.add_argument("--steps", type=int, default=200, help="steps that the small model is trained")
    p.add_argument("--llama-bench", help="llama.cpp's native bench program")
    p.add_argument("--out", type=Path, help="where the figures go; bench/results/generate.json without it. Parts measured before are kept")
    p.add_argument("--cpu-clock", action="store_true", help="on a busy machine: seconds of processor time, of all threads, for stream, batch and past")
    args = p.parse_args()
    if args.cpu_clock: globals()["CLOCK"] = time.process_time
    torch.set_num_threads(1)
    from transformers.utils import logging
    logging.set_verbosity_error()

    out = args.out or Path(__file__).parent/"results"/"generate.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    corpus = Corpus.from_paths(args.text)
    guesser = Guesser(corpus.train, 28)
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            model = make_model(size, corpus, args.steps)
            (Path(folder)/size).mkdir()
            all_, T = contenders(model, Path(folder)/size, args.nanogpt, guesser if size == "small" else None), model.config.block_size
            c = model.config
            part = found.setdefault(size, {}) | dict(clock="processor" if args.cpu_clock else "wall", shape=dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=T, vocab_size=28),
                                                     greedy=same_text(all_, T - 1))
            print(size, part["greedy"], flush=True)
            run = {"stream": lambda: dict(stream=stream(all_, T, args.rounds, args.llama_bench)),
                   "first": lambda: dict(first_ms=first(all_, T), rows_us=rows(model)),
                   "batch": lambda: dict(batch=part.get("batch", {}) | batches(all_, T, max(2, args.rounds // 2), args.batches)),
                   "past": lambda: dict(past=past(all_, model, corpus, max(3, args.rounds // 2))) if size == "small" else {}}
            for name in args.parts:
                part |= run[name]()
                found[size] = part
                out.write_text(json.dumps(found))
    if "first" in args.parts: found |= compiling()
    from importlib.metadata import version
    peers = {n: version(n) for n in ("transformers", "ctranslate2", "llama-cpp-python", "numba", "numpy")}
    save(out, found | machine() | dict(peers=peers))


if __name__ == "__main__": main()
