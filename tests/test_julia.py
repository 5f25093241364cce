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

from microjulia.exchange import jld2
from microjulia.exchange.jld2 import ArraySpec, Fields, JLD2Error, JuliaDict, JuliaVector, lookup3, read_jld2
from microjulia.exchange.jld2_writer import (JLD2Writer, PLAIN, _group, _header_size, _message, _put_header, _space,
                                             encode_h5, encode_jld2, julia_dict, write_jld2)

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
    "empty dict": julia_dict({}), "6 blocks": tuple({"a": dense, "b": dense} for _ in range(6)), "30 blocks": tuple({"a": dense, "i": i} for i in range(30)),
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
