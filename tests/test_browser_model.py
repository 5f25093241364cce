"The model in plain JavaScript, run by node, beside PyTorch's: the same logits, attention and choices."
import json, shutil, subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from microjulia.checkpoint import load_checkpoint, save_checkpoint
from microjulia.corpus import uniform
from microjulia.generation import SamplingParams, draw, probabilities
from microjulia.gpt import GPT, GPTConfig, capture
from microjulia.tokenizer import CharTokenizer

SCRIPT = Path(__file__).resolve().parents[1]/'microjulia'/'static'/'model.js'
needs_node = pytest.mark.skipif(not shutil.which('node'), reason='needs node')


def node(code, given, timeout=120):
    "What `code` prints as JSON; it finds the script as `M` and `given` as `input`."
    head = f'const M = require({json.dumps(str(SCRIPT))}), input = JSON.parse(require("fs").readFileSync(0, "utf8"));\n'
    done = subprocess.run(['node', '-e', head + code], input=json.dumps(given), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


OPEN = '''
const raw = require("fs").readFileSync(input.file);
const model = new M.GPT(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length), input.config, input.chars);
'''


def make(folder, dtype=torch.float32, **changes):
    "A random model whose every weight matters, its file in `dtype`, and what the script is given."
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_embd=32, block_size=24, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2*torch.randn_like(p)).copy_(p.to(dtype))
    file = folder/'model.safetensors'
    save_file({k: v.to(dtype) for k, v in model.state_dict().items()}, file)
    return model, dict(file=str(file), config=model.config.to_dict(), chars=list(CharTokenizer().chars))


def test_it_stays_small(): assert len(SCRIPT.read_text().splitlines()) <= 150


@needs_node
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('bias', [False, True], ids=['no bias', 'bias'])
@torch.no_grad()
def test_logits_are_those_of_pytorch(tmp_path, dtype, bias):
    model, given = make(tmp_path, dtype, bias=bias)
    ids = torch.randint(28, (24,)).tolist()
    got = node(OPEN + 'console.log(JSON.stringify(input.ids.map((_, t) => Array.from(model.next(input.ids.slice(0, t + 1))))))',
               given | dict(ids=ids))
    np.testing.assert_allclose(got, model(torch.tensor([ids]))[0].numpy(), rtol=1e-3, atol=1e-3)


@needs_node
@torch.no_grad()
def test_small_integers_are_read_as_the_library_reads_them(tmp_path):
    model, given = make(tmp_path)
    saved = save_checkpoint(tmp_path/'small', model, CharTokenizer(), dtype=torch.int8)
    again = load_checkpoint(saved).model.eval()
    ids = torch.randint(28, (9,))
    got = node(OPEN + 'console.log(JSON.stringify(Array.from(model.next(input.ids))))',
               given | dict(file=str(saved/'model.safetensors'), ids=ids.tolist()))
    np.testing.assert_allclose(got, again(ids[None])[0, -1].numpy(), rtol=1e-3, atol=1e-3)


@needs_node
@torch.no_grad()
def test_attention_is_that_of_pytorch(tmp_path):
    model, given = make(tmp_path)
    ids = torch.randint(28, (9,))
    got = node(OPEN + 'model.next(input.ids); console.log(JSON.stringify(model.layers.map(l => l.att.map(heads => heads.map(p => Array.from(p))))))',
               given | dict(ids=ids.tolist()))  # (L, T, nh, t + 1)
    with capture(model) as seen: model(ids[None])
    for l, layer in enumerate(seen.attention[:, 0]):
        for t in range(9): np.testing.assert_allclose(got[l][t], layer[:, t, :t + 1].numpy(), atol=1e-4)


@needs_node
@torch.no_grad()
def test_what_was_read_is_not_read_again_and_an_edit_is_noticed(tmp_path):
    model, given = make(tmp_path)
    texts = [[1, 2, 3], [1, 2, 3, 4], [1, 2, 9], [1, 2], [1, 2], [5], list(range(24)), list(range(1, 28))]
    got = node(OPEN + '''let steps = 0; const step = model.step.bind(model); model.step = id => (steps++, step(id));
const logits = input.texts.map(ids => Array.from(model.next(ids))); console.log(JSON.stringify([logits, steps]))''', given | dict(texts=texts))
    for ids, logits in zip(texts, got[0], strict=True):
        np.testing.assert_allclose(logits, model(torch.tensor([ids[-24:]]))[0, -1].numpy(), atol=1e-3)
    assert got[1] == 3 + 1 + 1 + 1 + 0 + 1 + 24 + 24


@needs_node
def test_probabilities_and_choice_are_those_of_the_library():
    rng = np.random.default_rng(0)
    cases = [dict(logits=rng.normal(0, 3, 28).tolist(), u=float(rng.random()),
                  options=dict(temperature=float(rng.choice([0, .3, .8, 2])), top_k=int(rng.choice([0, 3, 40])), top_p=float(rng.choice([.2, .9, 1]))))
             for _ in range(200)]
    got = node('''console.log(JSON.stringify(input.map(c => { const p = M.probabilities(Float64Array.from(c.logits), c.options);
return [Array.from(p), M.draw(p, c.u)]; })))''', cases)
    for case, (p, id) in zip(cases, got, strict=True):
        want = probabilities(np.array(case['logits']), SamplingParams(**case['options']))
        np.testing.assert_allclose(p, want, atol=1e-9)
        assert id == draw(want, case['u'])


@needs_node
@pytest.mark.parametrize('text', ['Virtue is', 'What, then?\nLook!', 'café — 7', 'Wait -- what?', 'two  spaces stay, three , do not', '“naïve” ﬁg…', '子曰。the Master', ''], ids=ascii)
def test_text_becomes_the_same_ids(text):
    t = CharTokenizer()
    got = node('const t = M.tokenizer(input[1]), ids = t.encode(input[0]); console.log(JSON.stringify([ids, t.decode(ids)]))', [text, list(t.chars)])
    assert got == [t.encode(t.normalize(text)).tolist(), t.normalize(text)]


@needs_node
def test_an_unknown_type_is_named(tmp_path):
    file = tmp_path/'odd.safetensors'
    save_file({'wte.weight': torch.zeros(2, dtype=torch.float64)}, file)
    got = node('''const raw = require("fs").readFileSync(input); try { M.tensors(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.length)) }
catch (e) { console.log(JSON.stringify(e.message)) }''', str(file))
    assert 'F64' in got and 'can be read' in got


@needs_node
def test_a_seed_means_the_same_numbers():
    pairs = [(0, 0), (1, 2), (7, 199), (2**31 - 1, 1000), (2**53 - 1, 3)]
    code = 'const mount = () => {};' + (SCRIPT.parent/'local.js').read_text() + 'console.log(JSON.stringify(input.map(([s, i]) => local.uniform(s, i))))'
    assert node(code, pairs) == [uniform(s, i) for s, i in pairs]
