"""What each step of cleaning takes away from raw books, and how fast it is.

    python bench/clean.py BOOKS                 # the figures in bench/results/clean.json

BOOKS are raw files or a folder of them. Speeds are bytes of the raw files by seconds of the processor, one thread, the median
over the rounds; the character step is the tokenizer's, from cleaned text to ids.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

from common import machine, save

from microjulia import corpus
from microjulia.corpus import clean_text, decode_bytes, drop_credits, find_texts, join_hyphens, strip_boilerplate, unwrap
from microjulia.tokenizer import CharTokenizer

tokenizer = CharTokenizer()
STEPS = {  # name -> what it does to a text (the first one: to bytes)
    "decode": decode_bytes,
    "line ends": lambda t: t.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", ""),
    "header and licence": unwrap,
    "credits": drop_credits,
    "marks of the page": lambda t: corpus._MARKS.sub(r"\1", t),
    "rules of signs": lambda t: corpus._RULE.sub("", t),
    "italics": lambda t: t.replace("_", ""),
    "hyphens at line ends": join_hyphens,
    "lines and blanks": clean_text,
    "28 characters": tokenizer.normalize,
}
WHOLE = {
    "all of the cleaning": lambda b: clean_text(strip_boilerplate(decode_bytes(b))),
    "cleaning and ids": lambda b: tokenizer.encode_with_report(clean_text(strip_boilerplate(decode_bytes(b))))[0],
}


def clocked(f, items):
    "Results and seconds of the processor."
    start = time.process_time()
    out = [f(x) for x in items]
    return out, time.process_time() - start


def one_round(raw):
    "Seconds and characters after each step."
    seconds, characters, texts = {}, {}, raw
    for name, f in STEPS.items():
        before = texts
        texts, seconds[name] = clocked(f, before)
        characters[name] = sum(map(len, texts))
    cleaned = [clean_text(strip_boilerplate(decode_bytes(b))) for b in raw]
    seconds["character step"] = clocked(lambda t: tokenizer.encode_with_report(t)[0], cleaned)[1]
    for name, f in WHOLE.items(): seconds[name] = clocked(f, raw)[1]
    return seconds, characters


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("books", nargs="+", help="raw files, folders or patterns")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "clean.json")
    args = p.parse_args()
    raw = [f.read_bytes() for f in find_texts(args.books)]
    size = sum(map(len, raw))
    rounds = [one_round(raw) for _ in range(args.rounds + 1)][1:]      # the first one warms up
    speed = {n: round(size / 1e6 / statistics.median(s[n] for s, _ in rounds), 1) for n in rounds[0][0]}
    before, steps = None, {}
    for name, n in rounds[0][1].items():
        steps[name] = dict(characters=n, taken=None if before is None else before - n, mb_per_s=speed[name])
        before = n
    save(args.out, machine() | dict(command="python bench/clean.py BOOKS" + "".join(f" {a}" for a in sys.argv[1 + len(args.books):]),
         files=len(raw), bytes=size, rounds=args.rounds, steps=steps, mb_per_s={n: speed[n] for n in ("character step", *WHOLE)}))


if __name__ == "__main__": main()
