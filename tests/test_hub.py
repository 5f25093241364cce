"Python's world: Hugging Face folders, nanoGPT, GGUF, the Hub."
import json
import pickle

import numpy as np
import pytest
import torch

from microjulia.checkpoint import load_checkpoint
from microjulia.exchange.gguf import byte_words, read_gguf, write_gguf
from microjulia.exchange.huggingface import load_pt, read_huggingface, read_pt, read_tokenizer, write_huggingface, write_nanogpt
from microjulia.gpt import GPT, GPTConfig
from microjulia.tokenizer import CharTokenizer


def random_model(seed=0, tied=False, **config):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24} | config)).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    if tied: model.lm_head.weight.data.copy_(model.wte.weight)
    return model


def logits(model, ids):
    with torch.no_grad(): return model(ids)


def close(a, b): return (a - b).abs().max() <= 1e-5 * b.abs().max()


def greedy(model, ids, n=12):
    ids = list(ids)
    for _ in range(n): ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    return ids


IDS = torch.randint(0, 28, (3, 24), generator=torch.Generator().manual_seed(1))
variants = [dict(), dict(bias=True), dict(tied=True), dict(norm_eps=1e-3), dict(n_layer=1, n_head=1)]


@pytest.mark.parametrize("config", variants, ids=str)
@pytest.mark.parametrize("bos", [True, False])
def test_folders_open_in_transformers_with_our_logits(config, bos, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(**config)
    path = write_huggingface(tmp_path/"hf", model, CharTokenizer(), dict(step=5, best_val_loss=1.5), bos=bos)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    out = logits(theirs, IDS).logits
    assert close(out[..., :28], logits(model, IDS)) and out.shape[-1] == 28 + bos
    assert theirs.config.tie_word_embeddings == bool(config.get("tied"))
    words = transformers.AutoTokenizer.from_pretrained(path)
    text = "virtue is. a"
    assert words(text)["input_ids"] == CharTokenizer().encode(text).tolist() and words.decode(words(text)["input_ids"]) == text
    assert len(words("VIRTUE 7 é\n")["input_ids"]) == 8  # what is unknown is dropped
    theirs.save_pretrained(tmp_path/"again")
    words.save_pretrained(tmp_path/"again")
    for folder in ("hf", "again"):
        back = read_huggingface(tmp_path/folder)
        assert back.tokenizer == CharTokenizer() and torch.equal(logits(back.model(), IDS), logits(model, IDS))
    assert read_huggingface(path).step == 5 and read_huggingface(path).best_val_loss == 1.5
    assert load_checkpoint(read_huggingface(path).save(tmp_path/"ours")).step == 5


@pytest.mark.parametrize("tie", [True, False])
def test_models_of_transformers_become_ours(tie, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=3, n_head=3, tie_word_embeddings=tie,
                                     initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters(): torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path/"hf", max_shard_size="20KB")
    assert (tmp_path/"hf/model.safetensors.index.json").is_file()
    back = read_huggingface(tmp_path/"hf")
    ids = torch.randint(0, 50, (2, 16))
    assert back.hyperparams["bias"] and close(logits(back.model(), ids), logits(theirs, ids).logits)
    with pytest.raises(ValueError, match="no vocab.json beside it"): back.save(tmp_path/"ours")
    index = json.loads((tmp_path/"hf/model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.wte.weight"] = "../../secret.safetensors"
    (tmp_path/"hf/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside of the folder"): read_huggingface(tmp_path/"hf")


def test_openais_own_names_and_masks(tmp_path):
    from safetensors.torch import load_file, save_file
    model = random_model(bias=True, tied=True)
    path = write_huggingface(tmp_path/"hf", model, CharTokenizer())
    state = {n.removeprefix("transformer."): x for n, x in load_file(path/"model.safetensors").items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    save_file(state, path/"model.safetensors")
    assert torch.equal(logits(read_huggingface(path).model(), IDS), logits(model, IDS))


def test_byte_pairs(tmp_path):
    pytest.importorskip("tokenizers")
    bpe = pytest.importorskip("microjulia.family.bpe")
    words = bpe.train_bpe(["virtue is knowledge and knowledge is virtue. " * 20], 60, CharTokenizer().chars)
    model = random_model(vocab_size=words.vocab_size)
    path = write_huggingface(tmp_path/"hf", model, words)
    assert read_tokenizer(path).encode("virtue is").tolist() == words.encode("virtue is").tolist()
    assert load_checkpoint(read_huggingface(path).save(tmp_path/"ours")).tokenizer == words


def test_greedy_text_is_the_same_in_every_engine_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, prompt = random_model(7), "virtue is "
    path = write_huggingface(tmp_path/"hf", model, CharTokenizer())
    ids = CharTokenizer().encode(prompt).tolist()
    ours = CharTokenizer().decode(greedy(model, ids)[len(ids):])
    words, theirs = transformers.AutoTokenizer.from_pretrained(path), transformers.AutoModelForCausalLM.from_pretrained(path)
    out = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert words.decode(out[0][len(ids):], skip_special_tokens=True) == ours
    if not (ct2 := pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed: pip install ctranslate2")): return
    ct2.converters.TransformersConverter(str(path)).convert(str(tmp_path/"ct2"))
    engine = ct2.Generator(str(tmp_path/"ct2"), compute_type="float32", inter_threads=1, intra_threads=1)
    result = engine.generate_batch([words.convert_ids_to_tokens(ids)], max_length=12, sampling_topk=1, include_prompt_in_result=False)
    assert "".join(result[0].sequences[0]) == ours


def test_llama_cpp(tmp_path):
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf")
    model, prompt = random_model(7), "virtue is "
    engine = llama.Llama(str(write_gguf(tmp_path/"m.gguf", model, CharTokenizer())), n_ctx=24, verbose=False)
    ids = CharTokenizer().encode(prompt).tolist()
    out = engine(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]
    assert out == CharTokenizer().decode(greedy(model, ids)[len(ids):])


@pytest.mark.parametrize("config", variants, ids=str)
@pytest.mark.filterwarnings("ignore:nanoGPT ties")
def test_nanogpt_both_ways(config, tmp_path):
    model = random_model(**config)
    model.config.norm_eps = 1e-5  # nanoGPT has no other
    for m in model.modules():
        if isinstance(m, torch.nn.LayerNorm): m.eps = 1e-5
    path = write_nanogpt(tmp_path/"out/ckpt.pt", model, CharTokenizer(), 30, 1.25)
    data = torch.load(path, weights_only=True)
    assert set(data["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    back = read_pt(path)
    assert torch.equal(logits(back.model(), IDS), logits(model, IDS)) and back.step == 30 and back.tokenizer == CharTokenizer()
    data["model"] = {f"_orig_mod.{n}": x for n, x in data["model"].items() if not n.endswith("ln_1.bias") or x.any()}
    torch.save(data, path)
    assert torch.equal(logits(read_pt(path).model(), IDS), logits(model, IDS))


def test_an_untied_head_is_said(tmp_path):
    with pytest.warns(UserWarning, match="self.transformer.wte.weight = self.lm_head.weight"):
        write_nanogpt(tmp_path/"ckpt.pt", random_model(), CharTokenizer())


class Stranger:
    ran = []
    def __reduce__(self): return Stranger.ran.append, ("x",)


@pytest.mark.parametrize("make", [lambda p: torch.save({"model": Stranger()}, p), lambda p: p.write_bytes(pickle.dumps(Stranger())),
                                  lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"PK\3\4" + bytes(99)), lambda p: p.write_bytes(b"GGUF")])
def test_pickles_are_never_run(make, tmp_path):
    make(tmp_path/"ckpt.pt")
    with pytest.raises(ValueError, match="refused|not a whole file") as e: read_pt(tmp_path/"ckpt.pt")
    assert not Stranger.ran and "\n" not in str(e.value)
    (tmp_path/"pytorch_model.bin").write_bytes((tmp_path/"ckpt.pt").read_bytes())
    (tmp_path/"config.json").write_text('{"model_type": "gpt2", "n_embd": 8}')
    with pytest.raises(ValueError): read_huggingface(tmp_path)
    assert not Stranger.ran


@pytest.mark.parametrize("n", [10, 200, 5000, -100])
def test_truncated_pt_files(n, tmp_path):
    write_nanogpt(tmp_path/"ckpt.pt", random_model(tied=True), CharTokenizer())
    (tmp_path/"ckpt.pt").write_bytes((tmp_path/"ckpt.pt").read_bytes()[:n])
    with pytest.raises(ValueError, match="not a whole file|refused"): load_pt(tmp_path/"ckpt.pt")


@pytest.mark.parametrize("change, words", [(dict(model_type="llama"), "type 'llama'"), (dict(activation_function="gelu"), "activation_function"),
                                           (dict(n_inner=7), "n_inner"), (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by"),
                                           (dict(n_head=5), "not divisible"), (dict(n_head="4"), "n_head")])
def test_variants_are_refused_by_name(change, words, tmp_path):
    path = write_huggingface(tmp_path/"hf", random_model(), CharTokenizer())
    config = json.loads((path/"config.json").read_text()) | change
    (path/"config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words): read_huggingface(path).model()


def test_broken_folders(tmp_path):
    path = write_huggingface(tmp_path/"hf", random_model(), CharTokenizer())
    data = (path/"model.safetensors").read_bytes()
    (path/"model.safetensors").write_bytes(data[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors"): read_huggingface(path)
    (path/"model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"): read_huggingface(path)
    (path/"config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"): read_huggingface(path)
    with pytest.raises(OSError): read_huggingface(tmp_path/"nowhere")


@pytest.mark.parametrize("config", variants, ids=str)
@pytest.mark.parametrize("chars", [CharTokenizer().chars, "".join(map(chr, range(945, 973)))])
def test_gguf_gives_back_the_model_to_the_bit(config, chars, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = random_model(**config)
    path = write_gguf(tmp_path/"m.gguf", model, CharTokenizer(chars))
    back = read_gguf(path)
    assert torch.equal(logits(back.model(), IDS), logits(model, IDS)) and back.tokenizer == CharTokenizer(chars)
    reader = gguf.GGUFReader(path)
    field = lambda key: reader.fields[key].contents()
    assert field("tokenizer.ggml.eos_token_id") == 28 and len(field("tokenizer.ggml.tokens")) == 29 and field("gpt2.context_length") == 24
    assert {t.name: tuple(t.shape) for t in reader.tensors}["output.weight"] == (32, 29)


def test_byte_words_are_gpt2s():
    bpe = pytest.importorskip("microjulia.family.bpe")
    assert byte_words(map(chr, range(128))) == [bpe.byte_symbols()[i] for i in range(128)]


@pytest.mark.parametrize("damage", [lambda b: b[:30], lambda b: b[:3000], lambda b: b"", lambda b: b[:8] + b"\xff" * 16 + b[24:]])
def test_damaged_gguf_files(damage, tmp_path):
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path/"m.gguf", random_model(), CharTokenizer())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged") as e: read_gguf(path)
    assert "\n" not in str(e.value)
