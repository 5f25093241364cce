"An architecture from outside: the tutorial's mixer, held against the contract, served, and found by entry point."
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from model_contract import CHECKS, make, some_ids

from microjulia import gpt
from microjulia.generation import Generator, SamplingParams
from microjulia.serving.engine import Engine, takes_row_lengths
from microjulia.tokenizer import CharTokenizer

TUTORIAL = Path(__file__).parent.parent / "nbs" / "tutorials" / "write_a_new_mixer.ipynb"


@pytest.fixture(autouse=True)
def fading(monkeypatch):
    "The classes of the tutorial as a module, under their word."
    module = ModuleType("fading")
    monkeypatch.setitem(sys.modules, "fading", module)
    cells = ["".join(c["source"]) for c in json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    for source in cells:
        if "import torch" in source or "\nclass " in source or source.startswith("class "): exec(source, module.__dict__)
        elif source.startswith("def fade_naive") or source.startswith("def fading_matrix"):
            exec(source[:source.index("\n\n")], module.__dict__)
    monkeypatch.setitem(gpt.ARCHS, "fading", "fading:FadingLM")
    return module


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_contract(check): check("fading")


@torch.no_grad()
def test_the_matrix_is_the_loop_from_any_state(fading):
    torch.manual_seed(0)
    model = make("fading", block_size=12)
    mixer, x, cache = model.blocks[0].attn, torch.randn(1, 12, 64), model.new_cache(1).layers[0]
    decay = mixer.pace.sigmoid()
    v = mixer.value(x)[0].view(12, 8, 8)
    states = torch.stack([fading.fade_naive(v[:, h], decay[h]) for h in range(8)], 1).flatten(1)  # (T, C)
    naive = mixer.proj(torch.nn.functional.silu(mixer.gate(x[0])) * states)
    for first, last in ((0, 5), (5, 6), (6, 12)):
        torch.testing.assert_close(mixer(x[:, first:last], cache, first)[0], naive[first:last], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_stand_at_positions_of_their_own():
    model = make("fading")
    assert takes_row_lengths(model)
    ids, cache = some_ids(model, B=3), model.new_cache(3)
    full = model(ids)
    model(ids[:, :20], cache)
    cache.length = at = torch.tensor([20, 0, 11])
    logits = model(ids.gather(1, at[:, None]), cache)[:, 0]
    torch.testing.assert_close(logits, full[torch.arange(3), at], rtol=1e-4, atol=1e-4)


def test_the_engine_writes_what_the_generator_writes():
    model, tokenizer = make("fading"), CharTokenizer()
    params = [SamplingParams(max_new_tokens=80, seed=seed) for seed in range(3)]  # past the window of 64
    alone = [Generator(model, tokenizer).generate("virtue ", p) for p in params]
    with Engine(model, tokenizer, max_batch=2) as engine:
        streams = [engine.stream(tokenizer.encode("virtue "), p) for p in params]
        assert ["".join(e.text for e in s) for s in streams] == alone


def test_found_by_entry_point(monkeypatch, fading):
    monkeypatch.delitem(gpt.ARCHS, "fading")
    entry = SimpleNamespace(name="fading", load=lambda: fading.FadingLM)
    monkeypatch.setattr(gpt, "entry_points", lambda group: [entry] if group == "microjulia.models" else [])
    assert "fading" in gpt.arch_names()
    model = gpt.build_model("fading", gpt.config_for("fading", "1m").to_dict())
    assert type(model) is fading.FadingLM and .5e6 < model.num_params() < 1.1e6
