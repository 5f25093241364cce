"""The family compared: equal text, equal processor time, several seeds, bits per character on works nobody trained on.

    python bench/family.py BOOKS                # the figures in bench/results/family.json
    python bench/family.py BOOKS --seconds 3600 --out long.json
    python bench/family.py BOOKS --contenders gpt2 my-mixer monarchslm:monarch_order=torch

BOOKS is a folder of texts, of which every ninth in order of name is held out whole. Each contender is an architecture at its
size 1m, with changes of its config behind a colon. All see the same batches of a seed, each step the same for all, until
its processor time is used up: one thread, float formats as everywhere in the package, measured around the training steps
alone, so that what else the machine does disturbs little. All train by the package's default recipe; with several `--lrs`
each contender takes the one that was best for it in short runs, judged on the last tenth of the works it trains on. Every run
is a process of its own, and its figures are kept as soon as it ends: the same command goes on with the runs that are missing.
Beside them stand n-grams that have counted all of the same text.
"""
import argparse
import ast
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, peak, save, spread

BATCH, WINDOWS, POINTS, PROMPT = 8, 400, 8, "the nature of the soul is "


def read_books(paths, every=9):
    "A corpus of the works to train on, and the tokens and names of those held out."
    import numpy as np

    from microjulia.corpus import Corpus, find_texts, fingerprints, near_copies, read_work
    from microjulia.tokenizer import CharTokenizer
    texts = {p.stem: read_work(p) for p in find_texts(paths)}
    unseen = list(texts)[every // 2::every]
    for pair in near_copies({name: fingerprints(text) for name, text in texts.items()}):
        if len(set(pair) & set(unseen)) == 1: raise SystemExit(f"{' and '.join(pair)} are nearly the same text: leave one out")
    tokenizer = CharTokenizer()
    corpus = Corpus.from_texts({name: t for name, t in texts.items() if name not in unseen}, tokenizer)
    return corpus, np.concatenate([tokenizer.encode(tokenizer.normalize(texts[name])) for name in unseen]), unseen


def build(contender, seed):
    "A fresh model, such as of `juliaslm:head_layout=julia_flat`."
    import torch

    from microjulia.gpt import build_model, config_for
    arch, _, changes = contender.partition(":")
    pairs = (c.split("=") for c in changes.split(",") if c)
    def value(text):
        try: return ast.literal_eval(text)
        except (ValueError, SyntaxError): return text
    torch.manual_seed(seed)
    return build_model(arch, config_for(arch, "1m", vocab_size=28).to_dict() | {k: value(v) for k, v in pairs})


def make_trainer(model, corpus, lr, seed, seconds):
    "A trainer whose clock is the processor time of its own steps."
    from microjulia.training import TrainConfig, Trainer

    class OnProcessorTime(Trainer):
        spent = 0.
        def progress(self): return min(1., self.spent / seconds)
        def train_step(self):
            start = time.process_time()
            done = super().train_step()
            self.spent += time.process_time() - start
            return done

    trainer = OnProcessorTime(model, corpus, TrainConfig(minutes=1, batch_size=BATCH, lr=lr, seed=seed, warmup_iters=25))
    model.train()
    return trainer


def bits(model, tokens, windows=WINDOWS):
    "Bits per character on evenly spaced windows."
    import torch

    from microjulia.training import evaluate, get_dtype
    dtype = get_dtype(torch.device("cpu"))
    return round(evaluate(model, tokens, model.config.block_size, windows, dtype=dtype) / math.log(2), 4)


def write_sample(model, tokenizer):
    "A text of 200 characters, and the cache of one text in kilobytes."
    from microjulia.generation import Generator, SamplingParams
    text = Generator(model, tokenizer).generate(PROMPT, SamplingParams(max_new_tokens=200, seed=1))
    return text, round(model.new_cache(1).nbytes / 1024)


def one_run(kind, contender, lr, seed, seconds, data):
    "Train one contender and measure it, or for `tuning` its loss alone; `data` is a folder with the tokens."
    import numpy as np
    import torch

    from microjulia.corpus import Corpus
    from microjulia.tokenizer import CharTokenizer
    torch.set_num_threads(1)
    train, val, unseen = (np.load(Path(data, f"{name}.npy")) for name in ("train", "val", "unseen"))
    corpus, curve, made = Corpus(train, val, CharTokenizer(), [], ""), [], []

    def run():
        trainer = make_trainer(build(contender, seed), corpus, lr, seed, seconds)
        made.append(trainer)
        while trainer.progress() < 1:
            trainer.train_step()
            if trainer.progress() * POINTS >= len(curve) + 1:
                tokens = trainer.step * BATCH * trainer.block_size
                curve.append([round(trainer.spent, 1), tokens, bits(trainer.model, val, 32)])
    mb = peak(run)
    trainer, model = made[0], made[0].model.eval()
    seen = bits(model, val, WINDOWS // 4)
    if kind == "tuning": return seen
    tokens = trainer.step * BATCH * trainer.block_size
    text, kb = write_sample(model, corpus.tokenizer)
    return dict(contender=contender, seed=seed, lr=lr, parameters=model.num_params(), steps=trainer.step, tokens=tokens,
                tokens_per_s=round(tokens / trainer.spent), seen_works=seen, unseen_works=bits(model, unseen),
                training_mb=round(mb), cache_kb=kb, curve=curve, sample=PROMPT + text)


def summary(runs):
    "For each contender, over its seeds: the spread of the loss and the middle of everything else."
    table = {}
    for name in dict.fromkeys(r["contender"] for r in runs.values()):
        mine = [r for r in runs.values() if r["contender"] == name]
        table[name] = dict(seeds=len(mine), lr=mine[0]["lr"]) | {
            k: spread([r[k] for r in mine], 4) for k in ("unseen_works", "seen_works")} | {
            k: spread([r[k] for r in mine], 0)["median"] for k in ("parameters", "tokens", "tokens_per_s", "training_mb",
                                                                   "cache_kb")}
    return table


def opened(path, settings):
    "The figures so far, if they were made in the same way."
    if not path.exists(): return settings | dict(tuning={}, runs={})
    found = json.loads(path.read_text(encoding="utf-8"))
    if differs := [k for k, v in settings.items() if found.get(k) != v]:
        raise SystemExit(f"{path} was made with other {', '.join(differs)}: give another --out")
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("books", nargs="*", help="files, folders or patterns")
    p.add_argument("--contenders", nargs="+", help="architectures; every one there is without it")
    p.add_argument("--seconds", type=float, default=30., help="processor time of a run; the short runs have a quarter")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--lrs", type=float, nargs="+", default=[.02], help="learning rates to choose from (default: 0.02)")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "family.json")
    p.add_argument("--case", nargs=6, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.case:
        kind, contender, lr, seed, seconds, data = args.case
        print(json.dumps(one_run(kind, contender, float(lr), int(seed), float(seconds), data)))
        return

    from microjulia.corpus import NgramModel
    from microjulia.gpt import arch_names
    contenders = args.contenders or arch_names()
    corpus, unseen, names = read_books(args.books)
    settings = dict(what="bits per character on whole works held out, after equal processor time on one thread",
                    seconds=args.seconds, batch_size=BATCH, windows=WINDOWS, lrs=args.lrs, held_out=names,
                    works=len(corpus.works), characters=len(corpus.train), sha256=corpus.sha256)
    result = opened(args.out, settings)
    with tempfile.TemporaryDirectory() as folder:
        import numpy as np
        for name, tokens in dict(train=corpus.train, val=corpus.val, unseen=unseen).items():
            np.save(Path(folder, f"{name}.npy"), tokens)

        def run(kind, key, contender, lr, seed, seconds):
            if key in result[kind]: return
            case = [kind, contender, *map(str, (lr, seed, seconds)), folder]
            done = subprocess.run([sys.executable, __file__, "--case", *case], check=True, text=True, stdout=subprocess.PIPE,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
            found = result[kind][key] = json.loads(done.stdout)
            result["table"] = summary(result["runs"])
            save(args.out, result | machine() | {"threads": 1}, show=False)
            print(key, found if kind == "tuning" else [found[k] for k in ("unseen_works", "seen_works", "tokens")], flush=True)

        for seed in range(args.seeds):
            for contender in contenders:
                tried = args.lrs if len(args.lrs) > 1 else []
                for lr in tried: run("tuning", f"{contender}/{lr}", contender, lr, 1000, args.seconds / 4)
                lr = min(args.lrs, key=lambda lr: result["tuning"].get(f"{contender}/{lr}", 0))
                run("runs", f"{contender}/{seed}", contender, lr, seed, args.seconds)
    if "counted" not in result:
        sizes = {n: NgramModel(n, corpus.tokenizer.vocab_size).fit(corpus.train).bits_per_char(unseen) for n in (2, 3, 5)}
        result["counted"] = {str(n): round(float(bits), 4) for n, bits in sizes.items()}
    result["table"] = summary(result["runs"])
    save(args.out, result | machine() | {"threads": 1}, show=False)
    print(json.dumps(dict(counted=result["counted"], table=result["table"]), indent=1))


if __name__ == "__main__": main()
