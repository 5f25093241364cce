"""Which shape and which training suit a CPU: candidates of the shipped model after equal times of the processor.

    python bench/recipes.py BOOKS                        # all candidates, the figures in bench/results/recipes.json
    python bench/recipes.py BOOKS --only 4x192 "lr 0.01"   # some of them; their rows replace the old ones

Each candidate trains for the same processor time of one thread (its speed, measured first, says how many steps that is), the
learning rate falling to zero, on the works that are neither for choosing nor for the report; it is scored on the beginnings
of the three works for choosing.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import machine, save

from microjulia.corpus import Corpus, find_texts, read_work
from microjulia.generation import score
from microjulia.gpt import GPT, GPTConfig
from microjulia.tokenizer import CharTokenizer
from microjulia.training import TrainConfig, Trainer

CHOOSING = ["cicero_friendship_old_age_2808", "plato_symposium_1600", "russell_problems_5827-8"]
REPORT = ["boethius_consolation_14328-8", "mill_on_liberty_34901-8", "plato_gorgias_1672"]

BASE = dict(n_layer=4, n_head=4, n_embd=192, block_size=256)
CANDIDATES = {  # name -> what differs from BASE in the shape, and from the default recipe in the training
    "4x192": ({}, {}),
    "4x128": (dict(n_embd=128), {}),
    "4x256": (dict(n_embd=256), {}),
    "6x192": (dict(n_layer=6), {}),
    "6 heads": (dict(n_head=6), {}),
    "context 128": (dict(block_size=128), dict(batch_size=32)),
    "lr 0.01": ({}, dict(lr=.01)),
    "lr 0.04": ({}, dict(lr=.04)),
    "batch 8": ({}, dict(batch_size=8)),
    "batch 32": ({}, dict(batch_size=32)),
    "dropout 0.1": (dict(dropout=.1), {}),
    "AdamW": ({}, dict(optimizer="adamw")),
    "cosine": ({}, dict(schedule="cosine")),
    "plateau": ({}, dict(warmdown_ratio=.35)),
}


def trainer(corpus, shape, training, steps):
    torch.manual_seed(1337)
    t = Trainer(GPT(GPTConfig(**BASE | shape)), corpus, TrainConfig(steps=steps, **dict(batch_size=16) | training), device="cpu")
    t.model.train()
    return t


def clocked(t, steps):
    "Seconds of the processor for `steps` steps."
    start = time.process_time()
    for _ in range(steps): t.train_step()
    return time.process_time() - start


def measure(corpus, texts, shape, training, minutes):
    "Train one candidate for `minutes` of the processor, and score it."
    probe = trainer(corpus, shape, training, 1000)
    clocked(probe, 2)
    each = clocked(probe, 6) / 6
    t = trainer(corpus, shape, training, int(60 * minutes / each))
    used = clocked(t, t.steps)
    t.model.eval()
    nats = [score(t.model, ids) for ids in texts]
    read = t.steps * t.config.batch_size * t.block_size
    return dict(parameters=t.model.num_params(), steps=t.steps, characters=read, cpu_seconds=round(used),
                chars_per_cpu_s=round(read / used), bits_per_char=round(float(np.concatenate(nats).mean() / np.log(2)), 4))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("books", nargs="+", help="files, folders or patterns")
    p.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="NAME")
    p.add_argument("--minutes", type=float, default=2, help="of the processor, for each candidate")
    p.add_argument("--characters", type=int, default=60_000, help="scored of each work for choosing")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recipes.json")
    args = p.parse_args()

    torch.set_num_threads(1)
    files, tokenizer = {p.stem: p for p in find_texts(args.books)}, CharTokenizer()
    corpus = Corpus.from_paths([p for name, p in files.items() if name not in CHOOSING + REPORT])
    texts = [tokenizer.encode(read_work(files[name]))[:args.characters] for name in CHOOSING]
    for name in args.only:
        row = dict(minutes=args.minutes) | measure(corpus, texts, *CANDIDATES[name], args.minutes)
        print(name, row, flush=True)
        old = json.loads(args.out.read_text())["candidates"] if args.out.exists() else {}
        facts = machine() | dict(choosing=CHOOSING, report=REPORT, characters_scored=sum(map(len, texts)), base=BASE)
        save(args.out, facts | dict(candidates=old | {name: row}))


if __name__ == "__main__": main()
