"""The model of the package: measured on works it has never seen, then saved with the facts of its card.

    python bench/shipped.py BOOKS                  # what n-grams and compressors make of the works for the report
    python bench/shipped.py BOOKS --report RUN     # what the model makes of them
    python bench/shipped.py BOOKS --ship RUN       # the model, with its card, to microjulia/data/model
    python bench/shipped.py BOOKS --average A B C  # checkpoints before the rate falls: the last one against their mean

BOOKS are the works. RUN is a run folder of `microjulia train --recipe shipped`, or a checkpoint. The one for the report was
trained without the three works for choosing and the three for the report, and is scored on the latter, beside n-grams counted
on the same training text and compressors; its figures stand for the one to ship, which was trained on everything. What a call
finds is added to bench/results/shipped.json. The strongest compressor needs pyppmd. A few minutes each on one CPU thread.
"""
import argparse
import bz2
import json
import lzma
import shutil
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


def judge(path, works, dtype, out):
    "The model on the works: all together, one by one, and what storing the weights has cost."
    judged = load_checkpoint(resolve(path))
    temp = save_checkpoint(out.parent / ".stored", judged.model, judged.tokenizer, judged.step, dtype=dtype, overwrite=True)
    stored = load_checkpoint(temp).model
    shutil.rmtree(temp)
    nats = {work: score(stored, ids) for work, ids in works.items()}
    before, after = (bits([score(m, ids[:60_000]) for ids in works.values()]) for m in (judged.model, stored))
    return dict(this_model=bits(list(nats.values())), by_work={work: bits([n]) for work, n in nats.items()},
                lost_by_storing=round(after - before, 4), steps=judged.step)


def average(paths, works):
    "The last of some checkpoints and the mean of all, on the works for choosing."
    opened = [load_checkpoint(resolve(p)) for p in paths]
    last = bits([score(opened[-1].model, ids) for ids in works.values()])
    states, model = [c.model.state_dict() for c in opened], opened[-1].model
    model.load_state_dict({n: torch.stack([s[n].double() for s in states]).mean(0) for n in states[0]})
    return dict(steps=[c.step for c in opened], last=last, mean=bits([score(model, ids) for ids in works.values()]))


def ship(path, files, found, args, dtype):
    "Save the model with its facts and its card; what its samples are like."
    final = load_checkpoint(resolve(path))
    facts = dict(
        data=f"{len(files)} public-domain works of philosophy, cleaned: " + ", ".join(files),
        split=f"figures: trained without {', '.join(CHOOSING)} (for choosing) and {', '.join(REPORT)} (for these figures); "
              f"the weights: {args.steps_before:,} steps on that text, then {final.step:,} on all works but {args.held_out}",
        seed=final.facts["train"]["seed"], cpu_hours=args.cpu_hours, note=args.note or None,
        bits_per_char_on_unseen_works=found["anchors"] | {"this model": found["report_run"]["this_model"]},
        limits="It continues text in the manner of Victorian translations, letter by letter; it knows no facts, answers no "
               "question and holds the opinions of its sources. Lower case, full stops, no other marks.")
    def write(facts):
        save_checkpoint(OUT, final.model, final.tokenizer, args.steps_before + final.step, final.facts.get("val_loss"),
                        facts=facts, dtype=dtype, overwrite=True)
        (OUT / "README.md").write_text(model_card(load_checkpoint(OUT), "microjulia/shipped"), encoding="utf-8")
    write(facts)
    shipped = load(OUT, "cpu")
    samples = [prompt + shipped.generate(prompt, max_new_tokens=600, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    everything = Corpus.from_paths(list(files.values()))
    report = sample_report(samples, np.concatenate([everything.train, everything.val]), shipped.tokenizer)
    write(facts | dict(samples=samples[:2], about_the_samples=report))
    return dict(parameters=shipped.model.num_params(), shape=shipped.model.config.to_dict(), stored_as=args.dtype,
                bytes=sum(f.stat().st_size for f in OUT.iterdir()), steps=args.steps_before + final.step, samples=report,
                val_loss=final.facts.get("val_loss"), held_out=args.held_out, cpu_hours=args.cpu_hours, note=args.note)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("books", nargs="+", help="files, folders or patterns")
    p.add_argument("--report", type=Path, help="run trained without the six works")
    p.add_argument("--ship", type=Path, help="run trained on everything")
    p.add_argument("--average", type=Path, nargs="+", help="checkpoints of one run, in order")
    p.add_argument("--steps-before", type=int, default=0, help="of the run that the one to ship goes on from")
    p.add_argument("--held-out", default="none", help="what the run to ship has not read")
    p.add_argument("--dtype", default="float16", choices=["float16", "int8"], help="how the weights are stored")
    p.add_argument("--cpu-hours", type=float, help="of the run to ship, as the machine counted them")
    p.add_argument("--note", default="", help="what the card is to say about the runs")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shipped.json")
    args = p.parse_args()

    torch.set_num_threads(1)
    files, dtype = {p.stem: p for p in find_texts(args.books)}, getattr(torch, args.dtype)
    kept = Corpus.from_paths([p for name, p in files.items() if name not in REPORT], held_out=CHOOSING)
    works = {name: kept.tokenizer.encode(read_work(files[name])) for name in REPORT}
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    if found.get("corpus_sha256") != kept.sha256:
        found = dict(report=REPORT, choosing=CHOOSING, characters=sum(map(len, works.values())), train_characters=len(kept.train),
                     corpus_sha256=kept.sha256, anchors=anchors(kept.train, kept.tokenizer, works))
    if args.average:
        begin = {name: kept.tokenizer.encode(read_work(files[name]))[:20_000] for name in CHOOSING}
        found["averaging"] = average(args.average, begin)
    if args.report: found["report_run"] = judge(args.report, works, dtype, args.out)
    if args.ship: found["shipped"] = ship(args.ship, files, found, args, dtype)
    save(args.out, machine() | dict(command="python bench/shipped.py BOOKS; --report RUN; --ship RUN") | {
        k: v for k, v in found.items() if k not in machine() and k != "command"})


if __name__ == "__main__": main()
