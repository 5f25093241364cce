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
from microjulia.exchange.jld2 import ArraySpec, Fields, JLD2Error, JuliaDict, lookup3, read_jld2

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
