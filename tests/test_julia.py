"Julia's files: reading against the manifest of real ones, hostile files, writing, conversion."
import hashlib
import json
import random
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from microjulia.checkpoint import load_checkpoint
from microjulia.exchange import jld2
from microjulia.exchange.jld2 import ArraySpec, Fields, JLD2Error, JuliaDict, JuliaVector, lookup3, read_jld2
from microjulia.exchange.julia import Converted, fit_tokenizer, flux_state, read_julia, write_julia, write_npz
from microjulia.exchange.jld2_writer import (JLD2Writer, PLAIN, _group, _header_size, _message, _put_header, _space,
                                             encode_h5, encode_jld2, julia_dict, write_jld2)
from microjulia.gpt import GPT, GPTConfig, find_model
from microjulia.tokenizer import CharTokenizer

SHARED = Path(__file__).resolve().parents[2]/"shared/jld2"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the collection of real .jld2 files is not beside the checkout")
FIXTURES = json.loads((SHARED/"manifest.json").read_text())["fixtures"] if SHARED.exists() else []
good = [f for f in FIXTURES if "keys" in f]
hostile = [f for f in FIXTURES if "expect" in f]


def walk(value, path):
    for key in path.split("/"): value = value[key] if isinstance(value, dict) else value[int(key) - 1]
    return value


@needs_shared
@pytest.mark.parametrize("fixture", good, ids=lambda f: f["file"])
def test_real_files_read_to_their_manifest(fixture):
    data = read_jld2(SHARED/fixture["file"])
    assert list(data) == fixture["keys"]
    for a in fixture["arrays"]:
        x = walk(data, a["path"])
        assert list(x.shape) == a["julia_size"] and x.dtype == a["dtype"]
        assert hashlib.sha256(x.tobytes(order="F")).hexdigest() == a["sha256_column_major"]
        assert x.sum(dtype=np.float64) == pytest.approx(a["sum"], rel=1e-12, abs=1e-12)
        if a["element_2_1"] is not None: assert x[1, 0] == a["element_2_1"]
    for path, value in fixture["scalars"].items():
        assert walk(data, path) == value and isinstance(walk(data, path), bool) == isinstance(value, bool)


@needs_shared
@pytest.mark.parametrize("fixture", good, ids=lambda f: f["file"])
def test_h5py_reads_the_same_arrays(fixture):
    h5py = pytest.importorskip("h5py")
    data = read_jld2(SHARED/fixture["file"])
    with h5py.File(SHARED/fixture["file"]) as f:
        everything, raw = [x for x in arrays_of(data)], (SHARED/fixture["file"]).read_bytes()
        for name in f:
            if name != "_types" and isinstance(f[name], h5py.Dataset) and f[name].dtype.kind in "fi" and f[name].shape:
                assert np.array_equal(f[name][()].T, data[name])
    for a in fixture["arrays"]:
        stored = raw[a["file_offset"]:a["file_offset"] + walk(data, a["path"]).nbytes]
        assert any(x.tobytes(order="F") == stored for x in everything)


def arrays_of(value):
    if isinstance(value, np.ndarray): yield value
    for v in value.values() if isinstance(value, dict) else value if isinstance(value, list) else (): yield from arrays_of(v)


@needs_shared
@pytest.mark.parametrize("fixture", hostile, ids=lambda f: f["file"])
@pytest.mark.parametrize("titled", [False, True])
def test_hostile_files_are_refused_cheaply(fixture, titled, tmp_path):
    raw = bytearray((SHARED/fixture["file"]).read_bytes())
    if titled: raw[:44] = b"HDF5-based Julia Data Format, version 0.2.0\0"
    path = tmp_path/fixture["file"]
    path.write_bytes(raw)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(JLD2Error) as e: read_jld2(path)
    assert time.monotonic() - start < 10
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@needs_shared
def test_without_arrays_nothing_is_read_of_them():
    path = SHARED/"flux_state_3dense_v0.2.0.jld2"
    tracemalloc.start()
    data = read_jld2(path, arrays=False)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert data["model_state"]["layers"][1]["weight"] == ArraySpec((128, 54), "f4")


@needs_shared
def test_only_what_is_asked_for_is_read():
    assert list(read_jld2(SHARED/"microjulia_synthetic_L2.jld2", only=["step", "hyperparams"])) == ["step", "hyperparams"]


@needs_shared
def test_types_survive():
    data = read_jld2(SHARED/"microjulia_synthetic_L2.jld2")
    assert str(data["hyperparams"].julia) == "Dict{String, Real}" and isinstance(data["hyperparams"], JuliaDict)
    assert data["opt_state"]["wte"]["weight"].julia.short == "Leaf"
    assert data["model_state"]["drop"]["active"] is None
    assert data["model_state"]["blocks"]["layers"][1]["ln1"]["\u03f5"].dtype == np.float32


@pytest.mark.parametrize("data, words", [
    (b"", "empty file"), (b"PK\3\4" + bytes(99), "zip archive"), (b"\x80\2}", "pickle"), (b'{"a": 1}', "JSON"),
    (b"GGUF" + bytes(99), "GGUF"), (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5 file that JLD2 did not write"),
    (b"HDF5-based Julia Data Format, version 0.2.0\0", "cut short"), (b"HDF5-based Julia Data Format, version 7.0.0\0" + bytes(600), "format 7.0.0"),
    (b"HDF5-based Julia Data Format, version 0.2.0\0" + bytes(2000), "no HDF5 superblock"), (b"<!DOCTYPE html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"), (bytes(700), "no kind known")])
def test_other_files_are_named(data, words, tmp_path):
    path = tmp_path/"checkpoint.jld2"
    path.write_bytes(data)
    with pytest.raises(JLD2Error, match=words) as e: read_jld2(path)
    assert "\n" not in str(e.value)


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError): read_jld2(tmp_path/"none.jld2")
    with pytest.raises(OSError): read_jld2(tmp_path)


def from_bytes(data, **kw): return jld2._variables(bytes(data), "file", None, True, **kw)


def address(data, name):
    f, root = jld2.open_jld2(data)
    return jld2.links(f, jld2.messages(f, root))[name]


def place_of_numbers(data, name):
    "Absolute place of the bytes of an array that lies outside of its header."
    f, _ = jld2.open_jld2(data)
    layout = next(pos for kind, _, pos, _ in jld2.messages(f, address(data, name)) if kind == 8)
    return 512 + f.number(layout + 2)


def resealed(data, name):
    "`data` with the checksum of one header made right."
    at = 512 + address(data, name)
    wide = 1 << (data[at + 5] & 3)
    end = at + 6 + wide + int.from_bytes(data[at + 6:at + 6 + wide], "little")
    data[end:end + 4] = lookup3(bytes(data[at:end])).to_bytes(4, "little")
    return data


def refs(*values):
    out = JuliaVector(values)
    return out


def test_an_object_inside_itself_is_refused():
    data = bytearray(encode_jld2({"v": refs(1.0, 2.0)}))
    at = place_of_numbers(data, "v")
    data[at:at + 8] = struct.pack("<Q", address(data, "v"))
    with pytest.raises(JLD2Error, match="contains itself"): from_bytes(data)


def test_one_long_text_referred_to_a_million_times_is_refused():
    texts = JuliaVector(["x" * 100_000] + [""] * 20_000)
    texts.julia, texts.inline = jld2.JuliaType("Core.String"), True
    data = bytearray(encode_jld2({"t": texts}))
    at = place_of_numbers(data, "t")
    data[at:at + 16 * 20_000] = data[at:at + 16] * 20_000
    tracemalloc.start()
    with pytest.raises(JLD2Error, match="unfolds to far more"): from_bytes(data)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


def test_deep_nesting_is_refused():
    value = refs(1.0)
    for _ in range(100): value = refs(value)
    with pytest.raises(JLD2Error, match="nested more than"): from_bytes(encode_jld2({"v": value}))
    value = refs(1.0)
    for _ in range(50): value = refs(value)
    from_bytes(encode_jld2({"v": value}))


def test_a_declared_size_beyond_the_stored_one_is_refused():
    data = bytearray(encode_jld2({"b": np.arange(5)}))
    f, _ = jld2.open_jld2(data)
    space = 512 + next(pos for kind, _, pos, _ in jld2.messages(f, address(data, "b")) if kind == 1)
    data[space + 4:space + 12] = struct.pack("<Q", 1 << 51)
    with pytest.raises(JLD2Error, match="checksum"): from_bytes(data)
    with pytest.raises(JLD2Error, match="declares 18,014,398,509,481,984 bytes"): from_bytes(resealed(data, "b"))


def test_an_external_link_and_external_numbers_are_refused():
    data = bytearray(encode_jld2({"b": np.arange(5)}))
    f, root = jld2.open_jld2(data)
    link = 512 + next(pos for kind, _, pos, _ in jld2.messages(f, root) if kind == 6)
    data[link + 1] |= 8                                        # a link with a type, and what was its alphabet is its type
    end = 512 + root + 7 + data[512 + root + 6]
    data[end:end + 4] = lookup3(bytes(data[512 + root:end])).to_bytes(4, "little")
    with pytest.raises(JLD2Error, match="leads out of it"): from_bytes(data)
    data = bytearray(encode_jld2({"b": np.arange(5)}))
    fill = 512 + address(data, "b") + 7
    assert data[fill] == 5
    data[fill] = 7
    with pytest.raises(JLD2Error, match="another file"): from_bytes(resealed(data, "b"))


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_gives_anything_but_an_error(seed, monkeypatch):
    data = encode_jld2({"m": {"w": np.ones((3, 4), np.float32), "n": (1, None, "x")}, "d": julia_dict({"a": 1, "b": 2.0})})
    monkeypatch.setattr(jld2, "_chunk", lambda f, at, start, n: (start, start + n))  # as if its checksums were right
    rng, places = random.Random(seed), [i for i in range(512, len(data)) if data[i]]
    for _ in range(700):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 2, 5])): bad[rng.choice(places)] = rng.choice([0, 1, 7, 8, 127, 255, rng.randrange(256)])
        try: from_bytes(bad)
        except JLD2Error as e: assert "\n" not in str(e)


@pytest.mark.parametrize("n", [1, 100, 559, 560, 600, 700, -1])
def test_every_truncation_is_seen(n):
    data = encode_jld2({"a": 1, "w": np.ones((3, 4))})
    with pytest.raises(JLD2Error): from_bytes(data[:n])


def compressed(x, shuffle=False, lie=0):
    "A file as `jldsave(path; x, compress = true)` writes it: one chunk, squeezed."
    w, size = JLD2Writer(), x.dtype.itemsize
    data = x.tobytes(order="F")
    if shuffle: data = np.frombuffer(data, np.uint8).reshape(-1, size).T.tobytes()
    data = zlib.compress(data)
    steps = ([struct.pack("<HHHI", 2, 0, 1, size)] if shuffle else []) + [struct.pack("<HHHI", 1, 0, 1, 5)]
    dims = (*x.shape[::-1][:-1], x.shape[0] + lie)
    where = w.room(len(data))
    w.put(where, data)
    layout = struct.pack("<BBBBB", 4, 2, 2, x.ndim + 1, 8) + struct.pack(f"<{x.ndim + 1}Q", *dims, size) + struct.pack("<BQIQ", 1, len(data), 0, where)
    body = (_message(5, b"\3\x09") + _message(1, _space(dims)) + _message(3, encode_h5(PLAIN["Core.Float32"]), 1)
            + _message(0x0b, bytes([2, len(steps)]) + b"".join(steps)) + _message(8, layout) + _message(0, bytes(16)))
    at = w.room(_header_size(len(body)))
    _put_header(w, at, body)
    root = _group(w, [("x", at)])
    head = jld2._titles[0] + b"0.2.0\0"
    block = b"\x89HDF\r\n\x1a\n\2\x08\x08\0" + struct.pack("<4Q", 512, jld2._undefined, len(w.buf), root)
    w.put(-512, head + bytes(512 - len(head)) + block + lookup3(block).to_bytes(4, "little"))
    return w.buf


@pytest.mark.parametrize("shuffle", [False, True])
def test_compressed_arrays(shuffle):
    x = np.arange(60, dtype=np.float32).reshape(12, 5)
    assert np.array_equal(from_bytes(compressed(x, shuffle))["x"], x)


def test_a_compressed_bomb_is_refused():
    tracemalloc.start()
    with pytest.raises(JLD2Error, match="unfolds to far more"):
        from_bytes(compressed(np.zeros((1000, 1000), np.float32), lie=10**6))
    with pytest.raises(JLD2Error, match="not the size it declares"): from_bytes(compressed(np.zeros((1000, 1000), np.float32), lie=-1))
    with pytest.raises(JLD2Error, match="not the size it declares"): from_bytes(compressed(np.zeros((1000, 1000), np.float32), lie=5))
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("n", [11, 13])
def test_lookup3_against_a_slow_one(n):
    rng = random.Random(n)
    for size in range(40):
        data = rng.randbytes(size)
        assert lookup3(data) == slow_lookup3(data)


def slow_lookup3(data):
    rot = lambda x, k: ((x << k) | (x >> (32 - k))) & 0xffffffff
    a = b = c = (0xdeadbeef + len(data)) & 0xffffffff
    while len(data) > 12:
        x, y, z = struct.unpack("<III", data[:12])
        v = [(a + x) & 0xffffffff, (b + y) & 0xffffffff, (c + z) & 0xffffffff]
        for i, k in enumerate((4, 6, 8, 16, 19, 4)):
            p, q, r = i % 3, (i + 2) % 3, (i + 1) % 3
            v[p] = ((v[p] - v[q]) & 0xffffffff) ^ rot(v[q], k)
            v[q] = (v[q] + v[r]) & 0xffffffff
        a, b, c = v
        data = data[12:]
    if not data: return c
    x, y, z = struct.unpack("<III", data + bytes(12 - len(data)))
    v = {"a": (a + x) & 0xffffffff, "b": (b + y) & 0xffffffff, "c": (c + z) & 0xffffffff}
    for p, q, k in (("c", "b", 14), ("a", "c", 11), ("b", "a", 25), ("c", "b", 16), ("a", "c", 4), ("b", "a", 14), ("c", "b", 24)):
        v[p] = ((v[p] ^ v[q]) - rot(v[q], k)) & 0xffffffff
    return v["c"]


# writing

def julias_title(raw): return raw[44:512].split(b"\0")[0].decode()[2:-1]


def without_types(x):
    "What `read_jld2` gave as plain dicts and tuples, so that the writer has to work out the types."
    if isinstance(x, JuliaDict): return julia_dict(dict(x), "Core.Real")
    if not isinstance(x, Fields): return x
    values = {k: without_types(v) for k, v in x.items()}
    is_tuple = x.julia is not None and x.julia.short in ("Tuple", "NTuple")
    return tuple(values.values()) if is_tuple else values


@needs_shared
@pytest.mark.parametrize("fixture", [f for f in good if f["reencoded_byte_identical"]], ids=lambda f: f["file"])
def test_writing_gives_julias_own_bytes(fixture):
    raw = (SHARED/fixture["file"]).read_bytes()
    assert encode_jld2(read_jld2(SHARED/fixture["file"]), julias_title(raw)) == raw


@needs_shared
@pytest.mark.parametrize("name", ["flux_state_mlp_v0.2.0", "flux_state_3dense_v0.2.0", "jld2_docs_test_v0.2.0"])
def test_types_worked_out_from_values_are_julias(name):
    raw = (SHARED/f"{name}.jld2").read_bytes()
    plain = {k: without_types(v) for k, v in read_jld2(SHARED/f"{name}.jld2").items()}
    assert encode_jld2(plain, julias_title(raw)) == raw


@needs_shared
def test_a_model_written_from_plain_values_is_the_one_written_from_julias():
    data = read_jld2(SHARED/"microjulia_synthetic_L2.jld2")
    del data["opt_state"]
    assert encode_jld2({k: without_types(v) for k, v in data.items()}) == encode_jld2(data)


dense = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": False, "σ": ()}
values = {
    "text": "héllo 𝔽", "empty text": "", "nothing": None, "true": True, "f32": np.float32(1.5), "i8": np.int8(-3),
    "u64": np.uint64(2**63), "symbol": jld2.Symbol("abc"), "bools": np.array([[True, False], [False, True]]), "cube": np.arange(24.).reshape(2, 3, 4),
    "none of three": np.zeros((0, 3), np.float32), "fortran": np.asfortranarray(np.arange(6.).reshape(2, 3)), "view": np.arange(20)[::3],
    "big": np.arange(5000.), "nested": {"a": {"b": (1, "x", None, ())}}, "dict": julia_dict({"lr": 0.1, "name": "x", "arr": np.arange(3)}),
    "empty dict": julia_dict({}), "dict in a struct": {"d": julia_dict({"a": 1}), "n": 2}, "6 blocks": tuple({"a": dense, "b": dense} for _ in range(6)), "30 blocks": tuple({"a": dense, "i": i} for i in range(30)),
    "large": {f"x{i}": (float(i), i) for i in range(100)}, "long numbers": tuple(float(i) for i in range(12)), "long texts": tuple("abcdefghijkl"),
    "float16": np.arange(4, dtype=np.float16), "name" * 80: 1, "big text": "ab" * 10_000}


def same(a, b):
    if isinstance(b, np.ndarray): return isinstance(a, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(b, tuple): return len(a) == len(b) and all(same(a[i + 1], v) for i, v in enumerate(b))
    if isinstance(b, dict): return list(a) == list(b) and all(same(a[k], v) for k, v in b.items())
    return a == b and (type(a) is type(b) or isinstance(a, np.generic))


@pytest.mark.parametrize("key", values, ids=lambda k: k[:12])
def test_what_is_written_is_read_and_written_the_same(key):
    data = encode_jld2({key: values[key]})
    back = from_bytes(data)
    assert same(back[key], values[key])
    assert encode_jld2(back) == data


def test_all_together_and_shared_arrays_once(tmp_path):
    w = np.ones(100)
    back = read_jld2(write_jld2(tmp_path/"sub/all.jld2", values | {"w1": w, "w2": w}))
    assert all(same(back[k], v) for k, v in values.items()) and back["w1"] is back["w2"]
    assert [p.name for p in (tmp_path/"sub").iterdir()] == ["all.jld2"]


def test_h5py_reads_what_is_written(tmp_path):
    h5py = pytest.importorskip("h5py")
    write_jld2(tmp_path/"all.jld2", values)
    with h5py.File(tmp_path/"all.jld2") as f:
        assert np.array_equal(f["cube"][()].T, values["cube"]) and f["text"][()].decode() == values["text"]
        assert f["nested"][()]["a"]["b"]["1"] == 1 and f["nothing"].shape is None
        assert np.array_equal(f[f["6 blocks"][()]["1"]["a"]["weight"]][()].T, dense["weight"])


@pytest.mark.parametrize("value", [3 + 4j, object(), {1, 2}, np.zeros(2, complex), np.array(["a"])])
def test_what_cannot_be_written_is_said(value):
    with pytest.raises(JLD2Error, match="cannot be written"): encode_jld2({"x": value})


# models: each as Julia would save it, from random arrays in Julia's layout, against a forward pass of its own, columns first

def numbers(*shape, seed=[0], scale=0.3):
    seed[0] += 1
    return np.asfortranarray(np.random.default_rng(seed[0]).normal(size=shape) * scale).astype(np.float32)


def rms(x, w, eps=1e-6): return x / np.sqrt((x**2).mean(0, keepdims=True) + eps) * w[:, None]


def softmax(x):
    x = np.exp(x - x.max(0, keepdims=True))
    return x / x.sum(0, keepdims=True)


def attend(q, k, v):
    "Columns are positions: `(hs, T)` each."
    scores = k.T @ q / np.sqrt(len(q))
    scores[np.tril_indices(q.shape[1], -1)] = -np.inf
    return v @ softmax(scores)


def rope(x, base=10_000):
    half, T = len(x) // 2, x.shape[1]
    angle = np.arange(T) * (base ** (-2 * np.arange(half) / len(x)))[:, None]
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])


def swiglu(x, gate, up, down):
    g = gate @ x
    return down @ (g / (1 + np.exp(-g)) * (up @ x))


def flux_dense(o, i, bias=False): return {"weight": numbers(o, i), "bias": numbers(o) if bias else False, "\u03c3": ()}


def flux_norm(C, eps):
    return {"\u03bb": (), "diag": {"scale": 1 + numbers(C), "bias": numbers(C), "\u03c3": ()}, "\u03f5": np.float32(eps), "size": (C,), "affine": True}


def gpt2_tree(L, C=16, V=28, T=12, nh=2, bias=False, new=False, eps=1e-5):
    drop = {"p": 0.1, "dims": (), "active": None, "rng": ()}
    pad = {"padding_idx": None} if new else {}
    block = lambda: {"ln1": flux_norm(C, eps), "attn": {"qkv": flux_dense(3 * C, C, bias), "proj": flux_dense(C, C, bias), "n_head": nh},
                     "ln2": flux_norm(C, eps), "ffwd": {"net": {"layers": (flux_dense(4 * C, C, bias), (), flux_dense(C, 4 * C, bias), drop)}}}
    return {"wte": {"weight": numbers(C, V)} | pad, "wpe": {"weight": numbers(C, T)} | pad, "drop": drop,
            "blocks": {"layers": tuple(block() for _ in range(L))}, "ln_f": flux_norm(C, eps), "lm_head": flux_dense(V, C)}


def gpt2_forward(s, ids, new=False):
    def dense(x, d): return d["weight"] @ x + (d["bias"][:, None] if d["bias"] is not False else 0)

    def norm(x, ln):
        eps = np.float64(ln["\u03f5"])
        root = np.sqrt(x.var(0, keepdims=True) + (eps if new else eps**2))
        return (x - x.mean(0, keepdims=True)) / root * ln["diag"]["scale"][:, None] + ln["diag"]["bias"][:, None]
    x = s["wte"]["weight"][:, ids].astype(float) + s["wpe"]["weight"][:, :len(ids)]
    for b in s["blocks"]["layers"]:
        q, k, v = np.split(dense(norm(x, b["ln1"]), b["attn"]["qkv"]), 3)
        parts = zip(*(np.split(m, b["attn"]["n_head"]) for m in (q, k, v)), strict=True)
        x = x + dense(np.concatenate([attend(*p) for p in parts]), b["attn"]["proj"])
        h = dense(norm(x, b["ln2"]), b["ffwd"]["net"]["layers"][0])
        x = x + dense(h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))), b["ffwd"]["net"]["layers"][2])
    return s["lm_head"]["weight"] @ norm(x, s["ln_f"])


def fluxgpt_tree(L=2, C=32, V=28, nh=4, kv=2, f=64):
    h = C // nh
    rms_ = lambda: {"weight": 1 + numbers(C), "eps": np.float32(1e-6)}
    block = lambda: {"ln1": rms_(), "attn": {"wq": flux_dense(C, C), "wkv": flux_dense(2 * kv * h, C), "proj": flux_dense(C, C), "n_head": nh, "n_kv_head": kv},
                     "ln2": rms_(), "ffwd": {"w_gate": flux_dense(f, C), "w_up": flux_dense(f, C), "w_down": flux_dense(C, f)}}
    wte = numbers(C, V)
    return {"wte": {"weight": wte}, "drop": {"p": 0.1, "dims": (), "active": None, "rng": ()},
            "blocks": {"layers": tuple(block() for _ in range(L))}, "ln_f": rms_(), "lm_head": {"weight_ref": wte}}


def fluxgpt_forward(s, ids):
    x = s["wte"]["weight"][:, ids].astype(float)
    for b in s["blocks"]["layers"]:
        a, u = b["attn"], rms(x, b["ln1"]["weight"])
        nh, kv = a["n_head"], a["n_kv_head"]
        q, (k, v) = np.split(a["wq"]["weight"] @ u, nh), np.split(a["wkv"]["weight"] @ u, 2)
        k, v = np.split(k, kv), np.split(v, kv)
        out = [attend(rope(q[i]), rope(k[i // (nh // kv)]), v[i // (nh // kv)]) for i in range(nh)]
        x = x + a["proj"]["weight"] @ np.concatenate(out)
        f = b["ffwd"]
        x = x + swiglu(rms(x, b["ln2"]["weight"]), *(f[n]["weight"] for n in ("w_gate", "w_up", "w_down")))
    return s["wte"]["weight"].T @ rms(x, s["ln_f"]["weight"])


def lux_tree(mixer, name, L=2, C=32, V=28, f=64, dense=lambda x: {"weight": x}):
    block = lambda: {"ln1": {"weight": 1 + numbers(C)}, name: mixer(C), "ln2": {"weight": 1 + numbers(C)},
                     "ffn": {"w1": dense(numbers(f, C)), "v": dense(numbers(f, C)), "w2": dense(numbers(C, f))}}
    return {"tok_emb": {"weight": numbers(C, V)}, "blocks": {f"block_{i + 1}": block() for i in range(L)},
            "ln_f": {"weight": 1 + numbers(C)}, "head": ()}


def lux_forward(s, ids, mix):
    x = s["tok_emb"]["weight"][:, ids].astype(float)
    for b in s["blocks"].values():
        x = x + mix(b, rms(x, b["ln1"]["weight"]))
        w = [b["ffn"][n]["weight"] if isinstance(b["ffn"][n], dict) else b["ffn"][n] for n in ("w1", "v", "w2")]
        x = x + swiglu(rms(x, b["ln2"]["weight"]), *w)
    return s["tok_emb"]["weight"].T @ rms(x, s["ln_f"]["weight"])


def scrambled(b, u, H=4):
    "JuliaSLM's attention: `(H hd, T)` reshaped straight to `(hd, T, H)`, columns first."
    w, T = {n: m["weight"] for n, m in b["attn"].items()}, u.shape[1]
    q, k, v = ((w[n] @ u).reshape(-1, T, H, order="F") for n in ("wq", "wk", "wv"))
    y = np.stack([attend(rope(q[:, :, h]), rope(k[:, :, h]), v[:, :, h]) for h in range(H)], 2)
    return w["wo"] @ y.reshape(-1, T, order="F")


def conv(kernel, u):
    "Cross-correlation: the last tap meets the current token."
    K, T = len(kernel), u.shape[1]
    return np.stack([sum(kernel[k] * u[:, t - K + 1 + k] for k in range(K) if t - K + 1 + k >= 0) for t in range(T)], 1)


def monarch(L1, L2, u):
    "M[(a', b'), (a, b)] = L1[b', b, a'] L2[a', a, b], position a + p b, lower triangle."
    p, T = len(L1), u.shape[1]
    M = np.array([[L1[s // p, t // p, s % p] * L2[s % p, t % p, t // p] if t <= s else 0 for t in range(p * p)] for s in range(p * p)])
    return (M[:T, :T] @ u.T).T


def sigmoid(x): return 1 / (1 + np.exp(-x))


def monarch_mix(b, u):
    m = b["seq_mixer"]
    heads = list(m["monarchs"].values())
    mixed = np.concatenate([monarch(h["L1"], h["L2"], part) for h, part in zip(heads, np.split(u, len(heads)), strict=True)])
    return sigmoid(m["gate"]["weight"])[:, None] * (conv(m["conv"]["kernel"], u) + mixed)


def symbio_mix(b, u):
    m, T = b["seq_mixer"], u.shape[1]
    gate, kernel = softmax(m["gate"]["logits"]), m["longconv"]["kernel"]
    far = np.stack([sum(kernel[j] * u[:, t - j] for j in range(t + 1)) for t in range(T)], 1)
    parts = conv(m["conv"]["kernel"], u), monarch(m["monarch"]["L1"], m["monarch"]["L2"], u), far
    return sum(g[:, None] * part for g, part in zip(gate, parts, strict=True))


def attn_weights(C): return {"attn": {n: {"weight": numbers(C, C)} for n in ("wq", "wk", "wv", "wo")}}["attn"]


def monarch_weights(C, nm=4, p=4):
    return {"conv": {"kernel": numbers(4, C)}, "gate": {"weight": numbers(C)},
            "monarchs": {f"head_{h + 1}": {"L1": numbers(p, p, p), "L2": numbers(p, p, p)} for h in range(nm)}}


def symbio_weights(C, p=4):
    return {"conv": {"kernel": numbers(4, C)}, "monarch": {"L1": numbers(p, p, p), "L2": numbers(p, p, p)},
            "longconv": {"kernel": numbers(p * p, C)}, "gate": {"logits": numbers(3, C)}}


def there(arch):
    try: find_model(arch)
    except ValueError: return False
    return True


def logits_of(path, ids, **given):
    model = read_julia(path, **given).model()
    with torch.no_grad(): return model(torch.as_tensor(ids)[None])[0].double().numpy()


def agree(ours, julias):
    assert ours.shape == julias.T.shape
    assert np.abs(ours - julias.T).max() <= 1e-5 * max(1, np.abs(julias).max())


IDS = np.array([8, 6, 3, 3, 16, 0, 24, 27, 1, 5])


@pytest.mark.parametrize("L, bias, new", [(1, False, False), (2, True, False), (3, False, True), (7, False, False), (12, False, False)])
def test_gpt2_from_julia_has_julias_logits(L, bias, new, tmp_path):
    tree = gpt2_tree(L, bias=bias, new=new, eps=1e-2)  # an epsilon that is felt
    hyper = julia_dict(dict(n_head=4 if L == 1 else 2, dropout=0.1), "Core.Real")
    write_jld2(tmp_path/"checkpoint.jld2", {"model_state": tree, "step": 7, "best_val_loss": float("inf"), "hyperparams": hyper})
    c = read_julia(tmp_path/"checkpoint.jld2")
    assert c.arch == "gpt2" and c.hyperparams["n_head"] == 2 and c.step == 7 and c.best_val_loss is None
    assert c.hyperparams["norm_eps"] == pytest.approx(1e-2 if new else 1e-4)
    assert ("n_head" in c.facts["source"]["numerics"]) == (L == 1)
    agree(logits_of(tmp_path/"checkpoint.jld2", IDS), gpt2_forward(tree, IDS, new))


def test_juliafluxgpt_from_julia_has_julias_logits(tmp_path):
    tree = fluxgpt_tree()
    hyper = julia_dict(dict(n_head=4, block_size=16, rope_base=10_000.0, use_bpe=True))
    write_jld2(tmp_path/"best_model.jld2", {"model_state": tree, "step": 3, "hyperparams": hyper, "data_epoch": 1})
    c = read_julia(tmp_path/"best_model.jld2")
    assert c.arch == "juliafluxgpt" and c.hyperparams["n_kv_head"] == 2
    if not there("juliafluxgpt"): pytest.skip("this version has no juliafluxgpt")
    agree(logits_of(tmp_path/"best_model.jld2", IDS), fluxgpt_forward(tree, IDS))


@pytest.mark.parametrize("nested", [True, False])
def test_juliaslm_from_julia_has_julias_logits(nested, tmp_path):
    tree = lux_tree(attn_weights, "attn", dense=(lambda x: {"weight": x}) if nested else lambda x: x)
    write_jld2(tmp_path/"final.jld2", {"schema_version": 2, "parameters": tree, "step": 5, "best_val_loss": 3.5})
    with pytest.raises(ValueError, match="number of heads is nowhere"): read_julia(tmp_path/"final.jld2")
    (tmp_path/"config.toml").write_text('[model]\narch = "transformer"\nn_heads = 4\nhead_dim = 8\ncontext_length = 12\n')
    c = read_julia(tmp_path/"final.jld2")
    assert c.arch == "juliaslm" and c.hyperparams["head_layout"] == "julia_flat" and c.hyperparams["n_head"] == 4
    assert np.array_equal(c.tensors["blocks.1.attn.wq.weight"], tree["blocks"]["block_2"]["attn"]["wq"]["weight"])
    if not there("juliaslm"): pytest.skip("this version has no juliaslm")
    ids = IDS[:8]
    agree(logits_of(tmp_path/"final.jld2", ids), lux_forward(tree, ids, scrambled))


def test_monarchslm_from_julia_has_julias_logits(tmp_path):
    tree = lux_tree(monarch_weights, "seq_mixer")
    write_jld2(tmp_path/"final.jld2", {"parameters": tree})
    c = read_julia(tmp_path/"final.jld2")
    assert c.arch == "monarchslm" and c.hyperparams["block_size"] == 16 and c.hyperparams["n_head"] == 4
    if not there("monarchslm"): pytest.skip("this version has no monarchslm")
    agree(logits_of(tmp_path/"final.jld2", IDS), lux_forward(tree, IDS, monarch_mix))


def test_symbioslm_from_julia_has_julias_logits(tmp_path):
    tree = lux_tree(symbio_weights, "seq_mixer")
    write_jld2(tmp_path/"final.jld2", {"parameters": tree})
    assert read_julia(tmp_path/"final.jld2").arch == "symbioslm"
    if not there("symbioslm"): pytest.skip("this version has no symbioslm")
    agree(logits_of(tmp_path/"final.jld2", IDS), lux_forward(tree, IDS, symbio_mix))


def json_checkpoint(L=2, C=16, V=28, T=12, **more):
    mats = {"wte": numbers(V, C), "wpe": numbers(T, C), "lm_head": numbers(V, C)}
    for i in range(L):
        mats |= {f"layer{i}.attn_w{n}": numbers(C, C) for n in "qkvo"}
        mats |= {f"layer{i}.mlp_fc1": numbers(4 * C, C), f"layer{i}.mlp_fc2": numbers(C, 4 * C)}
    return mats, {"uchars": list(" .abcdefghijklmnopqrstuvwxy"), "hyperparams": {"n_layer": L, "n_embd": C, "block_size": T, "n_head": 4},
                  "state_dict": {n: m.tolist() for n, m in mats.items()}, "training": {"best_val_loss": 2.4}, "optimizer": {"step": 150}} | more


def micro_forward(w, ids, L=2, nh=4, norm=True):
    one = np.ones(w["wte"].shape[1])
    x = (w["wte"][ids] + w["wpe"][:len(ids)]).astype(float).T
    if norm: x = rms(x, one, 1e-5)
    for i in range(L):
        u = rms(x, one, 1e-5)
        q, k, v = (np.split(w[f"layer{i}.attn_w{n}"] @ u, nh) for n in "qkv")
        x = x + w[f"layer{i}.attn_wo"] @ np.concatenate([attend(*p) for p in zip(q, k, v, strict=True)])
        x = x + w[f"layer{i}.mlp_fc2"] @ np.maximum(w[f"layer{i}.mlp_fc1"] @ rms(x, one, 1e-5), 0)
    return w["lm_head"] @ x


@pytest.mark.parametrize("norm", [True, False])
def test_json_checkpoints_of_the_ancestors(norm, tmp_path):
    mats, data = json_checkpoint()
    (tmp_path/"best.json").write_text(json.dumps(data))
    c = read_julia(tmp_path/"best.json", embedding_norm=norm)
    assert c.arch == "juliagpt" and c.step == 150 and c.best_val_loss == 2.4 and c.tokenizer.vocab_size == 27
    agree(logits_of(tmp_path/"best.json", IDS, embedding_norm=norm), micro_forward(mats, IDS, norm=norm))
    opened = load_checkpoint(c.save(tmp_path/"out"))
    assert opened.tokenizer.chars[-1] == "\ue000" and "bos" in opened.facts["source"]["numerics"]
    (tmp_path/"auto.json").write_text(json.dumps(data | {"format": "autograd_v2", "training": {"best_val_loss": 1e30}}))
    with pytest.warns(UserWarning, match="normalises embeddings"): assert read_julia(tmp_path/"auto.json").best_val_loss is None


def test_numpy_exports(tmp_path):
    tree = fluxgpt_tree()
    write_jld2(tmp_path/"a.jld2", {"model_state": tree, "hyperparams": julia_dict(dict(block_size=16))})
    t = read_julia(tmp_path/"a.jld2").tensors
    short = {n.removesuffix(".weight") if "attn" in n or "ffwd" in n else n: x for n, x in t.items()}
    np.savez(tmp_path/"juliaflux_weights.npz", **short, _hp_n_embd=32, _hp_block_size=16, _hp_n_layer=2, _hp_n_head=4, _hp_n_kv_head=2)
    c = read_julia(tmp_path/"juliaflux_weights.npz")
    assert c.arch == "juliafluxgpt" and c.hyperparams["block_size"] == 16
    if there("juliafluxgpt"): agree(logits_of(tmp_path/"juliaflux_weights.npz", IDS), fluxgpt_forward(tree, IDS))
    tree = lux_tree(attn_weights, "attn")
    flat = {"tok_emb.weight": tree["tok_emb"]["weight"].T, "ln_f": tree["ln_f"]["weight"]}
    for i, b in enumerate(tree["blocks"].values()):
        flat |= {f"blocks.{i}.attn.{n}": m["weight"] for n, m in b["attn"].items()} | {f"blocks.{i}.ffn.{n}": m["weight"] for n, m in b["ffn"].items()}
        flat |= {f"blocks.{i}.{n}.weight": b[n]["weight"] for n in ("ln1", "ln2")}
    np.savez(tmp_path/"juliaslm_weights.npz", **flat, _hp_n_heads=4, _hp_head_dim=8, _hp_embed_dim=32)
    with pytest.raises(ValueError, match="context is nowhere"): read_julia(tmp_path/"juliaslm_weights.npz")
    c = read_julia(tmp_path/"juliaslm_weights.npz", block_size=12)
    assert c.arch == "juliaslm" and c.hyperparams["n_head"] == 4
    if there("juliaslm"): agree(logits_of(tmp_path/"juliaslm_weights.npz", IDS[:8], block_size=12), lux_forward(tree, IDS[:8], scrambled))


def test_npz_with_pickles_or_bombs_is_refused(tmp_path):
    np.savez(tmp_path/"p.npz", **{"blocks.0.attn.wkv": np.array([{"a": 1}], object)})
    with pytest.raises(ValueError, match="not an .npz of plain arrays"): read_julia(tmp_path/"p.npz")
    np.savez_compressed(tmp_path/"b.npz", x=np.zeros((100, 1 << 20), np.uint8))
    with pytest.raises(ValueError, match="unfolds to far more"): read_julia(tmp_path/"b.npz")


@needs_shared
def test_the_synthetic_checkpoint_becomes_a_checkpoint_and_comes_back(tmp_path):
    source = SHARED/"microjulia_synthetic_L2.jld2"
    c = read_julia(source)
    assert c.tokenizer.vocab_size == 28 and c.step == 250 and c.best_val_loss == 2.5 and c.hyperparams["norm_eps"] == 1e-10
    opened = load_checkpoint(c.save(tmp_path/"model"))
    data = read_jld2(source)
    assert encode_jld2({"m": flux_state(opened.model)}) == encode_jld2({"m": data["model_state"]})
    plain = without_types(data["model_state"])
    ids = np.arange(16)
    with torch.no_grad(): agree(opened.model(torch.tensor(ids)[None])[0].double().numpy(), gpt2_forward(plain, ids))


@pytest.mark.parametrize("flux", ["0.16.9", "0.16.11"])
@pytest.mark.parametrize("config", [dict(), dict(norm_eps=1e-10, init="flux"), dict(bias=True, n_layer=7), dict(n_layer=11)])
def test_written_for_julia_and_read_again(config, flux, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8} | config)).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    path = write_julia(tmp_path/"out/checkpoint.jld2", model, CharTokenizer(), 12, 1.5, flux)
    back = read_julia(path)
    x = torch.arange(8)[None]
    assert back.hyperparams["norm_eps"] == pytest.approx(model.config.norm_eps, rel=1e-5) and back.step == 12 and back.best_val_loss == 1.5
    with torch.no_grad(): assert torch.allclose(back.model()(x), model(x), rtol=0, atol=1e-5)
    assert back.tokenizer == CharTokenizer()


def test_what_is_not_whole_is_refused_in_one_line(tmp_path):
    tree = gpt2_tree(1)
    path = tmp_path/"checkpoint.jld2"

    def refused(words, tree, **more):
        write_jld2(path, {"model_state": tree} | more)
        with pytest.raises(ValueError, match=words) as e: read_julia(path).model()
        assert "\n" not in str(e.value) and str(path) in str(e.value)
    refused("lacks the array", {k: v for k, v in tree.items() if k != "ln_f"})
    refused("has no place", tree | {"adapter": {"weight": numbers(2, 2)}})
    refused("is \\(28, 8\\)", tree | {"lm_head": flux_dense(28, 8)})
    refused("not finite", tree | {"lm_head": flux_dense(28, 16) | {"weight": np.full((28, 16), np.nan, np.float32)}})
    refused("no model of this family", {"a": 1})
    refused("none of the architectures", {"wte": {"weight": numbers(4, 4)}})
    refused("not divisible", tree | {"blocks": {"layers": ({**tree["blocks"]["layers"][0], "attn": {**tree["blocks"]["layers"][0]["attn"], "n_head": 5}},)}})
    bad = {**tree["blocks"]["layers"][0]["attn"], "n_head": "two"}
    refused("n_head", tree | {"blocks": {"layers": ({**tree["blocks"]["layers"][0], "attn": bad},)}})
    path = tmp_path/"x.json"
    for words, data in (("not valid JSON", '{"state_dict": {'), ("JSON, but a list", '["a"]'), ("without a state_dict", '{"a": 1}'),
                        ("not a matrix", '{"state_dict": {"wte": [[1], [2, 3]]}}'), ("lacks the array", '{"state_dict": {"layer0.attn_wq": [[1]]}}')):
        path.write_text(data)
        with pytest.raises(ValueError, match=words): read_julia(path)
    for head, words in ((b"", "empty"), (b"GGUF....", "GGUF"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"\x80\4", "pickle")):
        path.write_bytes(head)
        with pytest.raises(ValueError, match=words): read_julia(path)


def test_tokenizers(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8))
    path = write_julia(tmp_path/"a/checkpoint.jld2", model, CharTokenizer())
    (tmp_path/"a/vocab.json").write_text(json.dumps(list("abc")))
    c = read_julia(path)
    assert load_checkpoint(c.save(tmp_path/"m")).tokenizer.vocab_size == 28 and load_checkpoint(tmp_path/"m").facts["tokenizer"]
    (tmp_path/"a/vocab.json").write_text(json.dumps([chr(97 + i) for i in range(40)]))
    with pytest.raises(ValueError, match="do not belong together"): read_julia(path).save(tmp_path/"n")
    (tmp_path/"a/vocab.json").unlink()
    with pytest.raises(ValueError, match="no vocab.json beside it"): read_julia(path).save(tmp_path/"n")
    assert not (tmp_path/"n").exists()
    read_julia(path, tokenizer=CharTokenizer()).save(tmp_path/"n")
    assert fit_tokenizer(CharTokenizer("ab"), 2, "x") == (CharTokenizer("ab"), "")


def test_an_architecture_that_is_not_here_still_gives_its_arrays():
    c = Converted("kolmogorov", {}, {"w": np.ones(2)}, name="k.jld2")
    with pytest.raises(ValueError, match="k.jld2: a model of kolmogorov, and unknown architecture.*its arrays are in"): c.model()


def test_npz_holds_any_model(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8))
    with np.load(write_npz(tmp_path/"m.npz", model)) as f:
        assert f["_hp_n_head"] == 2 and np.array_equal(f["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight.detach().numpy())


@pytest.mark.parametrize("L, blocks, layers", [(6, 6, 6), (7, 7, 7), (10, 7, 7), (11, 7, 7)])
def test_what_is_inline_and_what_elsewhere_follows_julias_memory(L, blocks, layers):
    "A block is 160 bytes in Julia, the limit 1,024; more than ten equal blocks become a Vector."
    kind = lambda t, name: next(place[1].kind for n, place, _ in t.fields if n == name)
    tree = gpt2_tree(L, C=4, T=4, nh=1)
    back = from_bytes(encode_jld2({"m": tree}))["m"]
    assert (kind(back.julia, "blocks"), kind(back["blocks"].julia, "layers")) == (blocks, layers)
    assert list(back["blocks"]["layers"]) == [str(i + 1) for i in range(L)]


@pytest.mark.parametrize("value, bytes_and_step", [
    ({"a": np.int8(1), "b": 2.0, "c": (np.float32(1), True), "d": (), "e": "text", "f": np.zeros(3)}, (40, 8)),
    ({"a": np.int8(1), "b": 2.0, "c": np.int8(1)}, (24, 8)),                    # 1 + 7 of padding, 8, 1 + 7 of padding
    ({"a": {"b": 2.0, "c": True}, "d": True}, (24, 8)),                         # 8 + 1 + 7 of padding, 1 + 7 of padding
    ({"a": (np.int16(1), True), "b": True}, (6, 2)), ({"a": True, "b": np.int16(1)}, (4, 2)), ((), (0, 1))], ids=str)
def test_a_struct_of_small_numbers_is_measured_as_julia_aligns_it(value, bytes_and_step):
    from microjulia.exchange.jld2_writer import _memory, julia_type
    assert _memory(julia_type(value)) == bytes_and_step
