"The front door: what is handed on, what is kept, what is refused."
import subprocess
import sys

import pytest
import torch

import microjulia
from microjulia.api import DEMO, MicroJulia, free_name, same_alphabet, sampler
from microjulia.corpus import Corpus
from microjulia.gpt import GPT, GPTConfig
from microjulia.tokenizer import CharTokenizer

torch.set_num_threads(1)
TINY = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, device="cpu", progress=[])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "t.txt"
    file.write_text("A friend is another self, and a city is many friends. " * 300)
    return file


@pytest.fixture(scope="module")
def model(text, tmp_path_factory): return microjulia.train(text, tmp_path_factory.mktemp("run") / "m", steps=60, **TINY)


def test_every_name_of_the_front_door_opens():
    for name in microjulia.__all__: assert getattr(microjulia, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'lode'"): microjulia.lode


def test_train_returns_the_best_checkpoint(text, tmp_path):
    m = microjulia.train(text, tmp_path / "r", steps=40, evals=8, lr=.5, min_lr=.5, schedule="cosine", **TINY)
    assert m.facts["facts"]["val_loss"] == m.facts["best_val_loss"]


def test_the_model_of_the_package_has_read_books():
    m = microjulia.load(device="cpu")
    assert m.tokenizer.vocab_size == 28 and m.model.wte.weight.dtype == torch.float32
    corpus = Corpus.from_paths()                                          # written for the package: none of it is in the books
    bits = m.score(corpus.tokenizer.decode(corpus.val[:6000]))["bits_per_char"]
    assert bits < m.score(corpus.tokenizer.decode(corpus.val[:6000][::-1]))["bits_per_char"] - 1
    told = m.facts["facts"]["bits_per_char_on_unseen_works"]
    assert told["this model"] < told["PPMd after the training text"] < told["10-gram"]


def test_saved_and_loaded_writes_the_same(model, tmp_path):
    again = microjulia.load(model.save(tmp_path / "copy"), "cpu")
    for temperature in (0, .8, 1.7):
        options = dict(seed=3, max_new_tokens=90, temperature=temperature)
        assert again.generate("a friend", **options) == model.generate("a friend", **options)
    assert again.score("a city is many friends.") == model.score("a city is many friends.")


def test_stream_chat_and_generate_agree(model):
    text = model.generate("A friend", seed=5, max_new_tokens=70)
    assert "".join(e.text for e in model.stream("A friend", seed=5, max_new_tokens=70)) == text
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "A friend"}]
    assert model.chat(messages, seed=5, max_tokens=70)["choices"][0]["message"]["content"] == text
    chunks = model.chat(messages, seed=5, max_tokens=70, stream=True)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text


def test_a_seed_decides_the_weights_of_a_run(text, tmp_path):
    one, two, three = (microjulia.train(text, tmp_path / str(i), steps=5, seed=s, dtype="float32", **TINY)
                       for i, s in enumerate((1, 1, 2)))
    assert torch.equal(one.model.wte.weight, two.model.wte.weight)
    assert not torch.equal(one.model.wte.weight, three.model.wte.weight)


def test_resume_through_the_front_door(text, tmp_path):
    whole = microjulia.train(text, tmp_path / "whole", steps=12, dtype="float32", **TINY)
    microjulia.train(text, tmp_path / "part", steps=12, dtype="float32", **TINY)
    again = microjulia.train(text, tmp_path / "part", steps=12, dtype="float32", resume=True, **TINY)
    assert torch.equal(whole.model.lm_head.weight, again.model.lm_head.weight)


def test_a_length_takes_the_place_of_the_recipes_own(text, tmp_path):
    m = microjulia.train(text, tmp_path / "short", recipe="shipped", minutes=.001, **{k: v for k, v in TINY.items() if k != "steps"})
    config = m.facts["facts"]["train"]
    assert (config["steps"], config["minutes"], config["warmdown_ratio"]) == (None, .001, .5)


def test_card_recipe_reaches_model_and_loop(text, tmp_path):
    m = microjulia.train(text, tmp_path / "card", recipe="card", steps=3, **TINY)
    c = m.model.config
    assert (c.init, c.norm_eps, c.dropout) == ("flux", 1e-10, .1) and m.facts["facts"]["precision"] == "float32"


def test_fine_tuning_keeps_alphabet_and_shape(model, text, tmp_path):
    start = model.save(tmp_path / "start")
    tuned = microjulia.train(text, tmp_path / "tuned", init_from=start, steps=2, dropout=.3, device="cpu", progress=[])
    assert tuned.tokenizer == model.tokenizer and tuned.model.config.n_embd == 32 and tuned.model.config.dropout == .3
    with pytest.raises(ValueError, match="own shape: leave out n_embd"):
        microjulia.train(text, tmp_path / "x", init_from=start, n_embd=64, device="cpu")
    with pytest.raises(ValueError, match="own shape: leave out size"):
        microjulia.train(text, tmp_path / "x", init_from=start, size="small", device="cpu")
    assert not (tmp_path / "x").exists()


def test_alphabet_auto_learns_the_text(text, tmp_path):
    m = microjulia.train(text, tmp_path / "auto", alphabet="auto", steps=2, **TINY)
    assert "A" in m.tokenizer.chars and m.generate("A friend", max_new_tokens=5, seed=1)


def test_vocabularies_that_differ_name_the_characters():
    same_alphabet(CharTokenizer("ab"), CharTokenizer("ba"))
    with pytest.raises(ValueError, match="lacks 'é'"): same_alphabet(CharTokenizer("ab"), CharTokenizer("abé"))


def test_nothing_is_written_over(text, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("years of work")
    for out in (tmp_path / "mine", text):
        with pytest.raises(ValueError): microjulia.train(text, out, steps=1, **TINY)
    assert (tmp_path / "mine" / "novel.txt").read_text() == "years of work"


def test_free_name_takes_files_into_account(tmp_path):
    (tmp_path / "run").write_text("")
    (tmp_path / "run-2").mkdir()
    assert free_name(tmp_path / "run").name == "run-3"


def test_samples_come_at_every_few_evaluations():
    m, t = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)), CharTokenizer()
    sample = sampler(t, every=3)
    assert [bool(sample(m)) for _ in range(7)] == [True, False, False, True, False, False, True]
    assert len(sampler(CharTokenizer("xyz"))(GPT(GPTConfig(vocab_size=3, n_layer=1, n_head=1, n_embd=8)))) > 100


def test_demo_says_how_it_compares(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = microjulia.demo(minutes=.03, device="cpu", progress=[])
    out = capsys.readouterr().out
    assert isinstance(made, MicroJulia) and (tmp_path / "demo" / "checkpoints").is_dir()
    for part in ("bigram", "5-gram", "this model", '"object":"text_completion"', "virtue is ", "microjulia generate"):
        assert part in out, part
    assert "The 5-gram wins" in out                     # after two seconds it does
    assert DEMO["size"] == "small" and made.tokenizer == Corpus.from_paths().tokenizer


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, microjulia; sys.exit(bool({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_word_pieces_are_scored_by_the_character(text, tmp_path):
    pytest.importorskip("tokenizers", reason="word pieces are learnt with the extra [family]")
    m = microjulia.train(text, tmp_path / "bpe", tokenizer="bpe", vocab_size=270, arch="juliafluxgpt", size="small", steps=3,
                         n_layer=1, n_embd=32, n_head=2, n_kv_head=1, block_size=32, device="cpu", progress=[])
    sentence = "a friend is another self."
    ids = m.tokenizer.encode(sentence)
    score = m.score(sentence)
    assert len(ids) < len(sentence) and score["characters"] == len(m.tokenizer.decode(ids[1:]))
    assert score["nats_per_char"] * score["characters"] == pytest.approx(float(m.nats(sentence).sum()))
    assert m.facts["facts"]["bits_per_char"] < m.facts["facts"]["val_loss"] / 0.6931
    assert microjulia.load(tmp_path / "bpe", "cpu").tokenizer == m.tokenizer
    with pytest.raises(ValueError, match="word pieces of its own"):
        microjulia.train(text, tmp_path / "x", init_from=tmp_path / "bpe", alphabet="abc", device="cpu")
    with pytest.raises(ValueError, match="known: chars, bpe"): microjulia.train(text, tmp_path / "x", tokenizer="words")
