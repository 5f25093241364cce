"The command that compares the family: whole works held out, every run kept, a stopped comparison taken up again."
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCH = Path(__file__).parent.parent / "bench"
LETTERS = "abcdefghijkl"


@pytest.fixture
def family(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import family
    return family


@pytest.fixture
def books(tmp_path):
    "Twelve works, each of one letter and words of its own."
    folder = tmp_path/"books"
    folder.mkdir()
    for c in LETTERS: (folder/f"{c}.txt").write_text(f"{c * 5} {c * 7}. " * 200, encoding="utf-8")
    return folder


def test_whole_works_are_held_out(family, books):
    corpus, unseen, names = family.read_books([books])
    assert names == ["e"] and len(corpus.works) == 11
    text = corpus.tokenizer.decode(unseen)
    assert set(text) == set("e. ") and len(text) == len((books/"e.txt").read_text().strip())
    assert "e" not in corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val]))
    (books/"f.txt").write_text((books/"e.txt").read_text())  # the held-out work once more, under another name
    for c in "ef": (books/f"{c}.txt").write_text(" ".join(f"{w} is what the {w} of this long sentence was about." for w in map("".join, zip(
        *[iter("thequickbrownfoxjumpsoverthelazydogandrunsaway" * 20)] * 7, strict=False))))
    with pytest.raises(SystemExit, match="nearly the same text"): family.read_books([books])


def test_contenders_are_words_with_changes(family):
    assert family.build("juliaslm:head_layout=julia_flat,n_layer=2,tied=False", 0).config.to_dict().items() >= dict(
        head_layout="julia_flat", n_layer=2, tied=False, n_embd=128, vocab_size=28).items()
    with pytest.raises(ValueError, match="unknown hyperparameter"): family.build("gpt2:width=3", 0)


def test_a_stopped_comparison_goes_on(family, books, tmp_path, monkeypatch):
    out, asked = tmp_path/"family.json", []

    def fake(command, **_):
        _, _, _, kind, contender, lr, seed, seconds, data = command
        if len(asked) == 3: raise KeyboardInterrupt
        asked.append((kind, contender, seed))
        assert seconds == "9.0" and len(np.load(Path(data, "unseen.npy")))
        run = dict(contender=contender, seed=int(seed), lr=float(lr), parameters=1, tokens=2, tokens_per_s=3, seen_works=2.5,
                   unseen_works=2 + int(seed), training_mb=4, cache_kb=5)
        return SimpleNamespace(stdout=json.dumps(run))

    monkeypatch.setattr(family.subprocess, "run", fake)
    command = ["family.py", str(books), "--seconds", "9", "--contenders", "gpt2", "monarchslm", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt): family.main()
    assert list(json.loads(out.read_text())["runs"]) == ["gpt2/0", "monarchslm/0", "gpt2/1"]
    asked.clear()
    family.main()
    assert asked == [("runs", "monarchslm", "1"), ("runs", "gpt2", "2"), ("runs", "monarchslm", "2")]
    found = json.loads(out.read_text())
    assert found["counted"]["2"] > found["counted"]["5"] > 0
    assert found["table"]["gpt2"]["unseen_works"] == dict(median=3, quartiles=[2, 4], range=[2, 4]) and found["table"]["gpt2"]["seeds"] == 3
    monkeypatch.setattr(sys, "argv", [*command, "--seconds", "10"])
    with pytest.raises(SystemExit, match="made with other seconds"): family.main()


def test_the_best_learning_rate_of_short_runs_is_taken(family, books, tmp_path, monkeypatch):
    def fake(command, **_):
        _, _, _, kind, contender, lr, seed, seconds, _ = command
        if kind == "tuning": return SimpleNamespace(stdout=json.dumps(abs(float(lr) - .02)))
        return SimpleNamespace(stdout=json.dumps(dict.fromkeys(("parameters", "tokens", "tokens_per_s", "seen_works", "unseen_works",
            "training_mb", "cache_kb"), 1) | dict(contender=contender, lr=float(lr), seed=int(seed))))
    monkeypatch.setattr(family.subprocess, "run", fake)
    monkeypatch.setattr(sys, "argv", ["family.py", str(books), "--contenders", "gpt2", "--lrs", ".01", ".02", ".04", "--out", str(tmp_path/"x.json")])
    family.main()
    assert {r["lr"] for r in json.loads((tmp_path/"x.json").read_text())["runs"].values()} == {.02}
