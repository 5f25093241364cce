"""Bits per character of n-gram models on the last tenth of each work of a folder of books.

    python bench/ngram.py BOOKS                 # the figures in bench/results/ngram.json
    python bench/ngram.py BOOKS --orders 1 2 5

No clock in it: the figures depend on the books alone, which their checksum names.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from common import save

from microjulia.corpus import Corpus, NgramModel


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("books", nargs="+", help="files, folders or patterns")
    p.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 10])
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ngram.json")
    args = p.parse_args()

    corpus = Corpus.from_paths(args.books)
    size = corpus.tokenizer.vocab_size
    result = {
        "what": "interpolated modified Kneser-Ney, bits per character on the last tenth of each work",
        "works": len(corpus.works), "characters": len(corpus.train) + len(corpus.val), "alphabet": size,
        "sha256": corpus.sha256, "uniform": round(float(np.log2(size)), 3),
        "bits_per_char": {n: round(NgramModel(n, size).fit(corpus.train).bits_per_char(corpus.val), 3) for n in args.orders},
        "command": "python bench/ngram.py BOOKS" + "".join(f" {a}" for a in sys.argv[1 + len(args.books):]),
    }
    save(args.out, result)


if __name__ == "__main__": main()
