"The tokenizer: promises for every text and alphabet, files, errors."
import json, subprocess, sys, warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from microjulia.tokenizer import ALPHABET, CharTokenizer, Report, count_chars, load_tokenizer, replacement

SHARED = Path(__file__).resolve().parents[2] / "shared"
LARGE = "\n !\"'(),-.0123456789:;?abcdefghijklmnopqrstuvwxyz"
texts = st.text(st.characters(), max_size=80) | st.text(st.sampled_from("aZ é—“’…?!.\n\t\r\u00a0\u0301\u200bﬁæß½Ωた。"), max_size=80)
alphabets = (st.text(st.characters(), min_size=1, max_size=40) | st.sampled_from([ALPHABET, LARGE, "ABC ", "abc", "éà ?"])
             ).map(lambda s: "".join(dict.fromkeys(s)))


@settings(max_examples=400, deadline=None)
@given(alphabets, texts)
@example("a", "\ud800")
@example("\x00 a", "a\x01\x00b")
def test_round_trip(alphabet, text):
    t = CharTokenizer(alphabet)
    ids, clean = t.encode_with_report(text)[0], t.normalize(text)
    assert ids.dtype == t.dtype and len(ids) == len(clean)
    assert t.decode(ids) == clean
    assert t.normalize(clean) == clean
    assert set(clean) <= set(alphabet)


@settings(max_examples=300, deadline=None)
@given(alphabets, texts)
def test_report_adds_up(alphabet, text):
    t = CharTokenizer(alphabet)
    r = t.encode_with_report(text)[1]
    assert r == t.report(text)
    assert r.total == len(text) == r.kept + r.changed.total() + r.dropped.total()
    assert not any(c.isspace() for c in r.dropped)
    assert r.kept == sum(c in alphabet for c in text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(ALPHABET), max_size=200))
def test_the_quick_and_the_general_way_agree(text):
    expected = [ALPHABET.index(c) for c in text]
    assert CharTokenizer().encode(text).tolist() == expected
    assert CharTokenizer(ALPHABET + "é").encode(text).tolist() == expected


def test_pieces_join_and_every_place_is_checked():
    text = (ALPHABET * 20_000)[:300_001]  # more than one piece
    t = CharTokenizer()
    assert t.encode(text).tolist() == [ALPHABET.index(c) for c in text]
    for at in (0, 65_535, 65_536, 300_000):
        assert t.decode(t.encode(text[:at] + "#" + text[at + 1:])) == t.normalize(text[:at] + "#" + text[at + 1:])


@pytest.mark.parametrize("size, dtype", [(1, "uint8"), (255, "uint8"), (256, "uint8"), (257, "uint16"), (70_000, "uint32")])
def test_smallest_type(size, dtype):
    t = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + size))))
    ids = t.encode(t.chars)
    assert ids.dtype == t.dtype == dtype and ids.tolist() == list(range(size))
    assert t.decode(ids) == t.chars


@pytest.mark.parametrize("size", [128, 127, 1])
def test_whole_ascii(size):
    t = CharTokenizer("".join(map(chr, range(size))))
    assert t.encode(t.chars).tolist() == list(range(size))


@pytest.mark.parametrize("text, normal", [
    ("wait -- what?", "wait what."), ("What?!", "what.."), ("a  b", "a  b"), ("a , b", "a b"), ("a,b", "a b"), ("\u00a0a\tb\r\nc", " a b c"),
    ("it’s", "it s"), ("ﬁnd Œdipus, Cæsar", "find oedipus caesar"), ("élan e\u0301lan", "elan elan"), ("so\u00adcra\u200btes\ufeff", "socrates"),
    ("§ 5 £ ½ ©", " "), ("Ψυχή soul", " soul"), ("子曰。yes", " yes"), ("¿Qué?", " que."), ("Ⅳ", "iv"), ("…", "..."), ("", ""),
])
def test_rules_of_28(text, normal): assert CharTokenizer().normalize(text) == normal


@pytest.mark.parametrize("text, normal", [
    ("A—b “C” ’d… ½ ²", "a-b \"c\" 'd... 2"), ("one\r\ntwo", "one\ntwo"), ("what?", "what?"), ("№ 5", " 5"),
])
def test_rules_of_48(text, normal): assert CharTokenizer(LARGE).normalize(text) == normal


def test_no_space_no_period():
    assert CharTokenizer("abc").normalize("a, b? c!") == "abc"
    assert CharTokenizer("ABC").normalize("a b c d") == "ABC"
    assert CharTokenizer("γνω ").normalize("Γνῶ know") == "γνω "


def test_letters_never_come_from_signs():
    for alphabet in (ALPHABET, LARGE):
        for code in range(0x3000):
            new = replacement(chr(code), set(alphabet))
            if not chr(code).isalpha() and not chr(code).isnumeric(): assert not any(c.isalpha() for c in new), hex(code)


def test_warning():
    t = CharTokenizer()
    with pytest.warns(UserWarning, match="6 of 100"): t.encode("a" * 94 + "5" * 6)
    with pytest.warns(UserWarning, match="--alphabet auto") as caught: t.encode("12345 abc")
    assert "'1' 1" in str(caught[0].message) and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t.encode("A sentence with one comma, in thirty characters or so.")
        t.encode("a" * 95 + "5" * 5)  # exactly one in twenty
        t.encode("Newlines\n\n\n\n\n\nand CAPITALS are changed, not dropped")


def test_report_text():
    r = CharTokenizer().report("Ab, c\n\u200b")
    assert (r.total, r.kept) == (7, 3) and r.changed == Counter("A\n") and r.dropped == Counter(",\u200b")
    assert "U+200B" in str(r) and len(str(r).splitlines()) == 4
    both = r + r
    assert both.total == 14 and both.dropped[","] == 2 and both.share == r.share
    assert str(Report())


@given(texts)
def test_count_chars(text): assert count_chars(text) == Counter(text)


@settings(max_examples=100, deadline=None)
@given(alphabets)
def test_save_and_load(tmp_path_factory, alphabet):
    folder = tmp_path_factory.mktemp("t")
    t = CharTokenizer(alphabet)
    path = t.save(folder)
    assert path == folder / "vocab.json" and json.loads(path.read_text()) == list(alphabet)
    assert CharTokenizer.load(folder) == CharTokenizer.load(path) == load_tokenizer(folder) == t
    assert t.save(folder) == path  # the same again is no harm


def test_nothing_overwritten(tmp_path):
    CharTokenizer().save(tmp_path / "new" / "folder")
    with pytest.raises(FileExistsError, match="overwrite=True"): CharTokenizer("ab").save(tmp_path / "new" / "folder")
    CharTokenizer("ab").save(tmp_path / "new" / "folder", overwrite=True)
    assert CharTokenizer.load(tmp_path / "new" / "folder").chars == "ab"


@pytest.mark.parametrize("content, words", [
    ("", "not JSON"), ("[", "not JSON"), ("\x80", "not JSON"), ("{}", "microjulia.family.bpe|BPE"), ("3", "no JSON array"), ('"ab"', "no JSON array"),
    ("[]", "empty"), ('["a", "a"]', "more than once"), ('["a", "bc"]', "single characters"), ('["a", ""]', "single characters"), ("[1, 2]", "single characters"),
])
def test_bad_files(tmp_path, content, words):
    (tmp_path / "vocab.json").write_bytes(content.encode("latin-1"))
    if content == "{}" and load_bpe(): pytest.skip("the BPE tokenizer judges its own files")
    with pytest.raises(ValueError, match=words) as e: load_tokenizer(tmp_path)
    assert "\n" not in str(e.value) and "vocab.json" in str(e.value)


def load_bpe():
    try: import microjulia.family.bpe  # noqa: F401
    except ImportError: return False
    return True


def test_object_is_not_a_character_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="no JSON array"): CharTokenizer.load(tmp_path)


def test_missing_file(tmp_path):
    for f in (CharTokenizer.load, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="vocab.json"): f(tmp_path)


@pytest.mark.parametrize("alphabet, words", [("", "empty"), ("aba", "'a' more than once"), (["ab"], "single"), ([1], "single")])
def test_bad_alphabets(alphabet, words):
    with pytest.raises(ValueError, match=words): CharTokenizer(alphabet)


def test_decode_takes_what_comes():
    t, ids = CharTokenizer(), [9, 6, 13, 13, 16]
    torch = pytest.importorskip("torch")
    for x in (ids, tuple(ids), iter(ids), np.array(ids), np.array(ids, np.uint8), torch.tensor(ids), torch.tensor(ids, dtype=torch.uint8)):
        assert t.decode(x) == "hello"
    assert t.decode(np.int64(9)) == t.decode(torch.tensor(9)) == "h"
    assert t.decode([]) == t.decode(np.zeros(0, np.uint8)) == ""
    for bad, words in (([28], "id 28"), ([-1], "id -1"), ([0.5], "integers"), (np.zeros((2, 2), int), "row by row")):
        with pytest.raises(ValueError, match=words): t.decode(bad)


def test_equality():
    assert CharTokenizer() == CharTokenizer(list(ALPHABET)) and CharTokenizer("ab") != CharTokenizer("ba") and CharTokenizer("a") != "a"
    assert len({CharTokenizer(), CharTokenizer(), CharTokenizer("ab")}) == 2
    assert eval(repr(CharTokenizer("ab\n"))) == CharTokenizer("ab\n")
    assert CharTokenizer.from_text("banana\n").chars == "\nabn"
    with pytest.raises(ValueError, match="empty"): CharTokenizer.from_text("")


def test_needs_no_torch():
    code = "import sys, microjulia.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(not SHARED.exists(), reason="the specification's corpus is not beside the checkout")
def test_the_originals_data_stays_as_it_is():
    folder = SHARED / "corpus" / "reference"
    text = (folder / "juliagpt_training_data_28.txt").read_text(encoding="utf-8")
    assert CharTokenizer().normalize(text) == text.replace("\n", " ")
    text = (folder / "microjulia_training_data_48.txt").read_text(encoding="utf-8")
    t = CharTokenizer.from_text(text)
    assert t.vocab_size == 49 and t.decode(t.encode(text)) == text
