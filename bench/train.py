"""Training against nanoGPT: characters per second, and the time to a loss.

    python bench/train.py --nanogpt PATH                            # characters per second, the small size
    python bench/train.py --nanogpt PATH --size large --rounds 3
    python bench/train.py --nanogpt PATH --quality TEXT             # time to the loss that nanoGPT's recipe ends at

PATH is a checkout of karpathy/nanoGPT. Contenders take turns in one process on the same tokens, batch and shape; a ratio is
the median over the rounds of the ratio within a round. `nanoGPT` is its code as its train.py runs it on this device;
`nanoGPT bf16` has autocast switched on where the processor has bfloat16, as its users could do too. Of ours, `adamw float32`
against nanoGPT is what the code gains, `adamw` against that what the number format gains, and `muon` what one of its steps
costs. With `--quality`, both train to the end of their recipes on the first nine tenths of TEXT, in turns, and are measured
on all windows of the last tenth, outside the clock.
"""
import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from common import machine, save, spread

from microjulia.corpus import Corpus
from microjulia.gpt import GPT, GPTConfig, config_for
from microjulia.tokenizer import CharTokenizer
from microjulia.training import TrainConfig, Trainer, evaluate, get_device, get_dtype, lr_at


class NanoGPT:
    "nanoGPT's model and optimiser with the loop of its train.py: random windows, cosine, clipping."
    def __init__(self, path, tokens, shape, batch_size, device, steps=2000, lr=1e-3, bf16=False, compile=False, seed=0):
        if str(path) not in sys.path: sys.path.insert(0, str(path))
        import model as nano
        torch.manual_seed(seed)
        self.model = nano.GPT(nano.GPTConfig(**shape, dropout=0., bias=False)).to(device)
        self.forward = torch.compile(self.model) if compile else self.model
        self.optimizer = self.model.configure_optimizers(.1, lr, (.9, .99), device.type)
        self.tokens, self.T, self.B, self.device, self.steps, self.lr, self.step = tokens, shape["block_size"], batch_size, device, steps, lr, 0
        on = device.type == "cuda" or bf16
        self.context = torch.autocast(device.type, torch.bfloat16) if on else nullcontext()
        self.random = torch.Generator().manual_seed(seed)

    def batch(self):
        starts = torch.randint(len(self.tokens) - self.T, (self.B,), generator=self.random)
        cut = lambda i: torch.from_numpy(self.tokens[i:i + self.T].astype(np.int64))
        x, y = (torch.stack([cut(int(i) + k) for i in starts]) for k in (0, 1))
        if self.device.type != "cuda": return x, y
        return x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(self.device, non_blocking=True)

    def train_step(self):
        x, y = self.batch()
        warm = 100
        rate = lr_at(self.step, (self.step - warm) / max(1, self.steps - warm), self.lr, self.lr / 10, warm, "cosine")
        for group in self.optimizer.param_groups: group["lr"] = rate
        with self.context: _, loss = self.forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def val_loss(self, tokens, windows):
        logits = lambda ids: self.model(ids, ids)[0]
        logits.training, logits.eval, logits.train = False, lambda: self.model.eval(), lambda _: self.model.train()
        return evaluate(logits, tokens, self.T, windows, 64, self.device)


class Ours(Trainer):
    "Our trainer with the same interface."
    def val_loss(self, tokens, windows): return evaluate(self.model, tokens, self.block_size, windows, 64, self.device)


def ours(corpus, shape, batch_size, device, seed=0, steps=10**6, **config):
    torch.manual_seed(seed)
    config = TrainConfig(steps=steps, batch_size=batch_size, seed=seed, **config)
    trainer = Ours(GPT(GPTConfig(**shape)), corpus, config, device=device)
    trainer.model.train()
    return trainer


def clocked(contender, steps):
    "Seconds for `steps` steps, with what the device still has to do."
    start = time.perf_counter()
    for _ in range(steps): loss = contender.train_step()
    (loss[0] if isinstance(loss, tuple) else loss).item()
    return time.perf_counter() - start


def matmul_peak(device, dtype, n=2048, rounds=5):
    "Measured peak of a matrix product, floating point operations per second."
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    def once():
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        return time.perf_counter() - start
    return 2 * n**3 / min(once() for _ in range(rounds + 1))


def speed(args, corpus, shape, batch_size, device):
    "Characters per second of all contenders, in turns."
    fast = get_dtype(device)
    make = {"nanoGPT": lambda: NanoGPT(args.nanogpt, corpus.train, shape, batch_size, device),
            "adamw float32": lambda: ours(corpus, shape, batch_size, device, optimizer="adamw", dtype="float32"),
            "adamw": lambda: ours(corpus, shape, batch_size, device, optimizer="adamw"),
            "muon": lambda: ours(corpus, shape, batch_size, device)}
    if fast is torch.bfloat16: make["nanoGPT bf16"] = lambda: NanoGPT(args.nanogpt, corpus.train, shape, batch_size, device, bf16=True)
    if args.compile:
        make["nanoGPT compiled"] = lambda: NanoGPT(args.nanogpt, corpus.train, shape, batch_size, device, compile=True)
        make["muon compiled"] = lambda: ours(corpus, shape, batch_size, device, compile=True)
    contenders = {name: f() for name, f in make.items()}
    for c in contenders.values(): clocked(c, 3)
    rounds = []
    for r in range(args.rounds):
        rounds.append({name: clocked(c, args.steps) for name, c in contenders.items()})
        print(f"round {r}:", {k: round(args.steps * batch_size * shape["block_size"] / v) for k, v in rounds[-1].items()}, flush=True)
    n = args.steps * batch_size * shape["block_size"]
    c = GPTConfig(**shape)
    flops = 6 * (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size
    peak = {str(d).removeprefix("torch."): matmul_peak(device, d) for d in {torch.float32, fast}}
    return dict(shape=shape, batch_size=batch_size, matmul_peak={k: round(v / 1e9, 1) for k, v in peak.items()}, contenders={
        name: dict(chars_per_s=spread([n / r[name] for r in rounds], 0),
                   times_nanogpt=spread([r["nanoGPT"] / r[name] for r in rounds], 2),
                   gflops=round(flops * n / statistics.median(r[name] for r in rounds) / 1e9, 1)) for name in contenders})


def quality(args, corpus, shape, batch_size, device):
    "Time until our recipe has the loss that nanoGPT's recipe has at its end, in turns, for several seeds."
    rows = []
    for seed in range(args.seeds):
        nano = NanoGPT(args.nanogpt, corpus.train, shape, batch_size, device, steps=args.nano_steps, seed=seed)
        mine = ours(corpus, shape, batch_size, device, seed=seed, steps=args.our_steps)
        times, parts = {nano: 0., mine: 0.}, 20
        for _ in range(parts):
            for c, total in ((nano, args.nano_steps), (mine, args.our_steps)): times[c] += clocked(c, total // parts)
        losses = {c: c.val_loss(corpus.val, 10**9) for c in times}
        rows.append(dict(seed=seed, nanogpt=dict(steps=nano.step, seconds=round(times[nano], 1), val_loss=round(losses[nano], 4)),
                         ours=dict(steps=mine.step, seconds=round(times[mine], 1), val_loss=round(losses[mine], 4)),
                         reached=losses[mine] <= losses[nano], times_quicker=round(times[nano] / times[mine], 2)))
        print(rows[-1], flush=True)
    return dict(shape=shape, batch_size=batch_size, text=args.quality.name, characters=len(corpus.train) + len(corpus.val), runs=rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    p.add_argument("--size", default="small", choices=["small", "large"])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=20, help="steps of each contender in a round")
    p.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice without it")
    p.add_argument("--compile", action="store_true", help="add the compiled contenders")
    p.add_argument("--quality", type=Path, metavar="TEXT", help="measure the time to a loss on this text instead")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--nano-steps", type=int, default=2000)
    p.add_argument("--our-steps", type=int, default=500)
    p.add_argument("--out", type=Path, help="where the figures go; bench/results/train-SIZE.json or train-quality.json without it")
    args = p.parse_args()
    if args.threads: torch.set_num_threads(args.threads)

    device = get_device()
    config = config_for("gpt2", args.size)
    shape = {k: getattr(config, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")}
    batch_size = GPT.sizes["small"]["batch_size"] if device.type == "cpu" else GPT.sizes[args.size]["batch_size"]
    if args.quality:
        text = CharTokenizer().normalize(args.quality.read_text(encoding="utf-8"))
        corpus = Corpus.from_texts({args.quality.name: text}, CharTokenizer())
        found = quality(args, corpus, shape, batch_size, device)
    else: found = speed(args, Corpus.from_paths(), shape, batch_size, device)
    name = "train-quality" if args.quality else f"train-{args.size}"
    save(args.out or Path(__file__).parent / "results" / f"{name}.json", machine(device) | found)


if __name__ == "__main__": main()
