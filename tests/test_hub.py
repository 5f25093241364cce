"Python's world: Hugging Face folders, nanoGPT, GGUF, the Hub."
import base64
import hashlib
import http.server
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from microjulia.checkpoint import load_checkpoint, save_checkpoint
from microjulia.exchange.convert import TARGETS, convert, format_of, info
from microjulia.exchange.gguf import byte_words, read_gguf, write_gguf
from microjulia.exchange.huggingface import load_pt, read_huggingface, read_pt, read_tokenizer, write_huggingface, write_nanogpt
from microjulia.exchange.hub import from_pretrained, push_to_hub
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
    words = bpe.train_bpe(["virtue is knowledge and knowledge is virtue. " * 20], 50, CharTokenizer().chars)
    model = random_model(vocab_size=words.vocab_size)
    path = write_huggingface(tmp_path/"hf", model, words)
    assert read_tokenizer(path).encode("virtue is").tolist() == words.encode("virtue is").tolist()
    assert load_checkpoint(read_huggingface(path).save(tmp_path/"ours")).tokenizer == words


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    "A model with something to say, the folder `transformers` opens, and what it says greedily."
    model, prompt = random_model(0), "virtue is "
    model.wpe.weight.data.mul_(20)  # else it says the same letter again and again
    ids = CharTokenizer().encode(prompt).tolist()
    said = CharTokenizer().decode(greedy(model, ids, 14)[len(ids):])
    assert len(set(said)) > 6
    return model, write_huggingface(tmp_path_factory.mktemp("talker")/"hf", model, CharTokenizer()), prompt, ids, said


def test_transformers_says_the_same(talker):
    transformers = pytest.importorskip("transformers")
    _, path, _, ids, said = talker
    words, theirs = transformers.AutoTokenizer.from_pretrained(path), transformers.AutoModelForCausalLM.from_pretrained(path)
    out = theirs.generate(torch.tensor([ids]), max_new_tokens=14, do_sample=False)
    assert words.decode(out[0][len(ids):], skip_special_tokens=True) == said


def test_transformers_never_ends_where_a_z_would_stand(tmp_path):
    "`<bos>` has the row of the last letter: were it not suppressed, every second z would end a text."
    transformers = pytest.importorskip("transformers")
    model = random_model(1)
    model.lm_head.weight.data[:-1] = 0
    model.ln_f.bias.data = model.lm_head.weight.data[-1] * 20
    theirs = transformers.AutoModelForCausalLM.from_pretrained(write_huggingface(tmp_path/"hf", model, CharTokenizer()))
    torch.manual_seed(0)
    out = theirs.generate(torch.tensor([[0, 1]] * 4), max_new_tokens=20)
    assert out.shape == (4, 22) and (out[:, 2:] == 27).all()


def test_transformers_serve_says_the_same(talker, tmp_path):
    pytest.importorskip("transformers")
    for package in ("fastapi", "uvicorn", "pydantic", "accelerate"):
        pytest.importorskip(package, reason="transformers serve needs more: pip install 'transformers[serving]'")
    openai = pytest.importorskip("openai")
    _, path, prompt, _, said = talker
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu", "--dtype", "float32", str(path)]
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), OMP_NUM_THREADS="1")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    with (tmp_path/"log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port)): break
                except OSError:
                    assert server.poll() is None and time.monotonic() < deadline, (tmp_path/"log").read_text()[-2000:]
                    time.sleep(0.1)
            chunks = client.chat.completions.create(model=str(path), messages=[dict(role="user", content=prompt)], stream=True,
                                                    temperature=0, max_tokens=14)
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        finally: server.kill()
    assert text == said


def test_ctranslate2_says_the_same(talker, tmp_path):
    ct2 = pytest.importorskip("ctranslate2")
    transformers = pytest.importorskip("transformers")
    _, path, _, ids, said = talker
    ct2.converters.TransformersConverter(str(path)).convert(str(tmp_path/"ct2"))
    engine = ct2.Generator(str(tmp_path/"ct2"), compute_type="float32", inter_threads=1, intra_threads=1)
    start = transformers.AutoTokenizer.from_pretrained(path).convert_ids_to_tokens(ids)
    result = engine.generate_batch([start], max_length=14, sampling_topk=1, include_prompt_in_result=False)
    assert "".join(result[0].sequences[0]) == said


@pytest.mark.parametrize("alphabet", [None, " .aeiourstévκ√\n"])
def test_llama_cpp_says_the_same(talker, alphabet, tmp_path):
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it takes minutes to build")
    pytest.importorskip("gguf")
    model, _, prompt, ids, said = talker
    words = CharTokenizer()
    if alphabet:
        words, prompt = CharTokenizer(alphabet), "évκ√ar"
        model = random_model(0, vocab_size=words.vocab_size, bias=True)
        model.wpe.weight.data.mul_(20)
        ids = words.encode(prompt).tolist()
        said = words.decode(greedy(model, ids, 14)[len(ids):])
    engine = llama.Llama(str(write_gguf(tmp_path/"m.gguf", model, words)), n_ctx=24, verbose=False)
    assert engine.tokenize(prompt.encode(), add_bos=False) == ids
    assert engine(prompt, max_tokens=14, temperature=0)["choices"][0]["text"] == said


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


@pytest.mark.skipif("GPT2_FOLDER" not in os.environ, reason="GPT2_FOLDER does not name a folder with the 124M weights")
def test_the_124m_weights():
    transformers = pytest.importorskip("transformers")
    path = os.environ["GPT2_FOLDER"]
    ours, theirs = read_huggingface(path), transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.as_tensor(ours.tokenizer.encode("Virtue, then, is knowledge, and can be taught.").astype(int))[None]
    assert ids.tolist() == [transformers.AutoTokenizer.from_pretrained(path)("Virtue, then, is knowledge, and can be taught.")["input_ids"]]
    assert close(logits(ours.model(), ids), logits(theirs, ids).logits)


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


# the Hub, against one that runs here

class Hub:
    "As much of the Hub's HTTP as uploading and downloading small files needs."
    def __init__(self): self.files, self.requests, self.private, self.broken = {}, [], {}, False

    def answer(self, method, path, headers, body):
        path, _, _ = path.partition("?")
        self.requests.append((method, path, headers.get("Authorization", "")))
        if self.broken: return 403, {}, json.dumps({"error": f"forbidden for {headers.get('Authorization')}"}).encode()
        if path == "/api/repos/create":
            ask = json.loads(body)
            name = "/".join(filter(None, (ask.get("organization"), ask["name"]))) if "/" not in ask["name"] else ask["name"]
            self.private[name] = ask.get("private", ask.get("visibility"))
            self.files.setdefault(name, {})
            return 200, {}, json.dumps({"url": f"{self.url}/{name}", "name": name, "id": name}).encode()
        if path == "/api/validate-yaml": return 200, {}, b'{"errors": [], "warnings": []}'
        if path == "/api/whoami-v2": return 200, {}, b'{"name": "plato", "type": "user", "orgs": []}'
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in path:
            files = [dict(path=f["path"], uploadMode="regular", shouldIgnore=False, oid=None) for f in json.loads(body)["files"]]
            return 200, {}, json.dumps({"files": files}).encode()
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file": self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {}, json.dumps({"success": True, "commitOid": "a" * 40, "commitUrl": f"{self.url}/{name}/commit/{'a' * 40}", "hookOutput": ""}).encode()
        if "/tree/" in path:
            tree = [dict(type="file", path=n, size=len(d), oid=hashlib.sha1(d).hexdigest()) for n, d in self.files[name].items()]
            return 200, {}, json.dumps(tree).encode()
        if path.startswith("/api/models/") and name in self.files:
            return 200, {}, json.dumps({"id": name, "sha": "a" * 40, "private": False, "siblings": [{"rfilename": n} for n in self.files[name]]}).encode()
        parts = path.strip("/").split("/")
        data = self.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:])) if parts[2:3] == ["resolve"] else None
        if data is None: return 404, {"X-Error-Code": "EntryNotFound" if len(parts) > 3 else "RepoNotFound"}, b'{"error": "not found"}'
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "a" * 40, "Accept-Ranges": "bytes"}, data


@pytest.fixture
def stub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *_): pass
        def serve(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, data = hub.answer(self.command, self.path, self.headers, body)
            self.send_response(status)
            for k, v in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items(): self.send_header(k, v)
            self.end_headers()
            if self.command != "HEAD": self.wfile.write(data)
        do_GET = do_POST = do_HEAD = do_PUT = serve
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield hub
    server.shutdown()


@pytest.fixture
def trained(tmp_path):
    model = random_model()
    save_checkpoint(tmp_path/"model", model, CharTokenizer(), step=2000, best_val_loss=1.25, facts={"corpus": {"works": 47}},
                    training_state={"tensors": {"m": torch.zeros(3)}, "state": {}})
    return tmp_path/"model"


@pytest.mark.parametrize("form", ["microjulia", "hf"])
def test_up_to_the_hub_and_down_again(form, stub, trained, tmp_path, capsys, caplog):
    secret = "hf_notARealTokenButLongEnough"
    url = push_to_hub(trained, "plato/dialogues", form=form, token=secret, endpoint=stub.url)
    assert url.endswith("plato/dialogues") and stub.private["plato/dialogues"] in (True, "private")
    files = stub.files["plato/dialogues"]
    assert {"README.md", "config.json", "model.safetensors"} <= set(files) and not any("training_state" in n for n in files)
    assert "1.2500 nats" in files["README.md"].decode() and "works: 47" in files["README.md"].decode()
    assert not any(secret.encode() in data for data in files.values())
    back = from_pretrained("plato/dialogues", token=secret, cache_dir=tmp_path/"cache", endpoint=stub.url)
    assert back.step == 2000 and back.best_val_loss == 1.25 and back.facts["corpus"] == {"works": 47} and back.tokenizer == CharTokenizer()
    assert torch.equal(logits(back.model, IDS), logits(load_checkpoint(trained).model, IDS))
    assert any(secret in a for _, _, a in stub.requests)
    out = capsys.readouterr()
    assert secret not in out.out + out.err + caplog.text
    assert not any(secret.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    push_to_hub(trained, "plato/dialogues", form=form, token=secret, endpoint=stub.url)  # again, as after an interruption


def test_the_public_is_a_choice(stub, trained):
    push_to_hub(trained, "plato/open", private=False, token="hf_notARealTokenButLongEnough", endpoint=stub.url)
    assert stub.private["plato/open"] in (False, None, "public")


def test_pickles_are_not_fetched_and_damage_is_seen(stub, trained, tmp_path):
    push_to_hub(trained, "plato/dialogues", token="hf_x", endpoint=stub.url)
    stub.files["plato/dialogues"]["pytorch_model.bin"] = b"\x80\4"
    stub.requests.clear()
    from_pretrained("plato/dialogues", cache_dir=tmp_path/"c1", endpoint=stub.url)
    assert not any(".bin" in path for _, path, _ in stub.requests)
    data = bytearray(stub.files["plato/dialogues"]["model.safetensors"])
    data[-1] ^= 1
    stub.files["plato/dialogues"]["model.safetensors"] = bytes(data)
    with pytest.raises(ValueError, match="damaged or replaced"): from_pretrained("plato/dialogues", cache_dir=tmp_path/"c2", endpoint=stub.url)


def test_errors_of_the_hub_are_one_line_without_the_token(stub, trained, tmp_path):
    stub.broken, secret = True, "hf_notARealTokenButLongEnough"
    for call in (lambda: push_to_hub(trained, "plato/x", token=secret, endpoint=stub.url),
                 lambda: from_pretrained("plato/x", token=secret, cache_dir=tmp_path/"c", endpoint=stub.url)):
        with pytest.raises(OSError, match="plato/x: not (up|down)loaded") as e: call()
        assert "\n" not in str(e.value) and secret not in str(e.value)
    with pytest.raises(FileNotFoundError, match="no such folder"): from_pretrained("../nothing/here/at all")
    with pytest.raises(ValueError): push_to_hub(tmp_path/"none", "plato/x", endpoint=stub.url)


# every format through one door

@pytest.mark.filterwarnings("ignore:nanoGPT ties")
@pytest.mark.parametrize("name, to, kind", [("a.jld2", None, "jld2"), ("a.npz", None, "npz"), ("ckpt.pt", None, "pt"), ("m.gguf", None, "gguf"),
                                            ("folder", "hf", "hf"), ("copy", "microjulia", "microjulia")])
def test_convert_and_info(name, to, kind, trained, tmp_path):
    if kind == "gguf": pytest.importorskip("gguf")
    made = convert(trained, tmp_path/"out"/name, to)
    renamed = made.rename(made.parent/("x" if made.is_dir() else "x.dat"))
    assert format_of(renamed) == kind
    facts = info(renamed)
    assert facts["kind"] == kind and facts["parameters"] >= load_checkpoint(trained).model.num_params() and json.dumps(facts, default=str)
    with pytest.raises(ValueError, match="already there"): convert(trained, renamed, to or TARGETS[1])
    if kind == "npz": return
    back = convert(renamed, tmp_path/"back", "microjulia")
    assert torch.allclose(logits(load_checkpoint(back).model, IDS), logits(load_checkpoint(trained).model, IDS), rtol=0, atol=1e-4)
    assert load_checkpoint(back).tokenizer == CharTokenizer()


def test_convert_says_what_is_wrong(trained, tmp_path):
    with pytest.raises(ValueError, match="say --to"): convert(trained, tmp_path/"x")
    with pytest.raises(ValueError, match="unknown format 'onnx'"): convert(trained, tmp_path/"x", "onnx")
    (tmp_path/"m.pt").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="web page"): convert(tmp_path/"m.pt", tmp_path/"x")
    (tmp_path/"m.pt").write_bytes(b"PK\3\4" + bytes(50))
    with pytest.raises(ValueError, match="without its end"): info(tmp_path/"m.pt")
    with pytest.raises(FileNotFoundError): info(tmp_path/"none")
    with pytest.raises(ValueError): info(tmp_path)


def test_info_does_not_load_weights(tmp_path):
    import tracemalloc
    model = random_model(n_embd=256, n_layer=6)
    save_checkpoint(tmp_path/"m", model, CharTokenizer())
    convert(tmp_path/"m", tmp_path/"m.jld2"); convert(tmp_path/"m", tmp_path/"hf", "hf"); convert(tmp_path/"m", tmp_path/"m.npz")
    for name in ("m", "m.jld2", "hf", "m.npz"):
        tracemalloc.start()
        info(tmp_path/name)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20 < model.num_params()
        tracemalloc.stop()
