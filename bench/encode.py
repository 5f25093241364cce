"""How much quicker the tokenizer encodes than a list comprehension over the characters.

The comparison is with an encoder that gives the same answer, an array of bytes; the time of the bare
list of integers stands beside it.

    python bench/encode.py                      # the text that comes with the package
    python bench/encode.py --text book.txt

All encode the same 28-character text, in turn, round after round in one process; the figure is the median
over the rounds of the ratio of their processor times.
"""
import argparse, platform, statistics, sys, time
from importlib import resources
from pathlib import Path

import numpy as np
from common import cpu, save, spread

from microjulia.tokenizer import ALPHABET, CharTokenizer


def timed(f, *args):
    "Seconds of processor time that `f(*args)` takes."
    start = time.process_time()
    f(*args)
    return time.process_time() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, help="a UTF-8 text file; without it the shipped text")
    p.add_argument("--characters", type=int, default=2_000_000, help="length of the text, repeated to reach it")
    p.add_argument("--rounds", type=int, default=25)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encode.json")
    args = p.parse_args()

    folder = resources.files("microjulia") / "data" / "text"
    files = [args.text] if args.text else sorted(f for f in folder.iterdir() if f.name.endswith(".txt"))
    tokenizer = CharTokenizer()
    text = tokenizer.normalize("\n".join(f.read_text(encoding="utf-8") for f in files))
    text = (text * (args.characters // len(text) + 1))[:args.characters]
    table = {c: i for i, c in enumerate(ALPHABET)}
    def to_list(text): return [table[c] for c in text]
    def to_array(text): return np.array([table[c] for c in text], dtype=np.uint8)
    encoders = {"list comprehension to array": to_array, "list comprehension": to_list, "CharTokenizer.encode": tokenizer.encode}

    assert to_list(text) == tokenizer.encode(text).tolist()  # also the warm-up
    assert (to_array(text) == tokenizer.encode(text)).all()
    rounds = [{name: timed(f, text) for name, f in encoders.items()} for _ in range(args.rounds)]
    def ratio(name): return spread([r[name] / r["CharTokenizer.encode"] for r in rounds])
    result = {
        "what": "processor time of a list-comprehension encoder that returns the same array, divided by that of "
                "CharTokenizer.encode; same text, interleaved",
        "ratio": ratio("list comprehension to array"),
        "ratio_to_the_bare_list": ratio("list comprehension"),
        "characters_per_second": {n: round(len(text) / statistics.median(r[n] for r in rounds)) for n in encoders},
        "characters": len(text), "alphabet": len(ALPHABET), "rounds": args.rounds,
        "command": "python bench/encode.py" + "".join(f" {a}" for a in sys.argv[1:]),
        "machine": {"cpu": cpu(), "python": platform.python_version(), "numpy": np.__version__, "system": platform.system()},
    }
    save(args.out, result)


if __name__ == "__main__": main()
