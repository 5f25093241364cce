"""The model of the package: measured on works it has never seen, then saved with the facts of its card.

    python bench/shipped.py BOOKS --report RUN --ship RUN      # figures in bench/results/shipped.json, model in microjulia/data/model

BOOKS are the works. RUN is a run folder of `microjulia train --recipe shipped`, or a checkpoint. The one for the report was
trained without the three works for choosing and the three for the report, and is scored on the latter, beside n-grams counted
on the same training text and compressors; its figures stand for the one to ship, made the same way from everything.
Needs pyppmd for the strongest compressor. About ten minutes on one CPU thread.
"""
import argparse
import bz2
import lzma
from pathlib import Path

import numpy as np
import torch
from common import machine, save
from recipes import CHOOSING, REPORT

from microjulia.api import load
from microjulia.checkpoint import load_checkpoint, resolve, save_checkpoint
from microjulia.corpus import Corpus, NgramModel, find_texts, read_work
from microjulia.exchange.datacard import sample_report
from microjulia.exchange.hub import model_card
from microjulia.generation import score

PROMPTS = ["virtue is ", "the soul ", "it is certain that ", "socrates said ", "we ought to ", "nature has ", "if a man ", "the mind "]
OUT = Path(__file__).parents[1] / "microjulia" / "data" / "model"


def bits(nats): return round(float(np.concatenate(nats).mean() / np.log(2)), 4)


def ppmd(data):
    "Bytes after PPMd (variant H) of order 10 with half a gigabyte of memory."
    import pyppmd
    encoder = pyppmd.Ppmd7Encoder(10, 512 << 20)
    return len(encoder.encode(data) + encoder.flush())


def compressors(train, works):
    "Bits a character of the works together, alone and after the training text."
    data, before = b"".join(works), ppmd(train)
    each = lambda n: round(8 * n / len(data), 4)
    return {"bzip2": each(len(bz2.compress(data, 9))), "xz": each(len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))),
            "PPMd": each(ppmd(data)), "PPMd after the training text": each(ppmd(train + b" " + data) - before)}


def anchors(train, tokenizer, works):
    "What n-grams and compressors make of the works."
    out = {}
    for order in (5, 10):
        model = NgramModel(order, tokenizer.vocab_size).fit(train)
        out[f"{order}-gram"] = bits([model.nats(ids) for ids in works.values()])
    text = lambda ids: tokenizer.decode(ids).encode("ascii")
    return out | compressors(text(train), [text(ids) for ids in works.values()])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("books", nargs="+", help="files, folders or patterns")
    p.add_argument("--report", type=Path, required=True, help="run trained without the six works")
    p.add_argument("--ship", type=Path, required=True, help="run trained on everything")
    p.add_argument("--dtype", default="float16", choices=["float16", "int8"], help="how the weights are stored")
    p.add_argument("--note", default="", help="what the card is to say about the runs")
    p.add_argument("--cpu-hours", type=float, help="of the run to ship, as the machine counted them")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shipped.json")
    args = p.parse_args()

    torch.set_num_threads(1)
    files, dtype = {p.stem: p for p in find_texts(args.books)}, getattr(torch, args.dtype)
    kept = Corpus.from_paths([p for name, p in files.items() if name not in REPORT], held_out=CHOOSING)
    works = {name: kept.tokenizer.encode(read_work(files[name])) for name in REPORT}
    found = dict(report=REPORT, choosing=CHOOSING, characters=sum(map(len, works.values())), train_characters=len(kept.train))
    found["bits_per_char"] = anchors(kept.train, kept.tokenizer, works)

    judged = load_checkpoint(resolve(args.report))
    temp = save_checkpoint(args.out.parent / ".stored", judged.model, judged.tokenizer, judged.step, dtype=dtype, overwrite=True)
    for name, model in {"this model in float32": judged.model, "this model": load_checkpoint(temp).model}.items():
        nats = {work: score(model, ids) for work, ids in works.items()}
        found["bits_per_char"][name] = bits(nats.values())
    found["by_work"] = {work: bits([n]) for work, n in nats.items()}
    for f in temp.iterdir(): f.unlink()
    temp.rmdir()

    final = load_checkpoint(resolve(args.ship))
    facts = dict(
        data=f"{len(files)} public-domain works of philosophy, cleaned: " + ", ".join(files),
        split=f"figures: trained without {', '.join(CHOOSING)} (for choosing) and {', '.join(REPORT)} (for these figures); "
              "the weights: trained in the same way on all works but " + final.facts.get("held_out", "the last tenth of each"),
        seed=final.facts["train"]["seed"], cpu_hours=args.cpu_hours, note=args.note or None,
        bits_per_char_on_unseen_works=found["bits_per_char"],
        limits="It continues text in the manner of Victorian translations, letter by letter; it knows no facts, answers no "
               "question and holds the opinions of its sources. Lower case, full stops, no other marks.")
    save_checkpoint(OUT, final.model, final.tokenizer, final.step, final.facts.get("val_loss"), facts=facts, dtype=dtype, overwrite=True)
    shipped = load(OUT, "cpu")
    samples = [prompt + shipped.generate(prompt, max_new_tokens=600, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    everything = Corpus.from_paths(list(files.values()))
    found["samples"] = sample_report(samples, np.concatenate([everything.train, everything.val]), shipped.tokenizer)
    facts |= dict(samples=samples[:2], about_the_samples=found["samples"])
    save_checkpoint(OUT, final.model, final.tokenizer, final.step, final.facts.get("val_loss"), facts=facts, dtype=dtype, overwrite=True)
    (OUT / "README.md").write_text(model_card(load_checkpoint(OUT)), encoding="utf-8")
    found |= dict(parameters=shipped.model.num_params(), shape=shipped.model.config.to_dict(), stored_as=args.dtype,
                  bytes=sum(f.stat().st_size for f in OUT.iterdir()), steps=final.step, cpu_hours=args.cpu_hours, note=args.note)
    command = "python bench/shipped.py BOOKS --report RUN --ship RUN" + f" --dtype {args.dtype}"
    save(args.out, machine() | dict(command=command) | found)


if __name__ == "__main__": main()
