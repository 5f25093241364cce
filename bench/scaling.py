"""How the loss falls with parameters and with text: the card's model in several sizes after several amounts of text, and a curve.

    python bench/scaling.py BOOKS                 # the figures in bench/results/scaling.json
    python bench/scaling.py BOOKS --tokens 1e6 3e6 9e6 27e6 --out longer.json

BOOKS is a folder of texts, of which every ninth in order of name is held out whole. Each run is one pass over as much of the
rest as it may read, by the package's default recipe. What comes out depends on seed and text, not on the machine's load, and a run
that is there is not made again. The curve L = E + A / N^a + B / D^b of Hoffmann et al. (2022), with N parameters and
D characters read, is fitted to all runs by least squares of log L, from many starts.
"""
import argparse
import itertools
import json
import math
from pathlib import Path

import torch
from common import machine, save
from family import bits, read_books

from microjulia.gpt import GPT, GPTConfig
from microjulia.training import TrainConfig, Trainer

SIZES = {"a": (2, 2, 32), "b": (2, 2, 48), "c": (3, 2, 64), "d": (4, 3, 96), "e": (4, 4, 128)}  # layers, heads, width
BATCH, BLOCK = 16, 128


def one_run(shape, tokens, corpus, unseen):
    "Train one model on so many characters, and measure it."
    torch.manual_seed(0)
    n_layer, n_head, n_embd = shape
    model = GPT(GPTConfig(vocab_size=28, block_size=BLOCK, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    steps = round(tokens / (BATCH * BLOCK))
    trainer = Trainer(model, corpus, TrainConfig(steps=steps, batch_size=BATCH))
    model.train()
    for _ in range(steps): trainer.train_step()
    model.eval()
    return dict(parameters=model.num_params(), characters=steps * BATCH * BLOCK,
                seen_works=bits(model, corpus.val), unseen_works=bits(model, unseen))


def curve(p, N, D):
    "E + A / N^a + B / D^b, N in 100,000 and D in millions, of the logarithms in `p`."
    E, A, a, B, b = p.exp()
    return E + A * (N / 1e5)**-a + B * (D / 1e6)**-b


def fit(runs):
    "The five numbers of the curve, and how far the runs are from it."
    N, D, L = (torch.tensor([r[k] for r in runs], dtype=torch.float64) for k in ("parameters", "characters", "unseen_works"))
    error = lambda p: (curve(p, N, D).log() - L.log()).pow(2).mean()
    best = None
    for start in itertools.product((.8, 1.3), (.2, .6), (.2, .6), (.2, .6), (.2, .6)):
        p = torch.tensor(start, dtype=torch.float64).log().requires_grad_()
        opt = torch.optim.LBFGS([p], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)
        def closure():
            opt.zero_grad()
            loss = error(p)
            loss.backward()
            return loss
        opt.step(closure)
        if torch.isfinite(found := error(p).detach()) and (best is None or found < best[0]): best = found, p.detach()
    return dict(zip("EAaBb", (round(float(x), 4) for x in best[1].exp())), rms_error=round(math.sqrt(float(best[0])), 4))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("books", nargs="+", help="files, folders or patterns")
    p.add_argument("--tokens", type=float, nargs="+", default=[1e6, 3e6, 9e6], help="characters that a run reads")
    p.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    args = p.parse_args()
    torch.set_num_threads(1)
    corpus, unseen, names = read_books(args.books)
    settings = dict(held_out=names, characters=len(corpus.train), sha256=corpus.sha256, batch_size=BATCH, block_size=BLOCK)
    found = json.loads(args.out.read_text()) if args.out.exists() else dict(settings, runs={})
    if any(found[k] != v for k, v in settings.items()): raise SystemExit(f"{args.out} was made with other books: give another --out")
    for tokens, size in itertools.product(args.tokens, args.sizes):
        key = f"{size}/{tokens:g}"
        if key not in found["runs"]:
            found["runs"][key] = one_run(SIZES[size], tokens, corpus, unseen)
            save(args.out, found | machine(), show=False)
            print(key, found["runs"][key], flush=True)
    if len(found["runs"]) > 5: found["fit"] = fit(found["runs"].values())
    save(args.out, found | machine(), show=False)
    print(json.dumps(found.get("fit")))


if __name__ == "__main__": main()
