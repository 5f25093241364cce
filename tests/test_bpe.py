"Word pieces: the tokenizer's promises with any bytes, other people's files, learning, the extra."
import builtins, json, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

pytest.importorskip("tokenizers", reason="the extra [family] is not installed")
import tokenizers

from microjulia.checkpoint import load_checkpoint, save_checkpoint
from microjulia.corpus import Corpus, shipped_paths
from microjulia.family.bpe import ORIGINAL, BPETokenizer, _pieces, byte_symbols, train_bpe
from microjulia.generation import Generator, SamplingParams
from microjulia.gpt import GPT, GPTConfig
from microjulia.tokenizer import CharTokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
TEXTS = [p.read_text(encoding="utf-8") for p in shipped_paths()]
WHOLE, SMALL = train_bpe(TEXTS[:6], 700), train_bpe(TEXTS[:6], 500, alphabet=ORIGINAL)
ACCENTS = train_bpe(["l'été à Besançon, le garçon a été là. " * 5], 59, alphabet=" '.,abcdefghijklmnopqrstuvwxyzàçé")
texts = st.text(st.characters(), max_size=80) | st.text(st.sampled_from("aZ é—“’…?!.\n\t\r\u00a0\u0301\u200bﬁæß½Ωた。🦉\ufffd\x00"), max_size=80)


@pytest.mark.parametrize("t", [WHOLE, SMALL, ACCENTS], ids=["bytes", "original", "accents"])
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_round_trip(t, text):
    ids, report = t.encode_with_report(text)
    clean = t.normalize(text)
    assert ids.dtype == t.dtype and t.decode(ids) == clean == t.normalize(clean)
    assert report == t.report(text) and report.total == len(text) == report.kept + report.changed.total() + report.dropped.total()
    if t is WHOLE and not any(0xD800 <= ord(c) < 0xE000 for c in text): assert clean == text and report.kept == len(text)


@pytest.mark.parametrize("t", [WHOLE, SMALL], ids=["bytes", "original"])
def test_words_of_the_package(t, tmp_path):
    "Our ids are those of the package's own tokenizer from our file, and of one learnt there in the usual way."
    theirs = tokenizers.Tokenizer.from_file(str(t.save_json(tmp_path / "tokenizer.json")))
    text = t.normalize(TEXTS[7])
    assert t.encode(text).tolist() == theirs.encode(text).ids
    assert theirs.decode(theirs.encode(text).ids) == text
    assert theirs.token_to_id("<|pad|>") == 0 and theirs.token_to_id("<|eos|>") == 1


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab c\n'.sé"), max_size=300), st.integers(1, 40))
def test_pieces_cannot_be_seen(text, size):
    pieces = list(_pieces(text, size))
    assert "".join(pieces) == text
    assert [i for p in pieces for i in WHOLE.encode(p)] == WHOLE.encode(text).tolist()


def test_a_long_text_is_cut_and_whole():
    text = " ".join(TEXTS) * 3
    assert len(text) > 6 * 65536 and len(list(_pieces(text))) > 5
    assert WHOLE.decode(WHOLE.encode(text)) == text
    assert WHOLE.encode(text).tolist() == WHOLE._rust.encode(text).ids


def test_learning_repeats_and_respects_the_size():
    a, b = (train_bpe(TEXTS[:3], 400) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a.vocab_size == 400 and len(a.merges) == 400 - 258
    assert a != WHOLE and a != CharTokenizer() and "142 merges" in repr(a)
    larger = train_bpe(TEXTS[:3], 500)
    assert larger.merges[:142] == a.merges  # merges are learnt one after another
    assert train_bpe(iter(TEXTS[:3]), 400) == a
    assert train_bpe(TEXTS[0], 300) == train_bpe([TEXTS[0]], 300)


def test_size_of_the_original():
    "2000 = 2 + 39 + 1959."
    t = train_bpe(TEXTS, 2000, alphabet=ORIGINAL)
    assert (t.vocab_size, len(t.merges), t.dtype) == (2000, 1959, np.uint16)
    assert len(ORIGINAL) == 39 and SMALL.normalize("Ab\tC?\n7") == "ab c?\n "
    assert SMALL.decode(SMALL.encode("VIRTUE")) == "virtue"


@pytest.mark.skipif(not SHARED.exists(), reason="the specification's corpus is not beside the checkout")
def test_larger_size_of_the_original():
    "4000 = 2 + 39 + 3959, from the original's own data."
    text = (SHARED / "corpus" / "reference" / "microjulia_training_data_48.txt").read_text(encoding="utf-8")
    t = train_bpe([text], 4000, alphabet=ORIGINAL)
    assert (t.vocab_size, len(t.merges)) == (4000, 3959) and t.decode(t.encode(text[:5000])) == t.normalize(text[:5000])


def test_too_little_text_and_too_small_a_vocabulary():
    with pytest.warns(UserWarning, match="enough repeated pairs for 260 symbols, not 1000"): t = train_bpe("aab aab", 1000)
    assert t.vocab_size == 260
    with pytest.raises(ValueError, match="258 are needed"): train_bpe(TEXTS, 257)
    with pytest.raises(ValueError, match="41 are needed"): train_bpe(TEXTS, 40, alphabet=ORIGINAL)
    assert train_bpe(TEXTS, 258).merges == []


def test_every_byte_has_a_symbol():
    s = byte_symbols()
    assert len(s) == len(set(s.values())) == 256 and all(c.isprintable() and not c.isspace() for c in s.values())
    assert set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) == set(s.values())


def test_decode_takes_what_comes():
    ids = WHOLE.encode("the soul").tolist()
    for x in (ids, tuple(ids), iter(ids), np.array(ids), torch.tensor(ids)): assert WHOLE.decode(x) == "the soul"
    assert WHOLE.decode(np.int64(ids[0])) == WHOLE.decode(torch.tensor(ids[0])) == WHOLE.decode(ids[:1])
    assert WHOLE.decode([]) == "" == WHOLE.decode([0, 1])
    for bad, words in (([700], "id 700"), ([-1], "id -1"), ([0.5], "integers"), (np.zeros((2, 2), int), "row by row")):
        with pytest.raises(ValueError, match=words): WHOLE.decode(bad)


def test_half_a_character_is_shown_as_such():
    ids = WHOLE.encode("🦉")
    assert WHOLE.decode(ids[:2]) == "\ufffd" and WHOLE.decode(ids) == "🦉"


def test_warning():
    with pytest.warns(UserWarning, match="cannot be spelt") as caught: SMALL.encode("12345 abc")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WHOLE.encode("12345 Ψ")


# %% files

@pytest.mark.parametrize("t", [WHOLE, SMALL, ACCENTS], ids=["bytes", "original", "accents"])
def test_save_and_load(t, tmp_path):
    path = t.save(tmp_path / "new" / "folder")
    assert path.name == "vocab.json" and t.save(path.parent) == path  # the same again is no harm
    assert t == BPETokenizer.load(path) == BPETokenizer.load(path.parent) == load_tokenizer(path.parent) == load_tokenizer(path)
    t.save_json(tmp_path / "tokenizer.json")
    assert t == BPETokenizer.load(tmp_path) == BPETokenizer.load(tmp_path / "tokenizer.json")


def test_nothing_overwritten(tmp_path):
    WHOLE.save(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"): SMALL.save(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"): CharTokenizer().save(tmp_path)
    assert BPETokenizer.load(tmp_path) == WHOLE
    SMALL.save(tmp_path, overwrite=True)
    assert BPETokenizer.load(tmp_path) == SMALL


def test_the_packages_own_pair(tmp_path):
    "Files as the package writes them, without the head line, and with the merge `# #`."
    WHOLE._rust.model.save(str(tmp_path))
    assert BPETokenizer.load(tmp_path) == WHOLE
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    (tmp_path / "merges.txt").write_text("\n".join(lines[1:]), encoding="utf-8")
    assert BPETokenizer.load(tmp_path) == WHOLE
    (tmp_path / "vocab.json").write_text('{"#": 0, "##": 1}')
    (tmp_path / "merges.txt").write_text("# #\n")
    assert BPETokenizer.load(tmp_path).merges == [("#", "#")]


def test_merges_as_strings_or_as_pairs(tmp_path):
    WHOLE.save_json(tmp_path / "tokenizer.json")
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for form in (" ".join, list):
        data["model"]["merges"] = [form(m) for m in WHOLE.merges]
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        assert BPETokenizer.load(tmp_path) == WHOLE


def test_special_symbol_outside_the_vocabulary(tmp_path):
    data = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": [{"id": 2, "content": "<|end|>"}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    t = BPETokenizer.load(tmp_path)
    assert t.vocab_size == 3 and t.decode([0, 2, 1]) == "ab"


@pytest.mark.parametrize("change, words", [
    (dict(normalizer={"type": "NFC"}), "normalizer"), (dict(pre_tokenizer=None), "pre_tokenizer"),
    (dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "pre_tokenizer"),
    (dict(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"), (dict(model={"type": "WordPiece", "vocab": {"a": 0}}), "type"),
    (dict(model={"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}, "merges": []}), "byte_fallback"),
    (dict(model={"type": "BPE"}), "vocab"), (dict(added_tokens=[3]), "int"),
    (dict(model={"type": "BPE", "vocab": {"a": 0}, "merges": [3]}), "merge|int")])
def test_what_a_single_file_may_not_ask(change, words, tmp_path):
    data = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}} | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=words) as e: BPETokenizer.load(tmp_path)
    assert "\n" not in str(e.value) and "tokenizer.json" in str(e.value)


@pytest.mark.parametrize("vocab, merges, words", [
    ("{}", "", "empty"), ("[1]", "", "no JSON object"), ("{", "", "vocab.json"), ('{"a": 1}', "", "must be 0 to 0"), ('{"a": 0, "b": 0}', "", "each once"),
    ('{"a": "0"}', "", "must be 0"), ('{"a": true}', "", "must be 0"), ('{"<|pad|>": 0}', "", "no symbol for a single byte"),
    ('{"a": 0, "b": 1}', "a b", "merge 0"), ('{"a": 0, "aa": 1}', "a a\na", "merge 1"), ('{"a": 0, "aa": 1}', "a  a", "merge 0"),
    ('{"a": 0, "aa": 1}', "a a a", "merge 0")])
def test_bad_pairs(vocab, merges, words, tmp_path):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    with pytest.raises(ValueError, match=words) as e: BPETokenizer.load(tmp_path)
    assert "\n" not in str(e.value) and "vocab.json" in str(e.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.json with merges.txt"): BPETokenizer.load(tmp_path)
    WHOLE.save(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt is missing"): load_tokenizer(tmp_path)


# %% in the house

def test_model_checkpoint_and_generation(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=WHOLE.vocab_size, n_embd=16, block_size=16)).eval()
    save_checkpoint(tmp_path / "m", model, WHOLE)
    saved = load_checkpoint(tmp_path / "m")
    assert saved.tokenizer == WHOLE
    g = Generator(saved.model, saved.tokenizer)
    params = SamplingParams(max_new_tokens=40, seed=3, top_k=0, temperature=2.0)
    events = list(g.stream(WHOLE.encode("Virtue is"), params))
    ids = [e.id for e in events if e.id is not None]
    assert len(ids) == 40 and "".join(e.text for e in events) == WHOLE.decode(ids)
    with pytest.raises(ValueError, match="tokenizer has 500"): save_checkpoint(tmp_path / "n", model, SMALL)


def test_corpus():
    c = Corpus.from_texts(dict(a=TEXTS[0], b=TEXTS[1]), tokenizer=SMALL)
    assert c.train.dtype == np.uint16 and [w.characters for w in c.works] == [len(TEXTS[0]), len(TEXTS[1])]
    assert len(SMALL.decode(c.val)) / len(c.val) > 1.5
    assert SMALL.normalize(TEXTS[0]).startswith(SMALL.decode(c.train[:50]))


def test_a_missing_extra_is_one_line(monkeypatch):
    "Reading and decoding need no extra; learning and encoding name it."
    real = builtins.__import__
    def without(name, *args, **kw):
        if name.partition(".")[0] == "tokenizers": raise ImportError(name)
        return real(name, *args, **kw)
    monkeypatch.setattr(builtins, "__import__", without)
    t = BPETokenizer(WHOLE.vocab, WHOLE.merges)
    assert t.decode([300]) == WHOLE.decode([300])
    for use in (lambda: t.encode("a"), lambda: train_bpe(TEXTS, 300)):
        with pytest.raises(ValueError, match=r"extra \[family\]") as e: use()
        assert "\n" not in str(e.value)


def test_needs_no_torch():
    code = "import sys, microjulia.family.bpe; sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
