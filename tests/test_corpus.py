"The corpus: cleaning of real and made-up books, splits, batches, n-grams, errors."
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from microjulia.corpus import (Corpus, NgramModel, check_length, clean_text, decode_bytes, discounts, eval_windows, find_texts,
                               fingerprints, gather, get_batch, hash64, near_copies, pack, read_pieces, read_work, shipped_paths,
                               split_work, splitmix64, strip_boilerplate, tokens_to, uniform, window_starts)
from microjulia.tokenizer import ALPHABET, CharTokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "corpus"
needs_books = pytest.mark.skipif(not SHARED.exists(), reason="the specification's corpus is not beside the checkout")
BODY = "CRUMBS\n\nThe wise man leaves a crumb\nfor the mouse; an effect\nproduced by its cause.\n\nNothing more."
LONG = "\n\nAnd so on, from crumb to crumb, until the table was clean and the mouse was fat." * 20
PROSE = ". ".join(f"the wise man of house {'abcdefgh'[i % 8] * (i + 1)} leaves a crumb on the table for the mouse" for i in range(60)) + "."


# Decoding

@pytest.mark.parametrize("name", ["utf-8", "utf-8-sig", "cp1252", "latin-1", "utf-16", "ascii"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings(tmp_path, name, end):
    text = "Crumbs\n\nThe wise man\nsaid nothing." if name == "ascii" else "Phædo\n\nThe café\nof Æsop."
    (tmp_path / "a.txt").write_bytes(text.replace("\n", end).encode(name))
    assert read_work(tmp_path / "a.txt") == clean_text(text) and "\ufeff" not in read_work(tmp_path / "a.txt")


@pytest.mark.parametrize("data", [b"\0", b"text\0text", bytes(range(256)), b"\x89PNG\r\n\x1a\n" + b"\1\2\3" * 9, b"\x81\x8d\x8f" * 5])
def test_binary(data):
    with pytest.raises(ValueError): decode_bytes(data)


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=60))
def test_utf8_comes_back(text):
    assert decode_bytes(text.encode()) == text.removeprefix("\ufeff")


# Wrappings

START, END = "*** START OF {} PROJECT GUTENBERG EBOOK CRUMBS ***", "*** END OF {} PROJECT GUTENBERG EBOOK CRUMBS ***"
HEAD, LICENCE = "The Project Gutenberg EBook of Crumbs, by Nobody\n\nThis eBook is for anyone.\n\n", "\n\nSection 1. trademark refund\n"
SMALL = ("***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy is this \"Small Print!\" here?\n\nIt is the law.\n"
         "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*")
OLD_HEAD = "*****The Project Gutenberg Etext of Crumbs*****\n\nKeep this etext.\n\n"
LAYOUTS = {
    "this": HEAD + START.format("THIS") + "\n\n" + BODY + "\n\n" + END.format("THIS") + LICENCE,
    "the": HEAD + START.format("THE") + "\n\n" + BODY + "\n\n" + END.format("THE") + LICENCE,
    "no blank": HEAD + START.format("THE").replace("*** ", "***") + "\n\n" + BODY + "\n\n" + END.format("THE").replace("*** ", "***") + LICENCE,
    "title over two lines": HEAD + START.format("THE").replace("EBOOK ", "EBOOK\nOF ") + "\n\n" + BODY + "\n\n" + END.format("THE") + LICENCE,
    "end of line": HEAD + START.format("THE") + "\n\n" + BODY + "\n\nEnd of Project Gutenberg's Crumbs, by Nobody\n\n" + END.format("THE") + LICENCE,
    "credits": HEAD + START.format("THE") + "\n\nProduced by A. Volunteer and the\nDistributed Proofreaders\n\n" + BODY + "\n\n" + END.format("THE"),
    "note above": HEAD + START.format("THE") + "\n\nTranscriber's Note:\n\nItalics are marked.\n\n" + BODY + "\n\n" + END.format("THE"),
    "note below": HEAD + START.format("THE") + "\n\n" + BODY + "\n\nmore." * 20 + "\n\nTranscriber's Notes\n\nA comma.\n\nTwo.\n\n" + END.format("THE"),
    "small print": OLD_HEAD + SMALL + "\n\n" + BODY + "\n\nEnd of this Project Gutenberg Etext of Crumbs\n",
    "small print at the end": OLD_HEAD + BODY + LONG + "\n\nMost people start at our etexts.\n\nWe need you.\n\n**The Legal Small Print**\n\n" + SMALL
                              + "\n\nEnd of the Project Gutenberg Etext of Crumbs\nby Nobody\n",
    "header alone": OLD_HEAD + BODY,
    "licence alone": BODY + "\n\n" + END.format("THE") + LICENCE,
    "archive": "Provided by The Internet Classics Archive.\nSee bottom for copyright. Available online at\n    http://x\n\n" + BODY
               + "\n\n" + "-" * 70 + "\n\nCopyright statement:\nThe Internet Classics Archive by D.\nAll rights reserved.\n",
    "wikisource": "This work is in the public domain in the United States because it is old.\n\n" + BODY
                  + "\n\nAbout this digital edition\n\n\nThis e-book comes from the online library Wikisource. It\n",
    "nothing": BODY,
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, end):
    text = clean_text(strip_boilerplate(LAYOUTS[layout].replace("\n", end)))
    expected = clean_text(BODY + {"note below": "\n\nmore." * 20, "small print at the end": LONG}.get(layout, ""))
    assert text == expected


def test_two_books_in_a_file():
    text = clean_text(strip_boilerplate(LAYOUTS["this"] + "\n\n" + LAYOUTS["the"].replace("CRUMBS\n", "SECOND\n")))
    assert text == clean_text(BODY) + "\n\n" + clean_text(BODY.replace("CRUMBS", "SECOND"))


@pytest.mark.parametrize("text", [
    "Produced by a quarrel.\n\nMine.", "Project Gutenberg is a library; I write about etexts.\n\nAnd the public domain.",
    "Transcriber's note\n\nis the title of my novel.", "THE END\n\n----------\n\nof the world", "*** START ***\n\nnow",
])
def test_own_text_is_left_alone(text): assert strip_boilerplate(text) == text


# The page

@pytest.mark.parametrize("text, clean", [
    ("_Ethics_, so __called__", "Ethics, so called"), ("word[12] word[3a] word[A], word[*]", "word word word, word"),
    ("[1] A note", "A note"), ("[I]t is [sic] so", "[I]t is [sic] so"), ("a [A] b", "a [A] b"), ("a {12} b", "a b"),
    ("[Footnote 3: See _Meno_.]", "See Meno."), ("[Sidenote: Of the soul]", "Of the soul"), ("x [Illustration] y [Illustration: a cat] z", "x y z"),
    ("[Pg 12] and [Page 3]", "and"), ("the word [Greek: logos] here", "the word here"), ("(Transcriber's note: see 4.) yes", "yes"),
    ("a\n* * * * *\nb", "a\n\nb"), ("a\n\n-----\n\nb\n\n\n\nc", "a\n\nb\n\nc"), ("a -- b\n-- c", "a -- b -- c"), ("  a \t b  ", "a b"),
    ("know-\nledge, knowledge", "knowledge, knowledge"), ("self-\nevident", "self-evident"), ("A--\nB", "A-- B"), ("", ""), (" \n\n ", ""),
    ("one\r\ntwo\r\n\r\nthree\rfour", "one two\n\nthree four"), ("1. First\n2. Second", "1. First 2. Second"),
])
def test_clean_text(text, clean): assert clean_text(text) == clean


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab ,\n'"), max_size=120))
def test_cleaning_twice_is_cleaning_once(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert "  " not in once and not re.search(r"\n(?!\n)(?<!\n\n)", once)


# Files

def test_find_texts(tmp_path, monkeypatch):
    for name in ("b.txt", "a.TXT", "deep/er/c.md", "picture.png", "noend"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    names = lambda paths: [str(p.relative_to(tmp_path)) for p in find_texts(paths)]
    assert names(tmp_path) == names(str(tmp_path)) == ["a.TXT", "b.txt", "deep/er/c.md"]
    assert names([tmp_path / "noend", tmp_path / "b.txt", tmp_path / "b.txt", tmp_path]) == ["a.TXT", "b.txt", "deep/er/c.md", "noend"]
    assert names(str(tmp_path / "**" / "*.md")) == ["deep/er/c.md"] and names(str(tmp_path / "?.txt")) == ["b.txt"]
    assert names((p for p in [tmp_path / "deep"])) == ["deep/er/c.md"]
    (tmp_path / "odd [1].txt").write_text("text")
    assert names(tmp_path / "odd [1].txt") == ["odd [1].txt"]


@pytest.mark.parametrize("make, error, words", [
    (lambda d: find_texts(d / "gone"), FileNotFoundError, "gone: no such file or folder"),
    (lambda d: find_texts(d / "bare"), ValueError, r"bare: no \*\.txt or \*\.md"),
    (lambda d: find_texts(str(d / "*.pdf")), ValueError, "no file matches"),
    (lambda d: find_texts([]), ValueError, "no paths given"),
    (lambda d: read_work(d / "gone.txt"), FileNotFoundError, "gone.txt: no such file"),
    (lambda d: read_work(d / "empty.txt"), ValueError, "empty.txt is empty"),
    (lambda d: read_work(d / "bytes.txt"), ValueError, "bytes.txt is not text but binary"),
    (lambda d: read_work(d / "rules.txt"), ValueError, "rules.txt: no text is left"),
    (lambda d: read_work(d / "bare"), ValueError, "is a folder"),
    (lambda d: Corpus.from_paths(d / "empty.txt"), ValueError, "empty.txt is empty"),
    (lambda d: Corpus.from_paths(d / "cjk.txt"), ValueError, "cjk: nothing is left.*--alphabet auto"),
    (lambda d: Corpus.from_texts({}), ValueError, "at least one"),
    (lambda d: check_length(128, 128, "training text"), ValueError, "training text has 128 tokens.*smaller block_size"),
    (lambda d: eval_windows(5, 5, 1), ValueError, "at least 6"),
])
def test_errors(tmp_path, make, error, words):
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(bytes(999))
    (tmp_path / "rules.txt").write_text("-----\n\n*****")
    (tmp_path / "cjk.txt").write_text("\u0301\u0301", encoding="utf-8")
    with pytest.raises(error, match=words) as e: make(tmp_path)
    assert len(str(e.value).splitlines()) == 1


def test_shipped_text():
    works = [read_work(p) for p in shipped_paths()]
    assert sum(map(len, works)) >= 100_000
    titles = [w.split("\n")[0] for w in works]
    assert len(set(titles)) == len(titles) and all(len(t) < 80 for t in titles)
    corpus = Corpus.from_paths()
    assert [w.name for w in corpus.works] == titles and corpus.report.share < .05
    assert not near_copies({t: fingerprints(w) for t, w in zip(titles, works, strict=True)})


# The corpus

@given(st.integers(0, 500))
def test_split(n):
    train, val = split_work(np.arange(n))
    assert len(val) == n // 10 and np.concatenate([train, val]).tolist() == list(range(n))


def test_works_are_joined_by_a_newline():
    for alphabet, joint in ((ALPHABET, " "), ("ab\n", "\n"), ("ab", "")):
        c = Corpus.from_texts({"x": "a" * 20, "y": "b" * 20}, CharTokenizer(alphabet))
        assert c.tokenizer.decode(c.train) == "a" * 18 + joint + "b" * 18
        assert c.tokenizer.decode(c.val) == "aa" + joint + "bb"
        assert [(w.name, w.characters) for w in c.works] == [("x", 20), ("y", 20)]


def test_order_of_paths_does_not_matter(tmp_path):
    for name in "abc": (tmp_path / f"{name}.txt").write_text(f"{name} wise man leaves a crumb. " * 9)
    paths = [tmp_path / f"{n}.txt" for n in "cab"]
    first, second = Corpus.from_paths(paths), Corpus.from_paths(tmp_path)
    assert first.sha256 == second.sha256 and [w.name for w in first.works] == ["a", "b", "c"]
    (tmp_path / "a.txt").write_text("another text. " * 20)
    assert Corpus.from_paths(tmp_path).sha256 != first.sha256


def test_checksum_covers_both_parts():
    shas = {Corpus.from_texts({"x": text}).sha256 for text in ("a" * 20, "b" + "a" * 19, "a" * 19 + "b")}
    assert len(shas) == 3


def test_names_of_equal_stems(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"text {folder} of a kind. " * 9)
    assert len({w.name for w in Corpus.from_paths(tmp_path).works}) == 2


@pytest.mark.parametrize("alphabet", ["default", "auto", "abc xyz", "".join(map(chr, range(32, 600)))])
def test_mapped_equals_in_memory(tmp_path, alphabet):
    for name in "abc": (tmp_path / f"{name}.txt").write_text(f"{name}: The wise man’s crumb.\n\nNo. {ord(name)} " * 9, encoding="utf-8")
    with pytest.warns(UserWarning) if alphabet in ("default", "abc xyz") else _no_warning():
        here = Corpus.from_paths(tmp_path, alphabet=alphabet)
        there = Corpus.from_paths(tmp_path, alphabet=alphabet, cache_dir=tmp_path / "cache", memory_limit=100)
    assert isinstance(there.train, np.memmap) and isinstance(there.val, np.memmap) and not isinstance(here.train, np.memmap)
    assert there.train.dtype == here.train.dtype == here.tokenizer.dtype
    assert np.array_equal(here.train, there.train) and np.array_equal(here.val, there.val)
    assert (here.sha256, here.works, here.tokenizer, str(here)) == (there.sha256, there.works, there.tokenizer, str(there))
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [f"{here.sha256[:16]}-{part}.bin" for part in ("train", "val")]
    for a, b in zip(get_batch(here.train, 1, 2, 3, 8), get_batch(there.train, 1, 2, 3, 8), strict=True): assert torch.equal(a, b)


def _no_warning():
    import warnings
    context = warnings.catch_warnings()
    context.__enter__(), warnings.simplefilter("error")
    class Done:
        def __enter__(self): pass
        def __exit__(self, *a): context.__exit__(*a)
    return Done()


def test_auto_keeps_everything():
    c = Corpus.from_texts({"x": "Καλλίπολις — the City!" * 5}, alphabet="auto")
    assert c.report.share == 0 and c.tokenizer.decode(c.train).startswith("Καλλίπολις — the City!")


def test_warnings():
    with pytest.warns(UserWarning, match="--alphabet auto"): Corpus.from_texts({"x": "1234567890 and"})
    with pytest.warns(UserWarning, match="one and two are nearly the same"):
        Corpus.from_texts({"one": PROSE, "two": PROSE.upper().replace("WISE MAN", "WISE\nMAN") + " and a new sentence of some length here."})


# Chance

@given(st.integers(-2**63, 2**63 - 1))
def test_numbers_and_tensors_hash_alike(x):
    assert splitmix64(torch.tensor([x])).item() & 2**64 - 1 == splitmix64(x) == splitmix64(x & 2**64 - 1) < 2**64


def test_published_outputs():
    gamma = 0x9E3779B97F4A7C15  # the generator adds it to its state each time
    assert [f"{splitmix64(i * gamma):016x}" for i in range(3)] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]


@given(st.integers(-2**70, 2**70), st.integers(0, 2**40), st.integers(0, 2**20))
def test_hash_of_mixed_keys(seed, step, row):
    expected = hash64(seed, step, row)
    t = lambda x: torch.tensor(x)
    for keys in ((seed, step, t(row)), (seed, t(step), row), (seed, t(step), t(row))):
        assert hash64(*keys).item() & 2**64 - 1 == expected


def test_uniform():
    us = np.array([uniform(7, i) for i in range(20_000)])
    assert us.min() >= 0 and us.max() < 1 and abs(us.mean() - .5) < .01 and abs((us**2).mean() - 1 / 3) < .01
    assert abs(np.corrcoef(us[:-1], us[1:])[0, 1]) < .03 and (us * 2**53 % 1 == 0).all()
    assert uniform(1, 5) == uniform(1, 5) != uniform(2, 5)


@pytest.mark.parametrize("n, block", [(10, 4), (5, 4), (1000, 128), (2**33, 256)])
def test_starts_are_in_range(n, block):
    starts = window_starts(n, 3, torch.arange(200)[:, None], torch.arange(50), block)
    assert starts.min() >= 0 and starts.max() <= n - block - 1
    if n < 100: assert set(starts.flatten().tolist()) == set(range(n - block))
    assert starts[7, 9] == (hash64(3, 7, 9) >> 1) % (n - block)  # the same in whole numbers


def test_starts_are_uniform():
    counts = torch.bincount(window_starts(164, 11, torch.arange(2000)[:, None], torch.arange(96), 64).flatten(), minlength=100).float()
    chi2 = ((counts - 1920)**2 / 1920).sum().item() / 99
    assert .6 < chi2 < 1.5


@pytest.mark.parametrize("kind", ["uint8", "uint16", "tensor", "memmap"])
def test_batches(tmp_path, kind):
    ids = np.random.default_rng(0).integers(0, 28, 5000).astype("uint16" if kind == "uint16" else "uint8")
    if kind == "memmap": (tmp_path / "t.bin").write_bytes(ids.tobytes())
    tokens = {"tensor": lambda: tokens_to(ids), "memmap": lambda: np.memmap(tmp_path / "t.bin", np.uint8, "r")}.get(kind, lambda: ids)()
    x, y = get_batch(tokens, 5, 17, 6, 32)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (6, 32) and torch.equal(x[:, 1:], y[:, :-1])
    starts = window_starts(5000, 5, 17, torch.arange(6), 32)
    for row, s in enumerate(starts.tolist()):
        assert x[row].tolist() == ids[s:s + 32].tolist() and y[row].tolist() == ids[s + 1:s + 33].tolist()
    parts = [get_batch(tokens, 5, 17, 6, 32, rows=torch.arange(r, 6, 3))[0] for r in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), x)
    assert torch.equal(get_batch(tokens, 5, torch.tensor(17), 6, 32)[0], x)
    assert not torch.equal(get_batch(tokens, 6, 17, 6, 32)[0], x) and not torch.equal(get_batch(tokens, 5, 18, 6, 32)[0], x)
    with pytest.raises(ValueError, match="5000"): get_batch(tokens[:5000], 5, 17, 6, 5000) if kind == "tensor" else check_length(5000, 5000, "5000")


def test_tokens_to():
    assert tokens_to(np.zeros(3, np.uint8)).dtype == torch.uint8 and tokens_to(np.full(3, 60_000, np.uint16)).tolist() == [60_000] * 3


@given(st.integers(2, 3000), st.integers(1, 300), st.integers(1, 60))
def test_eval_windows(n, block, count):
    if n <= block: return
    starts = eval_windows(n, block, count)
    assert len(starts) == len(set(starts.tolist())) == min(count, n - block) and starts.dtype == torch.int64
    assert starts[0] == 0 and starts[-1] + block + 1 <= n and (len(starts) == 1 or starts[-1] == n - block - 1)
    x, y = gather(np.arange(n), starts, block)
    assert torch.equal(x[:, 0], starts) and torch.equal(y[:, -1], starts + block)


# n-grams

def reference(train, test, order, V):
    "The same model written with dictionaries."
    levels, counts = [], Counter(tuple(train[i:i + order]) for i in range(len(train) - order + 1))
    for n in range(order, 0, -1):
        D, total, saved = discounts(np.array(list(counts.values()))), defaultdict(float), defaultdict(float)
        for g, c in counts.items():
            total[g[:-1]] += c
            saved[g[:-1]] += D[min(c, 3)]
        levels.insert(0, (counts, D, total, saved))
        counts = Counter(g[1:] for g in counts)
    out = []
    for i, w in enumerate(test):
        p = 1 / V
        for n, (counts, D, total, saved) in enumerate(levels, 1):
            if i < n - 1: break
            h = tuple(test[i - n + 1:i])
            if h in total: p = (counts[h + (w,)] - D[min(counts[h + (w,)], 3)] + saved[h] * p) / total[h]
        out.append(-math.log(p))
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.data())
def test_ngram_against_dictionaries(order, V, data):
    train = data.draw(st.lists(st.integers(0, V - 1), min_size=order, max_size=200))
    test = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=40))
    model = NgramModel(order, V).fit(np.array(train, np.uint8))
    assert np.allclose(model.nats(np.array(test, np.uint8)), reference(train, test, order, V), rtol=1e-9)
    for i in range(len(test)):
        p = model.probs(test[max(0, i - order + 1):i])
        assert abs(p.sum() - 1) < 1e-9 and (p > 0).all()
        assert math.isclose(-math.log(p[test[i]]), model.nats(test)[i], rel_tol=1e-9)


def test_ngram_on_shipped_text():
    c = Corpus.from_paths()
    bits = [NgramModel(n, 28).fit(c.train).bits_per_char(c.val) for n in (1, 2, 3, 5)]
    assert math.log2(28) > bits[0] > bits[1] > bits[2] > bits[3] > 1
    rng, model = np.random.default_rng(0), NgramModel(5, 28).fit(c.train)
    for _ in range(300): assert abs(model.probs(rng.integers(0, 28, rng.integers(0, 8))).sum() - 1) < 1e-9


@pytest.mark.parametrize("make, words", [
    (lambda: NgramModel(0, 28), "at least 1"), (lambda: NgramModel(14, 28), "64 bits"), (lambda: NgramModel(3, 28).fit([1, 2]), "too few"),
    (lambda: NgramModel(1, 28).fit([28]), "28"),
])
def test_ngram_errors(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_discounts():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 12, 8, 30])  # Y = 40 / (40 + 2 * 20) = 0.5
    assert np.allclose(discounts(counts), [0, 1 - 2 * .5 * 20 / 40, 2 - 3 * .5 * 12 / 20, 3 - 4 * .5 * 8 / 12])
    assert np.allclose(discounts(np.array([1, 2, 3])), [0, .5, 1, 1.5])
    assert (discounts(np.repeat([1, 2, 3, 4], [1, 9, 1, 9])) >= 0).all()


@given(st.lists(st.integers(0, 9), min_size=4, max_size=30), st.integers(1, 4))
def test_pack(ids, n):
    assert pack(np.array(ids, np.uint8), n, 10).tolist() == [int("".join(map(str, ids[i:i + n]))) for i in range(len(ids) - n + 1)]


# The real books

@pytest.fixture(scope="module")
def books():
    "The cleaned text of every book of the corpus, by the path in its manifest."
    works = json.loads((SHARED / "manifest.json").read_text(encoding="utf-8"))["works"]
    return {w["path"]: (read_work(SHARED / w["path"]), w) for w in works if not w["path"].startswith("reference")}


WORDS = ["gutenberg", "small print", "etext", "e-text", "ebook", "public domain", "internet classics", "transcriber", "pgdp", "proofread",
         "wikisource", "http:", "https:", "www.", "trademark", "501(c)", "big 5", "\nproduced by", "\nend of the project", "\nend of project"]
IN_A_WORD = re.compile(r"(?:pra?)etext|loose-text|note-?book")  # praetexta, pretext, loose-textured, note-book


@needs_books
def test_no_licence_survives(books):
    assert len(books) == 52
    found = {}
    for path, (text, _) in books.items():
        text = "\n" + text.lower()
        for word in WORDS:
            for m in re.finditer(re.escape(word), text):
                around = text[max(0, m.start() - 40):m.end() + 40]
                if not IN_A_WORD.search(text[max(0, m.start() - 6):m.end()]): found.setdefault(path, []).append(around)
    assert not found


@needs_books
def test_no_book_is_emptied(books):
    t = CharTokenizer()
    for path, (text, w) in books.items():
        if "prhkn10" in path: continue  # the manifest counts its licence; see the next test
        n = len(t.encode_with_report(text)[0])
        assert abs(n / w["clean28_chars"] - 1) < .02, (path, n, w["clean28_chars"])


@needs_books
def test_editions_agree(books):
    t = CharTokenizer()
    def length(name): return len(t.encode_with_report(next(text for path, (text, _) in books.items() if name in path))[0])
    assert abs(length("edge/berkeley") / length("raw/berkeley_principles") - 1) < .005
    assert abs(length("edge/marcus_aurelius_meditations_2680.txt") / length("pg2680") - 1) < .005
    pairs = near_copies({path: fingerprints(text) for path, (text, _) in books.items()})
    short = sorted(tuple(sorted(Path(p).stem.split("_")[0] for p in pair)) for pair in pairs)
    assert short == [("berkeley", "berkeley")] + [("marcus", "marcus")] * 3


@needs_books
@pytest.mark.parametrize("name, first, last", [
    ("plato_republic", "THE REPUBLIC", "which we have been describing."), ("plato_crito", "CRITO", "to follow whither he leads."),
    ("confucius", "THE CHINESE CLASSICS", "it is impossible to know men.'"), ("edge/berkeley", "A Treatise", "perfection of human nature."),
    ("long_mit", "The Meditations", "THE END"), ("seneca", "Moral letters", "Limited, Edinburgh."),
    ("plotinus", "PLOTINOS", "Of the Timaeus, p. 35."), ("spinoza_improvement", "On the Improvement", 'of the Understanding."'),
])
def test_first_and_last_words(books, name, first, last):
    text = next(text for path, (text, _) in books.items() if name in path)
    assert text.startswith(first) and text.endswith(last)


@needs_books
def test_the_published_ladder(books):
    c = Corpus.from_texts({path: text for path, (text, _) in books.items() if path.startswith("raw")})
    assert len(c.works) == 47 and abs(len(c.train) + len(c.val) - 18_035_241) < 20_000
    for order, bits in {2: 3.319, 5: 1.805}.items():  # DATA.md section 6, last 10 % of each work
        assert abs(NgramModel(order, 28).fit(c.train).bits_per_char(c.val) / bits - 1) < .02


@needs_books
@pytest.mark.parametrize("name", ["juliagpt_training_data_28.txt", "microjulia_training_data_48.txt"])
def test_a_book_without_blank_lines_is_not_taken_for_a_credit(name):
    "One paragraph of 800,000 characters, with the licence in its last lines."
    path = SHARED / "reference" / name
    text = read_work(path)
    assert .97 * path.stat().st_size < len(text) < path.stat().st_size and "registered trademark" not in text


TRAPS = [  # what, book, a passage as printed, the passage in 28 characters
    ("em dash", "cicero_academic", "he is said to have lived to a great age—to 78,\nor, according", "lived to a great age to or according"),
    ("em dash in a heading", "kant_pure_reason", "First Part—TRANSCENDENTAL AESTHETIC", "first part transcendental aesthetic"),
    ("curly apostrophe", "cicero_academic", "His father’s name was Mnesarchus", "his father s name was mnesarchus"),
    ("ligature", "aristotle_ethics", "hedonistic but it is eudæmomstic", "hedonistic but it is eudaemomstic"),
    ("ligature in Latin", "boethius", "Quantumlibet igitur sæviant mali", "quantumlibet igitur saeviant mali"),
    ("Greek", "cicero_academic", "which he\ncalled τὸ ἄπειρον, or The Infinite;", "which he called or the infinite"),
    ("Greek with accents", "marcus_aurelius", "The Stoics aspired to ἁπάθεια, the repression", "the stoics aspired to the repression"),
    ("Greek in brackets", "aristotle_ethics", "[Footnote: [Greek: hubpis] is introduced as", "is introduced as"),
    ("Chinese", "confucius", "【一節】子曰、 學而時習之、不亦說乎。【二", None),
    ("section mark", "marcus_aurelius", "At § XV. Book II. is usually reckoned", "at xv. book ii. is usually reckoned"),
    ("arrow", "seneca", "↑ How Seneca came by this “pointed” style", "how seneca came by this pointed style"),
    ("pound sign", "mill_on_liberty", "of the £200 which he offered.", "of the which he offered."),
    ("question mark", "aristotle_categories", "animal? It has none. Nor can", "animal. it has none. nor can"),
    ("double hyphen", "aristotle_categories", "these, therefore--that is to say", "these therefore that is to say"),
    ("numbered section", "cicero_friendship", "12. We may then lay down this rule of friendship--neither", "we may then lay down this rule of friendship neither"),
    ("Roman number", "cicero_academic", "IV. Then he replied. I will indeed", "iv. then he replied. i will indeed"),
    ("note number", "plotinus", "Origen (the\nPagan[12]) once came", "origen the pagan once came"),
    ("note number, curly edition", "seneca", "comrades[12] even against", "comrades even against"),
    ("footnote", "descartes_principles", "the most closely, [Footnote: Regius; see La\nVie", "the most closely regius see la vie"),
    ("italics", "aristotle_ethics", "The _Ethics_ of Aristotle is one half", "the ethics of aristotle is one half"),
    ("capitals", "hobbes", "FORME, & POWER OF A COMMON-WEALTH", "forme power of a common wealth"),
    ("abbreviation", "berkeley_principles", "against what we have advanced, viz. that there is no", "against what we have advanced viz. that there is no"),
    ("illustration", "aristotle_ethics", "[Illustration: Builder_Shoemaker House_Shoes.]", None),
]


@needs_books
@pytest.mark.parametrize("what, book, printed, clean", TRAPS, ids=[t[0] for t in TRAPS])
def test_traps_on_the_passage_itself(books, what, book, printed, clean):
    path = next(p for p in books if p.startswith(f"raw/{book}"))
    raw = decode_bytes((SHARED / path).read_bytes()).replace("\r\n", "\n")
    assert printed in raw
    at = raw.index(printed)
    line = raw[raw.rfind("\n\n", 0, at) + 2:raw.find("\n\n", at)]      # its paragraph
    words = CharTokenizer().normalize(clean_text(line))
    if clean is None: assert not CharTokenizer().normalize(clean_text(printed)).strip(" .")  # nothing is spelt out in Latin letters
    else: assert clean in words
    assert set(words) <= set(ALPHABET) and "  " not in words


@needs_books
def test_naive_transliteration_falls_into_the_traps(books):
    import unicodedata
    text = "age—to the eudæmon’s"
    naive = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    assert naive == "ageto the eudmons" and CharTokenizer().normalize(text) == "age to the eudaemon s"
    confucius = next(text for path, (text, _) in books.items() if path.startswith("raw/confucius"))
    assert abs(len(CharTokenizer().normalize(confucius)) / 155_016 - 1) < .02    # 226,708 with its Chinese in Latin letters


def test_large_files_come_in_pieces(tmp_path):
    text = "\r\n\r\n".join(f"The wise man number {i}\r\nleaves a “crumb”." for i in range(3000))
    (tmp_path / "dump.txt").write_bytes(text.encode())
    whole, pieces = read_work(tmp_path / "dump.txt"), list(read_pieces(tmp_path / "dump.txt", 10_000))
    assert len(pieces) > 10 and max(map(len, pieces)) < 21_000 and "\n\n".join(pieces) == whole
    (tmp_path / "line.txt").write_text("word " * 9000)
    assert " ".join(read_pieces(tmp_path / "line.txt", 1000)) == read_work(tmp_path / "line.txt")
    (tmp_path / "solid.txt").write_text("é" * 9000, encoding="utf-8")
    assert "".join(read_pieces(tmp_path / "solid.txt", 1001)).count("é") > 8900
    (tmp_path / "wide.txt").write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match="save it as UTF-8"): list(read_pieces(tmp_path / "wide.txt", 10_000))


def test_memory_of_pieces_is_bounded(tmp_path):
    import tracemalloc
    line = ("The wise man leaves a crumb for the mouse.\n" * 40 + "\n").encode()
    with open(tmp_path / "dump.txt", "wb") as f:
        for _ in range(6000): f.write(line)                              # 10 MB
    tracemalloc.start()
    total = sum(map(len, read_pieces(tmp_path / "dump.txt", 2**18)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 10**7 and peak < 40 * 2**18, peak


def test_works_held_out_whole():
    texts = {n: f"{n} wise man leaves a crumb on the table. " * 20 for n in "abcd"}
    c = Corpus.from_texts(texts, held_out=["b", "d"])
    assert c.tokenizer.decode(c.val) == " ".join(texts[n].rstrip() for n in "bd") or c.tokenizer.decode(c.val).startswith("b wise")
    assert "b wise" not in c.tokenizer.decode(c.train) and "c wise" in c.tokenizer.decode(c.train)
    assert len(c.train) + len(c.val) == sum(map(len, texts.values())) + 2
    assert "b, d" in str(c)
