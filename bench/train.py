"""Training against nanoGPT and Hugging Face: characters per second, and the time to a loss.

    python bench/train.py --nanogpt PATH                            # characters per second, the small size
    python bench/train.py --nanogpt PATH --size large --rounds 3
    python bench/train.py --nanogpt PATH --quality TEXT             # time to the loss that nanoGPT's recipe ends at
    python bench/train.py --ladder                                  # what each improvement of the code gains
    python bench/train.py --sweep TEXT                              # what the recipe was chosen by, on another split
    python bench/train.py --nanogpt PATH --quality TEXT --table     # on a GPU: the whole table, under 8 minutes

PATH is a checkout of karpathy/nanoGPT. Contenders take turns in one process on the same tokens, batch and shape; a ratio is
the median over the rounds of the ratio within a round. `nanoGPT` is its code as its train.py runs it on this device (float32
on a CPU, bfloat16 on a GPU that has it); `nanoGPT bf16` has autocast switched on on a CPU, as its users could do; `HF` is
GPT2LMHeadModel. Of ours, `float32` and `bf16` are AdamW in two number formats, `muon` is the default recipe and `nanochat` the
rates, momentum and schedule of karpathy/nanochat (its embedding rate scaled to our start) on this model and orthogonalisation.

With `--quality`, all train to the end of their recipes on the first nine tenths of TEXT, in turns, measured twenty times on
fixed windows of the last tenth inside the clock, and once on all windows after it. Two factors come apart: the code (nanoGPT's
recipe, its code against ours) and the recipe (our code, nanoGPT's recipe against ours). What is compiled is compiled before the clock
starts. `--sweep` trains on the first nine tenths
of those nine tenths and measures on the rest, so that what it chooses has not seen the text of `--quality`. Both append to
their result file, run by run, and leave out what it already holds.
"""
import argparse
import json
import math
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from common import machine, save, spread
from torch.nn import functional as F

from microjulia import attention
from microjulia.corpus import Corpus
from microjulia.gpt import GPT, GPTConfig, config_for
from microjulia.tokenizer import CharTokenizer
from microjulia.training import TrainConfig, Trainer, evaluate, get_device, get_dtype, lr_at

NANOGPT = dict(optimizer="adamw", lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_iters=100, beta2=.99)
CLOCK = time.perf_counter
WINDOWS, PARTS = 64, 20                                       # windows of an evaluation inside the clock; evaluations


class Peer:
    "A peer's model with the loop of nanoGPT's train.py: random windows, cosine, clipping."
    def __init__(self, build, bench, bf16=False, compile=False, seed=0):
        torch.manual_seed(seed)
        self.model, self.optimizer = build(bench)
        self.forward = torch.compile(self.model) if compile else self.model
        self.tokens, self.T, self.B, self.device = bench.corpus.train, bench.shape["block_size"], bench.batch_size, bench.device
        self.steps, self.step, self.random = bench.nano_steps, 0, torch.Generator().manual_seed(seed)
        dtype = bench.fast if self.device.type == "cuda" else torch.bfloat16 if bf16 else torch.float32
        self.context = lambda: nullcontext() if dtype is torch.float32 else torch.autocast(self.device.type, dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)

    def batch(self):
        starts = torch.randint(len(self.tokens) - self.T, (self.B,), generator=self.random)
        cut = lambda i: torch.from_numpy(self.tokens[i:i + self.T].astype(np.int64))
        x, y = (torch.stack([cut(int(i) + k) for i in starts]) for k in (0, 1))
        if self.device.type != "cuda": return x, y
        return x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(self.device, non_blocking=True)

    def train_step(self):
        x, y = self.batch()
        warm = NANOGPT["warmup_iters"]
        rate = lr_at(self.step, (self.step - warm) / max(1, self.steps - warm), 1e-3, 1e-4, warm, "cosine")
        for group in self.optimizer.param_groups: group["lr"] = rate
        with self.context(): _, loss = self.forward(x, y)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def warm(self):
        x, y = self.batch()
        with self.context(): self.forward(x, y)[1].backward()
        self.optimizer.zero_grad(set_to_none=True)

    def val_loss(self, tokens, windows=None, exact=False):
        logits = lambda ids: self.model(ids.contiguous(), ids.contiguous())[0]
        logits.training, logits.eval, logits.train = False, lambda: self.model.eval(), lambda _: self.model.train()
        with nullcontext() if exact else self.context(): return evaluate(logits, tokens, self.T, windows or len(tokens) // self.T, 64, self.device)


def nanogpt(path):
    "Builds nanoGPT's model and optimiser from the checkout at `path`."
    def build(bench):
        if str(path) not in sys.path: sys.path.insert(0, str(path))
        import model as nano
        model = nano.GPT(nano.GPTConfig(**bench.shape, dropout=bench.dropout, bias=False)).to(bench.device)
        return model, model.configure_optimizers(.1, 1e-3, (.9, .99), bench.device.type)
    return build


def hugging_face(bench):
    "Hugging Face's GPT-2 of the same shape, in nanoGPT's loop."
    from transformers import GPT2Config, GPT2LMHeadModel
    s, p = bench.shape, bench.dropout
    config = GPT2Config(vocab_size=s["vocab_size"], n_positions=s["block_size"], n_embd=s["n_embd"], n_layer=s["n_layer"],
                        n_head=s["n_head"], resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, use_cache=False)
    class Model(GPT2LMHeadModel):
        def forward(self, ids, targets):
            logits = super().forward(ids).logits
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    model = Model(config).to(bench.device)
    return model, torch.optim.AdamW(model.parameters(), 1e-3, (.9, .99), weight_decay=.1, fused=True)


class Ours(Trainer):
    "Our trainer with the interface of `Peer`."
    def __init__(self, bench, seed=0, steps=None, zero=False, tune=None, **config):
        torch.manual_seed(seed)
        config = TrainConfig(**dict(steps=steps or bench.our_steps, batch_size=bench.batch_size, seed=seed) | config)
        super().__init__(GPT(GPTConfig(**bench.shape, dropout=bench.dropout)), bench.corpus, config, device=bench.device)
        if zero:
            for b in self.model.blocks: torch.nn.init.zeros_(b.attn.proj.weight), torch.nn.init.zeros_(b.ffwd.net[2].weight)
        if tune: tune(self)
        self.model.train()

    def warm(self): self.seconds_per_pass(1)

    def val_loss(self, tokens, windows=None, exact=False):
        dtype = torch.float32 if exact else self.dtype
        return evaluate(self.model, tokens, self.block_size, windows or len(tokens) // self.block_size, 64, self.device, dtype=dtype)


class Naive:
    "The loop that everybody writes first, on our model: windows cut one by one, float32, AdamW as it comes."
    def __init__(self, bench, seed=0):
        torch.manual_seed(seed)
        self.model, self.tokens = GPT(GPTConfig(**bench.shape)).to(bench.device), torch.from_numpy(np.array(bench.corpus.train))
        self.optimizer, self.bench = torch.optim.AdamW(self.model.parameters(), 1e-3), bench

    def train_step(self):
        T, device = self.bench.shape["block_size"], self.bench.device
        starts = torch.randint(len(self.tokens) - T, (self.bench.batch_size,))
        x, y = (torch.stack([self.tokens[i + k:i + k + T].long() for i in starts]).to(device) for k in (0, 1))
        loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss


class Before(Ours):
    "Our trainer without the faster forms: the model as it is, attention by PyTorch's own if `library`, Muon in float32 if `full`."
    def __init__(self, bench, library=False, full=False, own=True, **config):
        super().__init__(bench, **config)
        if own: self.forward = self.model
        if full: self.optimizer.dtype = torch.float32
        if library:
            def forward(ids):
                kept, attention.causal_attention = attention.causal_attention, attend_by_library
                try: return self.model(ids)
                finally: attention.causal_attention = kept
            self.forward = forward


def attend_by_library(q, k, v, *rest): return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Nanochat(Ours):
    "nanochat's recipe: rates by part, momentum that moves, a long way down."
    def __init__(self, bench, **config):
        super().__init__(bench, grad_clip=0., warmup_iters=40, beta1=.8, beta2=.96, weight_decay=0., **config)
        scale = (bench.shape["n_embd"] / 768) ** -.5
        peaks = {"wte": .3 * scale * .02 / .8, "wpe": .3 * scale * .02 / .8, "lm_head": .008 * scale}
        names = {id(p): n for n, p in self.model.named_parameters()}
        vectors = [p for g in self.optimizer.param_groups if not g.get("muon") for p in g["params"]]
        keep = [g for g in self.optimizer.param_groups if g.get("muon")]
        like = next(g for g in self.optimizer.param_groups if not g.get("muon"))
        new = [like | dict(params=[p], peak=peaks.get(names[id(p)].split(".")[0], .5 * .01), eps=1e-10, weight_decay=0.) for p in vectors]
        self.optimizer.param_groups[:] = keep + new

    def lr(self, peak):
        left = (self.steps - self.step) / (.65 * self.steps)
        return peak * min(1., (self.step + 1) / 40, left + (1 - left) * .05)

    def train_step(self):
        down = max(0., 1 - (self.steps - self.step) / (.65 * self.steps))
        up = .85 + .12 * min(1., self.step / 400)
        self.optimizer.momentum = up if down == 0 else .97 + down * (.90 - .97)
        return super().train_step()


def clocked(contender, steps):
    "Seconds for `steps` steps, with what the device still has to do."
    start = CLOCK()
    for _ in range(steps): loss = contender.train_step()
    (loss[0] if isinstance(loss, tuple) else loss).item()
    return CLOCK() - start


def matmul_peak(device, dtype, n=2048, rounds=5):
    "Measured peak of a matrix product, floating point operations per second."
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    def once():
        start = CLOCK()
        for _ in range(repeat): c = a @ b
        c[0, 0].item()
        return (CLOCK() - start) / repeat
    repeat = 50 if device.type == "cuda" else 1
    return 2 * n**3 / min(once() for _ in range(rounds + 1))


class Bench:
    "One measurement: device, corpus, shape, and the contenders by name."
    def __init__(self, args, corpus):
        self.args, self.corpus, self.device = args, corpus, get_device(args.device)
        config = config_for("gpt2", args.size)
        self.shape = {k: getattr(config, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")}
        self.batch_size = 16 if self.device.type == "cpu" else GPT.sizes[args.size]["batch_size"]
        self.fast, gpu = get_dtype(self.device), self.device.type == "cuda"
        self.nano_steps = args.nano_steps or (5000 if args.size == "large" else 2000)
        self.our_steps = args.our_steps or (1500 if args.size == "large" else 600)
        self.dropout = .2 if gpu and args.quality else 0.
        self.recipe = dict(lr=.03) if args.size == "small" else {}       # for the length of its race, from the sweep

    def contenders(self, racing=False):
        "Name -> what makes it from a seed."
        peer = lambda build, **k: lambda seed: Peer(build, self, seed=seed, **k)
        mine = lambda kind=Ours, **k: lambda seed: kind(self, seed=seed, **k)
        path, gpu = nanogpt(self.args.nanogpt), self.device.type == "cuda"
        found = {"nanoGPT": peer(path), "float32": mine(optimizer="adamw", dtype="float32"), "bf16": mine(optimizer="adamw"),
                 "muon": mine(**self.recipe), "nanochat": mine(Nanochat), "same recipe": mine(**NANOGPT, steps=self.nano_steps),
                 "nanoGPT compiled": peer(path, compile=True), "muon compiled": mine(compile=True), "HF": peer(hugging_face)}
        if not gpu: found["nanoGPT bf16"] = peer(path, bf16=True)
        if gpu: found |= {"muon float16": mine(dtype="float16", graph=True), "muon graph": mine(graph=True),
                          "muon graph compiled": mine(graph=True, compile=True)}
        if self.args.only: return {k: v for k, v in found.items() if k in ("nanoGPT", *self.args.only)}
        drop = set() if self.args.quality else {"same recipe"}
        if racing: drop = {"float32", "bf16", "HF", "nanoGPT bf16", "muon float16"} | (set() if not gpu else {"nanoGPT", "same recipe", "nanochat", "muon", "muon compiled"})
        return {k: v for k, v in found.items() if k not in drop and (self.args.compile or "compiled" not in k)}

    def ladder(self):
        "One improvement after the other, on the code alone."
        mine = lambda kind=Before, **k: lambda seed: kind(self, seed=seed, **k)
        return {"the naive loop": lambda seed: Naive(self, seed), "one gather, fused AdamW": mine(Ours, optimizer="adamw", dtype="float32"),
                "bfloat16": mine(optimizer="adamw", library=True), "attention in the open": mine(optimizer="adamw"),
                "the exact GELU": mine(Ours, optimizer="adamw"), "Muon in float32": mine(full=True, own=False), "Muon in bfloat16": mine(Ours)}

    def flops(self):
        "Floating point operations of training on one character."
        s = self.shape
        return 6 * (12 * s["n_layer"] * s["n_embd"]**2 + s["vocab_size"] * s["n_embd"]) + 12 * s["n_layer"] * s["n_embd"] * s["block_size"]


def rounds_of(bench, makers, report):
    "Seconds of every contender in every round, in turns; `report` gets all rounds after each."
    contenders, rounds, n = {name: make(0) for name, make in makers.items()}, [], bench.args.steps
    for c in contenders.values(): clocked(c, 3)
    for r in range(bench.args.rounds):
        rounds.append({name: clocked(c, n) for name, c in contenders.items()})
        print(f"round {r}, ms a step:", {k: round(1e3 * v / n, 1) for k, v in rounds[-1].items()}, flush=True)
        report(rounds)


def ladder(bench, rounds):
    "Milliseconds of a step after each improvement, and how many times quicker than the one before."
    names = list(rounds[0])
    return dict(rounds=len(rounds), ladder=[dict(name=name, ms_per_step=spread([1e3 * r[name] / bench.args.steps for r in rounds], 2),
                             times_the_one_before=spread([r[before] / r[name] for r in rounds], 2))
                        for name, before in zip(names, names[:1] + names)])


def speed(bench, rounds, peak):
    "Characters per second of all contenders, and the factors between them."
    n = bench.args.steps * bench.batch_size * bench.shape["block_size"]
    full = lambda name: name in ("float32", "HF") or name.startswith("nanoGPT") and "bf16" not in name
    dtype = lambda name: torch.float32 if full(name) and bench.device.type == "cpu" else bench.fast
    times = lambda a, b: spread([r[a] / r[b] for r in rounds], 2)
    seconds = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    found = {name: dict(chars_per_s=spread([n / r[name] for r in rounds], 0), times_nanogpt=times("nanoGPT", name),
                        ms_per_step=round(1e3 * seconds[name] / bench.args.steps, 2),
                        share_of_peak=round(bench.flops() * n / seconds[name] / peak[dtype(name)], 2)) for name in seconds}
    pairs = {"code, float32": ("nanoGPT", "float32"), "number format": ("float32", "bf16"), "code, both bf16": ("nanoGPT bf16", "bf16"),
             "code and number format": ("nanoGPT", "bf16"), "a step of Muon": ("bf16", "muon")}
    return dict(rounds=len(rounds), matmul_peak_gflops={str(k).removeprefix("torch."): round(v / 1e9) for k, v in peak.items()}, contenders=found,
                factors={k: times(*p) for k, p in pairs.items() if {*p} <= {*seconds}})


def race(bench, seed):
    "All contenders to the end of their recipes, in turns; each with its seconds and losses."
    val, rows = bench.corpus.val, {}
    racers = {name: make(seed) for name, make in bench.contenders(racing=True).items()}
    for name, c in racers.items():
        start = CLOCK()
        c.warm()                                              # a pass that changes no weight: compilation is outside the clock
        rows[name] = dict(steps=c.steps, evals=[], seconds=0., first_pass_s=round(CLOCK() - start, 1))
    for part in range(1, PARTS + 1):
        for name, c in racers.items():
            start, row = CLOCK(), rows[name]
            clocked(c, c.steps * part // PARTS - c.step)
            loss = c.val_loss(val, WINDOWS)
            row["seconds"] += CLOCK() - start
            row["evals"].append((round(row["seconds"], 2), round(loss, 4)))
    for name, c in racers.items():
        rows[name] |= dict(seconds=round(rows[name]["seconds"], 1), val_loss=round(c.val_loss(val, exact=True), 4))
    return rows


def verdict(rows):
    "How much quicker ours reached the loss of nanoGPT, and by which factor; each at its fastest."
    theirs, mine = ("nanoGPT compiled", "muon graph compiled") if "muon graph compiled" in rows else ("nanoGPT", "muon")
    best = min(loss for _, loss in rows[theirs]["evals"])
    at = next((s for s, loss in rows[mine]["evals"] if loss <= best), None)
    quicker = lambda a, b: round(rows[a]["seconds"] / rows[b]["seconds"], 2)
    found = dict(theirs=theirs, ours=mine, reached=rows[mine]["val_loss"] <= rows[theirs]["val_loss"], times_quicker=quicker(theirs, mine),
                 best_loss_of_theirs=best, reached_by_ours_after_s=at)
    if "same recipe" in rows: found |= dict(code=quicker(theirs, "same recipe"), recipe=quicker("same recipe", mine))
    return found


def quality(bench, head, out):
    "Race for every seed that `out` lacks."
    held = json.loads(out.read_text()) if out.exists() else head | dict(runs=[])
    for seed in range(bench.args.seeds):
        if any(r["seed"] == seed for r in held["runs"]): continue
        rows = race(bench, seed)
        held["runs"].append(dict(seed=seed, **verdict(rows), contenders=rows))
        save(out, held)
    return held


def variants(n):
    "What the sweep tries at `n` steps: name -> arguments of `Ours`."
    def part(share):
        def tune(t):
            top = t.optimizer.param_groups[0]["peak"]
            for g in t.optimizer.param_groups:
                if not g.get("muon"): g["peak"] = share * top
        return dict(tune=tune)
    def set_(name, value): return dict(tune=lambda t: setattr(t.optimizer, name, value))
    found = {"as it is": {}, "zero-initialised": dict(zero=True), "weight decay 0": dict(weight_decay=0.), "no clipping": dict(grad_clip=0.),
             "beta2 0.99": dict(beta2=.99), "nanochat": dict(kind=Nanochat)}
    found |= {f"lr {lr}": dict(lr=lr) for lr in (.01, .015, .03, .04, .05)}
    found |= {f"AdamW part {s}": part(s) for s in (.2, .8, 1.5)}
    found |= {f"{k} rounds": set_("rounds", k) for k in (2, 3, 4)}
    found |= {f"momentum {m}": set_("momentum", m) for m in (.9, .97)}
    found |= {f"warm-up {w}": dict(warmup_iters=w) for w in (10, 100)}
    found |= {f"AdamW, lr {lr}": dict(optimizer="adamw", lr=lr) for lr in (.002, .004, .006, .01)}
    found |= {"lr 0.03, AdamW part 0.2": dict(lr=.03) | part(.2), "lr 0.03, warm-up 10": dict(lr=.03, warmup_iters=10),
              "lr 0.03, momentum 0.9": dict(lr=.03) | set_("momentum", .9), "lr 0.03, 4 rounds": dict(lr=.03) | set_("rounds", 4),
              "lr 0.03, batch 8, twice the steps": dict(lr=.03, batch_size=8, steps=2 * n), "lr 0.03, 4/3 of the steps": dict(lr=.03, steps=4 * n // 3),
              "lr 0.03, twice the steps": dict(lr=.03, steps=2 * n),
              "lr 0.04, 4/3 of the steps": dict(lr=.04, steps=4 * n // 3), "nanoGPT's recipe, 2000 steps": dict(NANOGPT, steps=2000)}
    return found


def sweep(bench, head, out):
    "The loss of every variant, for each seed, as far as `out` lacks them."
    held = json.loads(out.read_text()) if out.exists() else head | dict(variants={})
    for seed in range(bench.args.seeds):
        for name, change in variants(bench.our_steps).items():
            rows = held["variants"].setdefault(name, [])
            if len(rows) > seed or bench.args.only and name not in bench.args.only: continue
            t = change.pop("kind", Ours)(bench, seed=seed, **change)
            start = CLOCK()
            clocked(t, t.steps)
            rows.append(dict(seed=seed, steps=t.steps, cpu_s=round(CLOCK() - start, 1), val_loss=round(t.val_loss(bench.corpus.val, exact=True), 4)))
            print(name, rows[-1], flush=True)
            out.write_text(json.dumps(held, indent=1) + "\n")
    return held


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    p.add_argument("--size", default="small", choices=["small", "large"])
    p.add_argument("--device", help="cpu, cuda, ...; the fastest there is without it")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=20, help="steps of each contender in a round")
    p.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice without it")
    p.add_argument("--cpu-clock", action="store_true", help="one thread, by its processor time: for a machine that is busy with other things")
    p.add_argument("--compile", action="store_true", help="add the compiled contenders")
    p.add_argument("--only", nargs="+", help="these contenders beside nanoGPT, or these variants of a sweep")
    p.add_argument("--quality", type=Path, metavar="TEXT", help="measure the time to a loss on this text")
    p.add_argument("--sweep", type=Path, metavar="TEXT", help="try variants of the recipe on this text")
    p.add_argument("--ladder", action="store_true", help="what each improvement of the code gains")
    p.add_argument("--table", action="store_true", help="speed and quality of the large size, one seed, compiled: for a GPU")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--nano-steps", type=int)
    p.add_argument("--our-steps", type=int)
    p.add_argument("--out", type=Path, help="where the figures go; bench/results/train-NAME.json without it")
    args = p.parse_args()
    global CLOCK
    if args.cpu_clock: CLOCK, args.threads = time.process_time, 1
    if args.threads: torch.set_num_threads(args.threads)
    if not args.sweep and not args.ladder and not args.nanogpt: p.error("--nanogpt PATH: a checkout of karpathy/nanoGPT")
    if args.table: args.size, args.compile, args.seeds = "large", True, 1

    text = args.quality or args.sweep
    if text:
        chars = CharTokenizer().normalize(text.read_text(encoding="utf-8"))
        if args.sweep: chars = chars[:math.floor(.9 * len(chars))]
        corpus = Corpus.from_texts({text.name: chars}, CharTokenizer())
    else: corpus = Corpus.from_paths()
    bench = Bench(args, corpus)
    name = "gpu" if args.table else "quality" if args.quality else "sweep" if args.sweep else f"ladder-{args.size}" if args.ladder else args.size
    out = args.out or Path(__file__).parent / "results" / f"train-{name}.json"
    head = machine(bench.device) | dict(clock="processor time" if args.cpu_clock else "wall", shape=bench.shape, batch_size=bench.batch_size, dropout=bench.dropout, train=len(corpus.train),
                                        val=len(corpus.val), **(dict(text=text.name) if text else {}))
    peak = {d: matmul_peak(bench.device, d) for d in {torch.float32, bench.fast}}
    fast = {k: v for k, v in bench.contenders().items() if k != "same recipe"} if args.nanogpt else {}
    if args.sweep: sweep(bench, head, out)
    elif args.ladder: rounds_of(bench, bench.ladder(), lambda rounds: save(out, head | ladder(bench, rounds)))
    elif args.quality and not args.table: quality(bench, head, out)
    else: rounds_of(bench, fast, lambda rounds: save(out, head | speed(bench, rounds, peak)))
    if args.table:
        rows = race(bench, 0)
        save(out, json.loads(out.read_text()) | dict(runs=[dict(seed=0, **verdict(rows), contenders=rows)]))


if __name__ == "__main__": main()
