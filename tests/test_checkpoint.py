"""Checkpoints under every kind of damage, interruption and malice that can be staged in a test."""
import errno
import json
import os
import pickle
import random
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from microjulia import checkpoint
from microjulia.checkpoint import (CheckpointError, DiskFullError, MANIFEST, STAGES, best_whole, load_checkpoint,
                                   load_training_state, manifest_of, newest_whole, read_config, read_manifest,
                                   remove_checkpoint, remove_stale, resolve, save_checkpoint, seal, set_aside,
                                   step_path, step_paths, unseal, verify_checkpoint)
from microjulia.gpt import GPT, GPTConfig
from microjulia.tokenizer import ALPHABET, CharTokenizer

FORMAT_1 = Path(__file__).parent/"data"/"checkpoint-format-1"
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FILES = ["model.safetensors", "config.json", "vocab.json", MANIFEST,
         "training_state/tensors.safetensors", "training_state/state.json"]


def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**dict(n_layer=1, n_head=2, n_embd=8, block_size=8) | kw)).eval()

def save(path, seed=0, step=10, **kw):
    model = tiny(seed)
    moments = {f"{n}.exp_avg": p.detach() + seed for n, p in model.named_parameters()}
    state = {"tensors": moments, "state": {"seed": seed}}
    tokenizer = CharTokenizer(ALPHABET[::-1] if seed else ALPHABET)
    return save_checkpoint(path, model, tokenizer, step, training_state=state, **kw)

def reseal(path, **changes):
    "Write a manifest that agrees with what lies in `path`, as a forger would."
    manifest = unseal(manifest_of(path, read_config(path)["step"])) | changes
    (path/MANIFEST).write_bytes(seal(manifest))

def edit_config(path, **changes):
    config = json.loads((path/"config.json").read_text())
    for k, v in changes.items(): (config if k in config else config["hyperparams"])[k] = v
    (path/"config.json").write_text(json.dumps(config))

def refused(path, *words, f=load_checkpoint):
    "The one-line complaint about `path`, which must hold `words`."
    with pytest.raises(CheckpointError) as e: f(path)
    message = str(e.value)
    assert "\n" not in message
    for word in words: assert word in message, message
    return message

def flip(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)

@pytest.fixture(scope="module")
def pristine(tmp_path_factory): return save(tmp_path_factory.mktemp("pristine")/"step-00000010")

@pytest.fixture
def folder(pristine, tmp_path): return Path(shutil.copytree(pristine, tmp_path/"step-00000010"))


# What goes in comes out

@pytest.mark.parametrize("kw", [{}, dict(bias=True), dict(n_layer=3, n_head=1), dict(vocab_size=38),
                                dict(init="flux", norm_eps=1e-10, dropout=.1)])
def test_round_trip(tmp_path, kw):
    model, chars = tiny(3, **kw), "".join(map(chr, range(32, 32 + kw.get("vocab_size", 28))))
    facts = {"corpus": "æ", "val_loss": 1.5}
    path = save_checkpoint(tmp_path/"a"/"b", model, CharTokenizer(chars), 7, 1.25, facts=facts)
    got = load_checkpoint(path)
    ids = torch.randint(0, len(chars), (2, 8))
    with torch.no_grad(): assert torch.equal(got.model(ids), model(ids))
    assert not got.model.training and got.model.config == model.config and got.tokenizer.chars == chars
    assert (got.step, got.best_val_loss, got.facts, got.path) == (7, 1.25, facts, path)
    assert got.config["arch"] == "gpt2" and got.config["precision"] == "float32"
    assert load_training_state(path) is None

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(tmp_path, dtype):
    model = tiny()
    path = save_checkpoint(tmp_path/"m", model, CharTokenizer(), dtype=dtype)
    assert load_file(path/"model.safetensors")["wte.weight"].dtype == dtype
    assert read_config(path)["precision"] == str(dtype)[6:]
    got = load_checkpoint(path).model
    for a, b in zip(got.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.to(dtype).float())

def test_small_integers(tmp_path):
    model = tiny()
    with torch.no_grad(): model.wte.weight[3] = 0
    path = save_checkpoint(tmp_path/"m", model, CharTokenizer(), dtype=torch.int8)
    stored, got = load_file(path/"model.safetensors"), load_checkpoint(path).model.state_dict()
    assert read_config(path)["precision"] == "int8"
    for n, t in model.state_dict().items():
        assert stored[n].dtype == (torch.int8 if t.dim() == 2 else torch.float32) and got[n].dtype == torch.float32
        half_a_step = t.abs().amax(-1, keepdim=True) / 254 if t.dim() == 2 else 0.
        assert ((got[n] - t).abs() <= half_a_step * 1.001).all()
    again = save_checkpoint(tmp_path/"again", load_checkpoint(path).model, CharTokenizer(), dtype=torch.int8)
    assert load_file(again/"model.safetensors").keys() == stored.keys()
    assert all(torch.allclose(a.float(), stored[n].float()) for n, a in load_file(again/"model.safetensors").items())

def test_training_state_round_trip(tmp_path):
    tensors = {"a": torch.arange(6.).reshape(2, 3).t(), "step": torch.tensor(3.), "n": torch.tensor(2)}
    base = torch.zeros(10)
    tensors |= {"view1": base[:5], "view2": base[5:]}  # share one storage
    state = {"tensors": tensors, "state": {"history": [{"loss": float("nan")}, {"loss": 1.0}], "text": "é\n"}}
    got = load_training_state(save_checkpoint(tmp_path/"m", tiny(), CharTokenizer(), training_state=state))
    assert got["tensors"].keys() == tensors.keys()
    for k, v in tensors.items(): assert torch.equal(got["tensors"][k], v) and got["tensors"][k].dtype == v.dtype
    assert got["state"]["history"][1] == {"loss": 1.0} and got["state"]["text"] == "é\n"

def test_empty_training_state(tmp_path):
    path = save_checkpoint(tmp_path/"m", tiny(), CharTokenizer(), training_state={})
    assert load_training_state(path) == {"tensors": {}, "state": {}}

def test_config_is_strict_json(tmp_path):
    facts = {"a": [float("nan"), (1,)]}
    path = save_checkpoint(tmp_path/"m", tiny(), CharTokenizer(), best_val_loss=float("inf"), facts=facts)
    def no(word): raise AssertionError(word)
    config = json.loads((path/"config.json").read_text(), parse_constant=no)
    assert config["best_val_loss"] is None and config["facts"] == {"a": [None, [1]]}

def test_tied_tensors_are_stored_once(tmp_path, monkeypatch):
    def build(arch, hyperparams):
        model = GPT(GPTConfig.from_dict(hyperparams))
        model.lm_head.weight = model.wte.weight
        return model
    monkeypatch.setattr(checkpoint, "build_model", build)
    model = build("gpt2", tiny().config.to_dict()).eval()
    path = save_checkpoint(tmp_path/"m", model, CharTokenizer())
    assert "lm_head.weight" not in load_file(path/"model.safetensors")
    got = load_checkpoint(path).model
    assert got.lm_head.weight is got.wte.weight and torch.equal(got.wte.weight, model.wte.weight)

def test_compiled_model(tmp_path):
    model = tiny()
    path = save_checkpoint(tmp_path/"m", torch.compile(model), CharTokenizer())
    assert torch.equal(load_checkpoint(path).model.wte.weight, model.wte.weight)

def test_loading_leaves_the_random_state_alone(folder):
    torch.manual_seed(5)
    a = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint(folder)
    assert torch.equal(a, torch.rand(3))

def test_what_is_saved_stands_still(tmp_path, monkeypatch):
    model = tiny()
    before = model.wte.weight.detach().clone()
    moments = {"m": torch.zeros(3)}
    def train_on(name):
        with torch.no_grad(): model.wte.weight.add_(1)
        moments["m"].add_(1)
    monkeypatch.setattr(checkpoint, "stage", train_on)
    path = save_checkpoint(tmp_path/"m", model, CharTokenizer(), training_state={"tensors": moments})
    assert torch.equal(load_checkpoint(path).model.wte.weight, before)
    assert torch.equal(load_training_state(path)["tensors"]["m"], torch.zeros(3))

def test_same_model_same_bytes(tmp_path):
    a, b = save(tmp_path/"a"), save(tmp_path/"b")
    for name in FILES: assert (a/name).read_bytes() == (b/name).read_bytes()

@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_usual_mode(tmp_path, umask, mode):
    old = os.umask(umask)
    try: path = save(tmp_path/"m")
    finally: os.umask(old)
    assert {stat.S_IMODE((path/n).stat().st_mode) for n in FILES} == {mode}

def test_another_process_opens_it(folder):
    "And without loading what only a compiler needs, which takes longer than all the rest."
    code = ("import sys, torch; from microjulia.checkpoint import load_checkpoint\n"
            f"before = set(sys.modules); m = load_checkpoint({str(folder)!r}).model\n"
            "print('torch._dynamo' in set(sys.modules) - before)\n"
            "with torch.no_grad(): print(m(torch.arange(8)[None]).numpy().tobytes().hex())")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout
    with torch.no_grad(): assert out.split() == ["False", tiny()(torch.arange(8)[None]).numpy().tobytes().hex()]

def test_format_1_stays_readable():
    "The folder was written by format 1 and is never rewritten."
    got = load_checkpoint(FORMAT_1)
    told = json.loads((FORMAT_1.parent/"checkpoint-format-1.json").read_text())
    with torch.no_grad(): logits = got.model(torch.tensor(told["ids"]))
    assert torch.allclose(logits, torch.tensor(told["logits"]), atol=1e-5)
    assert (got.step, got.tokenizer.chars) == (told["step"], told["chars"])
    assert load_training_state(FORMAT_1)["state"] == told["state"]


# Nothing is overwritten unasked

def test_existing_is_kept(folder):
    before = (folder/MANIFEST).read_bytes()
    with pytest.raises(CheckpointError, match="already there"): save(folder, seed=1)
    assert (folder/MANIFEST).read_bytes() == before
    save(folder, seed=1, overwrite=True)
    assert torch.equal(load_checkpoint(folder).model.wte.weight, tiny(1).wte.weight)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]

def test_only_a_checkpoint_is_replaced(tmp_path):
    (tmp_path/"essay").mkdir()
    (tmp_path/"essay"/"draft.txt").write_text("years of work")
    (tmp_path/"file").write_text("x")
    for name in ("essay", "file"):
        with pytest.raises(CheckpointError, match="not a checkpoint"): save(tmp_path/name, overwrite=True)
    assert (tmp_path/"essay"/"draft.txt").read_text() == "years of work" and (tmp_path/"file").read_text() == "x"

def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path/"m").mkdir()
    verify_checkpoint(save(tmp_path/"m"))

def test_relative_paths(tmp_path, monkeypatch):
    (tmp_path/"here").mkdir()
    monkeypatch.chdir(tmp_path/"here")
    save("m")
    assert load_checkpoint("m").step == 10
    assert load_checkpoint("./m/../m/").step == 10

def test_tokenizer_must_fit(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer has 3 tokens, the model 28"):
        save_checkpoint(tmp_path/"m", tiny(), CharTokenizer("abc"))
    assert not list(tmp_path.iterdir())


# Damage

def test_every_bit_of_the_manifest(folder):
    data = (folder/MANIFEST).read_bytes()
    for bit in range(8*len(data)):
        with pytest.raises(ValueError): unseal(flip(data, bit))
        if bit % 13: continue
        (folder/MANIFEST).write_bytes(flip(data, bit))
        refused(folder, MANIFEST, f=read_manifest)

@pytest.mark.parametrize("name", FILES)
def test_flipped_bits(folder, name):
    data, r = (folder/name).read_bytes(), random.Random(1)
    for i in range(200):
        (folder/name).write_bytes(flip(data, r.randrange(8*len(data))))
        refused(folder, name.split("/")[-1], f=verify_checkpoint)
        if i % 10 == 0: refused(folder)

@pytest.mark.parametrize("name", FILES)
def test_truncation_and_zero_tails(folder, name):
    data, r = (folder/name).read_bytes(), random.Random(2)
    for cut in [0, 1, len(data) - 1, *(r.randrange(len(data)) for _ in range(50))]:
        (folder/name).write_bytes(data[:cut])
        refused(folder, name.split("/")[-1], f=verify_checkpoint)
        if data[cut:].strip(b"\0"):
            (folder/name).write_bytes(data[:cut] + bytes(len(data) - cut))
            refused(folder, name.split("/")[-1], f=verify_checkpoint)
    (folder/name).write_bytes(data + b"\0")
    refused(folder, name.split("/")[-1])

@pytest.mark.parametrize("name", FILES)
def test_missing_files(folder, name):
    (folder/name).unlink()
    refused(folder, "missing" if name != "config.json" else "config.json")

@pytest.mark.parametrize("name", ["extra.bin", "model-2.safetensors", "training_state/more.json", "sub/x", "step-1"])
def test_extra_files(folder, name):
    (folder/name).parent.mkdir(exist_ok=True)
    (folder/name).write_text("x")
    refused(folder, name)

@pytest.mark.parametrize("name", ["README.md", ".DS_Store", ".ipynb_checkpoints/a.json", "desktop.ini"])
def test_harmless_extra_files(folder, name):
    (folder/name).parent.mkdir(exist_ok=True)
    (folder/name).write_text("x")
    assert load_checkpoint(folder).step == 10

@pytest.mark.parametrize("name", FILES[:4] + ["training_state/tensors.safetensors", "training_state/state.json"])
def test_swapped_files_of_two_steps(folder, tmp_path, name):
    other = save(tmp_path/"step-00000020", seed=1, step=20)
    a, b = (folder/name).read_bytes(), (other/name).read_bytes()
    assert a != b
    (folder/name).write_bytes(b)
    (other/name).write_bytes(a)
    refused(folder)
    refused(other)

def test_swapped_folders(folder, tmp_path):
    other = save(tmp_path/"step-00000020", seed=1, step=20)
    os.rename(folder, tmp_path/"x")
    os.rename(other, folder)
    os.rename(tmp_path/"x", other)
    refused(folder, "holds step 20")
    refused(other, "holds step 10")
    os.rename(other, tmp_path/"mine")  # any other name is the user's own
    assert load_checkpoint(tmp_path/"mine").step == 10

def test_swapped_files_inside(folder):
    "A file under another's name."
    os.replace(folder/"training_state/tensors.safetensors", folder/"model.safetensors")
    refused(folder)

@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file(folder, name):
    (folder/name).unlink()
    (folder/name).mkdir()
    with pytest.raises((CheckpointError, OSError)): load_checkpoint(folder)

def test_training_state_is_verified_by_itself(folder):
    file = folder/"training_state/tensors.safetensors"
    file.write_bytes(flip(file.read_bytes(), 8*file.stat().st_size - 4))
    refused(folder, "tensors.safetensors", "checksum", f=load_training_state)

def test_unverified_loading_is_possible(folder):
    (folder/"config.json").write_text((folder/"config.json").read_text() + "\n")
    refused(folder, "config.json")
    assert load_checkpoint(folder, verify=False).step == 10


# Malice: the manifest agrees with everything here

class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("protocol", [0, 2, 4, "torch", "old torch"])
def test_no_pickle_is_opened(folder, tmp_path, name, protocol):
    bomb = tmp_path/"exploded"
    if isinstance(protocol, int): (folder/name).write_bytes(pickle.dumps(Bomb(bomb), protocol))
    else: torch.save(Bomb(bomb), folder/name, _use_new_zipfile_serialization=protocol == "torch")
    if name not in ("config.json", MANIFEST): reseal(folder)
    for f in (load_checkpoint, load_training_state, verify_checkpoint, read_config, resolve):
        try: f(folder)
        except ValueError: pass
    try: load_checkpoint(folder, verify=False)
    except ValueError: pass
    assert not bomb.exists()
    if name == "model.safetensors" and protocol: refused(folder, "pickle")

@pytest.mark.parametrize("name", ["model.pt", "ckpt.pth", "pytorch_model.bin", "x.ckpt", "x.PKL"])
def test_a_pickle_by_name(folder, tmp_path, name):
    refused(tmp_path/name, "pickle")
    torch.save({}, tmp_path/name)
    refused(tmp_path/name, "pickle")
    (tmp_path/"run").mkdir()
    shutil.copy(tmp_path/name, tmp_path/"run"/name)
    refused(tmp_path/"run", name, "pickle")
    shutil.copy(tmp_path/name, folder/name)
    reseal(folder)
    refused(folder, name, "pickle")

@pytest.mark.parametrize("header", [2**63, 2**40, 10**8 + 1, 0])
def test_hostile_header_size(folder, header):
    file = folder/"model.safetensors"
    file.write_bytes(header.to_bytes(8, "little") + file.read_bytes()[8:])
    reseal(folder)
    refused(folder, "model.safetensors")

@pytest.mark.parametrize("change", [
    lambda h: h["wte.weight"].update(data_offsets=[0, 10]),
    lambda h: h["wte.weight"].update(data_offsets=[0, 2**50]),
    lambda h: h["wte.weight"].update(data_offsets=h["wpe.weight"]["data_offsets"]),
    lambda h: h["wte.weight"].update(shape=[2**40, 2**40]),
    lambda h: h["wte.weight"].update(shape=[8, 28]),
    lambda h: h["wte.weight"].update(dtype="I32"),
    lambda h: h.update({"../../escape": h.pop("wte.weight")}),
    lambda h: h.pop("wte.weight")])
def test_hostile_headers(folder, change):
    file = folder/"model.safetensors"
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + n:])
    reseal(folder)
    refused(folder, "model.safetensors")

@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("ln_f.weight"), ["lacks", "ln_f.weight"]),
    (lambda w: w.update(extra=torch.zeros(1)), ["unknown", "extra"]),
    (lambda w: w.update({"wte.weight": torch.zeros(28, 9)}), ["wte.weight", "(28, 9)", "(28, 8)"]),
    (lambda w: w.update({"wte.weight": torch.zeros(28, 8, dtype=torch.int8)}), ["wte.weight", "I8"]),
    (lambda w: w.update({"wte.weight.scale": torch.zeros(28, 1)}), ["unknown", "wte.weight.scale"]),
    (lambda w: w.update({"wte.weight": torch.zeros(28, 8, dtype=torch.int8), "wte.weight.scale": torch.zeros(28)}),
     ["wte.weight", "scale for each row"]),
    (lambda w: w.update({"wte.weight": torch.zeros(28, 8, dtype=torch.int8),
                         "wte.weight.scale": torch.zeros(28, 1, dtype=torch.int8)}), ["wte.weight", "I8"])])
def test_tensors_that_do_not_fit_are_named(folder, change, words):
    weights = load_file(folder/"model.safetensors")
    change(weights)
    save_file(weights, folder/"model.safetensors")
    reseal(folder)
    refused(folder, "model.safetensors", *words)

@pytest.mark.parametrize("changes, words", [
    (dict(n_embd=1 << 20), ["model.safetensors"]), (dict(n_embd=1 << 40), []), (dict(n_layer=10**9), ["layers"]),
    (dict(n_layer="2"), []), (dict(n_head=3), ["divisible"]),
    (dict(block_size=10**6), ["GB"]), (dict(block_size=10**12), []),
    (dict(vocab_size=-1), []), (dict(vocab_size=29), []), (dict(arch="no-such"), ["no-such"]), (dict(arch=3), ["arch"]),
    (dict(hyperparams=[]), ["hyperparams"]), (dict(step="10"), ["step"]), (dict(facts=[]), ["facts"]),
    (dict(best_val_loss="low"), ["best_val_loss"]), (dict(format_version=2), ["version 2", "newer microjulia"]),
    (dict(format_version="1"), ["format_version"]), (dict(format_version=True), ["format_version"]),
    (dict(format_version=0), ["format_version"])])
def test_hostile_config(folder, changes, words):
    edit_config(folder, **changes)
    (folder/MANIFEST).write_bytes(manifest_of(folder, 10))
    refused(folder, *words)

def test_unknown_hyperparameter(folder):
    config = json.loads((folder/"config.json").read_text())
    config["hyperparams"]["wings"] = 2
    (folder/"config.json").write_text(json.dumps(config))
    reseal(folder)
    refused(folder, "wings")

@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b"[" * 100_000, b'{"a": NaN}', b"1" * 5000, b"\xed\xa0"],
                         ids=["empty", "list", "open", "null", "deep", "nan", "digits", "broken"])
@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_json_that_is_not_ours(folder, name, text):
    (folder/name).write_bytes(text)
    refused(folder, name)

@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_json_too_large(folder, name):
    with open(folder/name, "r+b") as f: f.truncate(1 << 40)  # sparse: takes no room
    refused(folder, name, "too large")

@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../b", "..", "a/b/c", "C:\\x", "a\\b", "", "a//b", "~/x"])
def test_names_that_point_elsewhere(folder, name):
    files = unseal((folder/MANIFEST).read_bytes())["files"] | {name: {"size": 0, "sha256": ""}}
    (folder/MANIFEST).write_bytes(seal({"format_version": 1, "step": 10, "files": files}))
    refused(folder, MANIFEST, "outside")

@pytest.mark.parametrize("files", [None, [], {}, {"config.json": 3}, {"config.json": {}}])
def test_manifests_that_say_nothing(folder, files):
    (folder/MANIFEST).write_bytes(seal({"format_version": 1, "step": 10, "files": files}))
    refused(folder)

def test_newer_manifest(folder):
    (folder/MANIFEST).write_bytes(seal({"format_version": 7, "pages": []}))
    refused(folder, "version 7", "newer microjulia")

def test_tokenizer_of_another_size(folder):
    (folder/"vocab.json").write_text(json.dumps(list("ab")))
    reseal(folder)
    refused(folder, "2 tokens")


# Interruption

def forked(f):
    "Run `f` in a child; its exit status, 0 if it came to an end."
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            f()
            status = 0
        finally: os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_at(name, f):
    "Run `f` in a child that dies where `stage(name)` is called."
    def child():
        checkpoint.stage = lambda n: os._exit(9) if n == name else None
        f()
    return forked(child)

SAVING = [s for s in STAGES if s not in ("replace", "delete")]

@posix
@pytest.mark.parametrize("name", SAVING)
def test_killed_while_saving_a_step(tmp_path, name):
    run = tmp_path/"run"
    save(step_path(run, 10))
    assert killed_at(name, lambda: save(step_path(run, 20), seed=1, step=20)) == 9
    newest = newest_whole(run)
    assert newest == step_path(run, 20 if name == "renamed" else 10)
    assert load_checkpoint(newest).step == int(newest.name[5:]) and load_training_state(newest)
    left = [p.name for p in (run/"checkpoints").iterdir() if p.name[0] == "."]
    assert len(left) == (0 if name == "renamed" else 1)
    assert [p.name for p in remove_stale(run/"checkpoints")] == left
    assert all(p.name[0] != "." for p in (run/"checkpoints").iterdir())
    if name != "renamed": save(step_path(run, 20), seed=1, step=20)
    assert load_checkpoint(newest_whole(run)).step == 20

@posix
@pytest.mark.parametrize("name", [s for s in STAGES if s != "delete"])
def test_killed_while_replacing(tmp_path, name):
    path = save(tmp_path/"m")
    assert killed_at(name, lambda: save(path, seed=1, step=20, overwrite=True)) == 9
    expected = 20 if name == "renamed" else 10
    assert load_checkpoint(path).step == expected  # found even in the moment between the two names
    remove_stale(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert load_checkpoint(path).step == expected

@posix
def test_killed_while_deleting(tmp_path):
    for step in (10, 20): save(step_path(tmp_path, step), step=step)
    assert killed_at("delete", lambda: remove_checkpoint(step_path(tmp_path, 20))) == 9
    assert newest_whole(tmp_path) == step_path(tmp_path, 10)
    remove_stale(tmp_path/"checkpoints")
    assert [p.name for p in (tmp_path/"checkpoints").iterdir()] == ["step-00000010"]

@posix
def test_stages_are_all_called(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(checkpoint, "stage", seen.append)
    save(tmp_path/"m")
    save(tmp_path/"m", overwrite=True)
    remove_checkpoint(tmp_path/"m")
    assert set(seen) == set(STAGES)

@pytest.mark.parametrize("name", [s for s in STAGES if s not in ("renamed", "delete")])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "bad disk"), SystemExit(1)])
def test_errors_leave_nothing_behind(tmp_path, monkeypatch, name, error):
    path = save(tmp_path/"m")
    def fail(n):
        if n == name: raise error
    monkeypatch.setattr(checkpoint, "stage", fail)
    with pytest.raises(type(error)): save(path, seed=1, overwrite=True)
    if name != "replace":
        with pytest.raises(type(error)): save(tmp_path/"new", seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert load_checkpoint(path).step == 10

def test_own_stale_folders_go_and_living_ones_stay(tmp_path):
    dead, mine, alive = (tmp_path/f".tmp-step-00000001-{pid}" for pid in (999999999, os.getpid(), os.getppid()))
    for p in (dead, mine, alive, tmp_path/".tmp-x", tmp_path/".git-1"): p.mkdir()
    assert set(remove_stale(tmp_path)) == {dead, mine}
    assert {p.name for p in tmp_path.iterdir()} == {alive.name, ".tmp-x", ".git-1"}


# No room

@posix
@pytest.mark.parametrize("limit", [100, 1000, 3000, 7000, 12000])
def test_disk_full_on_the_way(tmp_path, limit):
    import resource
    run = tmp_path/"run"
    save(step_path(run, 10))
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: save(step_path(run, 20), step=20, overwrite=True)
        except DiskFullError as e:
            os._exit(7 if "no room on the disk" in str(e) and str(step_path(run, 20)) in str(e) else 8)
    largest = max((step_path(run, 10)/n).stat().st_size for n in FILES)
    assert forked(child) == (7 if limit < largest else 0)
    if limit < largest:
        assert [p.name for p in (run/"checkpoints").iterdir()] == ["step-00000010"]
        assert load_checkpoint(run).step == 10

@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)])
def test_disk_full_by_its_number(tmp_path, monkeypatch, code):
    def fail(name):
        if name == "manifest": raise OSError(code, "full")
    monkeypatch.setattr(checkpoint, "stage", fail)
    with pytest.raises(DiskFullError, match="disk"): save(tmp_path/"m")
    assert not list(tmp_path.iterdir())

def test_room_is_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    monkeypatch.setattr(checkpoint, "stage", lambda n: pytest.fail("began to write"))
    with pytest.raises(DiskFullError, match="MB are needed, 0 MB are free"): save(tmp_path/"m")


# Run folders

def a_run(run, losses):
    for step, loss in losses.items():
        save(step_path(run, step), step=step, facts={} if loss is None else {"val_loss": loss})
    return run

@pytest.mark.parametrize("losses, best", [
    ({10: 2.0, 20: 1.0, 30: 1.5}, 20), ({10: 1.0, 20: 1.0, 30: 2.0}, 20), ({10: None, 20: None}, 20),
    ({10: 3.0, 20: None}, 10), ({10: float("nan"), 20: 2.0, 30: float("inf")}, 20)])
def test_best_and_newest(tmp_path, losses, best):
    a_run(tmp_path, losses)
    assert best_whole(tmp_path) == step_path(tmp_path, best) == resolve(tmp_path) == resolve(tmp_path/"checkpoints")
    assert newest_whole(tmp_path) == step_path(tmp_path, max(losses))

def test_steps_in_order_of_number(tmp_path):
    for name in ("step-100000000", "step-00000002", "step-00000010", "step-7", "step-x", ".bad-step-00000001"):
        (tmp_path/"checkpoints"/name).mkdir(parents=True)
    (tmp_path/"checkpoints"/"step-00000099").touch()
    assert [p.name for p in step_paths(tmp_path)] == ["step-00000002", "step-00000010", "step-100000000"]

def test_damaged_steps_are_passed_over(tmp_path):
    a_run(tmp_path, {10: 3.0, 20: 2.0, 30: 1.0})
    (step_path(tmp_path, 30)/"vocab.json").write_text("[]")
    with pytest.warns(UserWarning, match="step-00000030.*vocab.json"):
        assert best_whole(tmp_path) == step_path(tmp_path, 20)
    with pytest.warns(UserWarning): assert load_checkpoint(tmp_path).step == 20
    set_aside(step_path(tmp_path, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_whole(tmp_path) == step_path(tmp_path, 20)

def test_none_whole_is_an_error_and_none_at_all_is_none(tmp_path):
    assert newest_whole(tmp_path) is None and best_whole(tmp_path) is None
    a_run(tmp_path, {10: 3.0, 20: 2.0})
    for step in (10, 20): (step_path(tmp_path, step)/"model.safetensors").unlink()
    for f in (newest_whole, best_whole, resolve, load_checkpoint):
        refused(tmp_path, "none of its 2", "model.safetensors", f=f)
    names = [set_aside(step_path(tmp_path, step)).name for step in (10, 20)]
    assert names == [".bad-step-00000010", ".bad-step-00000020"]
    refused(tmp_path, "none of its 2", f=newest_whole)  # never a silent start from nothing

def test_set_aside_twice(tmp_path):
    for expected in (".bad-m", ".bad-m-2", ".bad-m-3"):
        (tmp_path/"m").mkdir()
        assert set_aside(tmp_path/"m").name == expected

def test_empty_step_folder(tmp_path):
    a_run(tmp_path, {10: 1.0})
    step_path(tmp_path, 20).mkdir()
    with pytest.warns(UserWarning, match="missing"): assert newest_whole(tmp_path) == step_path(tmp_path, 10)

def test_resolve_what_is_no_checkpoint(tmp_path, folder):
    assert resolve(folder/"model.safetensors") == folder == resolve(str(folder/"config.json"))
    refused(tmp_path/"nowhere", "no such checkpoint")
    (tmp_path/"empty").mkdir()
    refused(tmp_path/"empty", "no checkpoint in this folder")
    (tmp_path/"a.txt").write_text("virtue")
    refused(tmp_path/"a.txt", "a.txt", "folder")
    (tmp_path/"hf").mkdir()
    (tmp_path/"hf"/"config.json").write_text('{"model_type": "gpt2"}')
    refused(tmp_path/"hf", "not a MicroJulia checkpoint")

def test_a_moved_and_linked_folder(folder, tmp_path):
    os.rename(folder, tmp_path/"mine")
    (tmp_path/"link").symlink_to(tmp_path/"mine", target_is_directory=True)
    assert load_checkpoint(tmp_path/"link").step == 10
