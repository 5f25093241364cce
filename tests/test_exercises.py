"The exercises of the notebooks: each solution passes its check, and the mistakes people make are told apart."
import json, re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from microjulia import check

NBS = Path(__file__).resolve().parents[1]/'nbs'
NOTEBOOKS = sorted(NBS.glob('0[0-7]_*.ipynb'))
SOLUTION = re.compile(r'<summary>Solution</summary>\n\n```python\n(.*?)\n```', re.S)


def cells(path): return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]


def imports(path):
    "What the notebook has exported and imported when its exercises come."
    found = [s for kind, s in cells(path) if kind == 'code' and re.search(r'(?m)^(from|import) ', s) and '%pip' not in s]
    names = dict(vars(import_module(f"microjulia.{path.stem[3:]}")))
    for source in found: exec(source, names)
    return names


def exercises(path):
    "The call of each check with the solution that stands below it."
    texts = [s for _, s in cells(path)]
    calls = [re.search(r'(?m)^check\.(\w+)\(', s)[1] for s in texts if s.startswith('#| eval: false') and 'check.' in s]
    solutions = [m[1] for s in texts if (m := SOLUTION.search(s))]
    return list(zip(calls, solutions, strict=True))


ALL = [(path, name, solution) for path in NOTEBOOKS for name, solution in exercises(path)]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_three_to_five_in_each(path): assert 3 <= len(exercises(path)) <= 5


def test_every_check_is_asked_for_once():
    tools = {'Verdict', 'NotYet', 'expect', 'show', 'ask', 'check', 'expect_close'}
    assert sorted(name for _, name, _ in ALL) == sorted(set(check.__all__) - tools)


@pytest.mark.parametrize('path, name, solution', ALL, ids=[name for _, name, _ in ALL])
def test_solution_is_right(path, name, solution):
    names = imports(path)
    exec(solution, names)
    verdict = getattr(check, name)(names[name])
    assert verdict and repr(verdict).startswith('Right: '), verdict


@pytest.mark.parametrize('name', [name for _, name, _ in ALL])
@pytest.mark.parametrize('answer', [lambda *a: ..., lambda *a: [][1], lambda: 1, lambda *a: None], ids=['stub', 'raises', 'no arguments', 'nothing'])
def test_what_is_no_answer(name, answer):
    verdict = getattr(check, name)(answer)
    assert not verdict and repr(verdict).startswith('Not yet: ')


@pytest.mark.parametrize('name', [name for _, name, _ in ALL])
@pytest.mark.parametrize('value', [7, 'seven', {}, [object()], np.zeros(3), torch.zeros(2, 2)], ids=str)
def test_an_answer_of_another_kind_is_no_traceback(name, value): assert not getattr(check, name)(lambda *a: value)


def in_place(path, data): Path(path).write_bytes(data)
def leaves_a_copy(path, data): in_place(str(path) + '.bak', data), in_place(path, data)
def no_division(model, x, y, pieces):
    for xs, ys in zip(x.chunk(pieces), y.chunk(pieces)): check._loss(model, xs, ys).backward()
def shifted(tokens, starts, T): return (tokens[starts[:, None] + np.arange(T)],) * 2
def greedy(next_logprobs, n):
    ids = []
    for _ in range(n): ids.append(int(next_logprobs(ids).argmax()))
    return ids
def overflowing(z, t): return -(z.exp()/z.exp().sum(1, keepdim=True)).log()[range(len(t)), t].mean()
def unsmoothed(train, val, V):
    counts = np.zeros((V, V))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    return -np.log2((counts/counts.sum(1, keepdims=True))[val[:-1], val[1:]]).mean()


WRONG = [  # check, a mistake, what it is told
    ('decode', lambda ids, a: ' '.join(a[i] for i in ids), 'spell'),
    ('decode', lambda ids, a: [a[i] for i in ids], 'join'),
    ('commonest', lambda text, k: ''.join(dict.fromkeys(sorted(text, key=lambda c: (-text.count(c), c))))[:k], 'code-point order'),
    ('unigram_bits', lambda t: -sum(n*np.log(n) for n in (t.count(c)/len(t) for c in set(t))), 'log2'),
    ('unigram_bits', lambda t: sum(n*np.log2(n) for n in (t.count(c)/len(t) for c in set(t))), 'minus'),
    ('strip_licence', lambda t: t, 'licence'),
    ('strip_licence', lambda t: t.split('***')[2], 'whole|raised'),
    ('split_tails', lambda w: (''.join(w)[:135], ''.join(w)[135:]), 'EACH'),
    ('gather', shifted, 'AFTER'),
    ('bigram_bits', unsmoothed, 'add one|was to come'),
    ('causal_softmax', lambda s: s.softmax(-1), 'looks ahead'),
    ('causal_softmax', lambda s: s.softmax(-1).tril(), 'sum of a row'),
    ('causal_softmax', lambda s: s.softmax(-1).tril()/s.softmax(-1).tril().sum(-1, keepdim=True) + 0*s.max(), 'weights of the past|was to come'),
    ('alibi', lambda T, slope: slope*(torch.arange(T) - torch.arange(T)[:, None]).float(), 'later'),
    ('alibi', lambda T, slope: torch.full((T, T), -torch.inf).triu(1) + slope*(torch.arange(T)[:, None] - torch.arange(T)), 'FALL'),
    ('window_mask', lambda T, w: torch.full((T, T), -torch.inf).triu(1), 'were to be seen'),
    ('window_mask', lambda T, w: torch.ones(T, T), 'minus infinity'),
    ('one_step', lambda q, K, V: (K @ q).softmax(0) @ V, 'square root'),
    ('widest', lambda n, V, T, L, nh: int((n/12/L)**.5)//nh*nh, 'were allowed'),
    ('widest', lambda n, V, T, L, nh: nh, 'is possible'),
    ('rms_norm', lambda x, w, eps: torch.nn.functional.layer_norm(x, (16,), w, None, eps), 'that is LayerNorm'),
    ('rms_norm', lambda x, w, eps: w*x/x.norm(dim=-1, keepdim=True), 'was to come'),
    ('gelu_slope', lambda x: torch.nn.functional.gelu(x, approximate='tanh'), 'GELU itself'),
    ('gelu_slope', lambda x: torch.sigmoid(1.702*x), 'was to come'),
    ('cross_entropy', lambda z, t: z.log_softmax(-1)[range(len(t)), t].mean(), 'was to come'),
    ('cross_entropy', overflowing, 'overflows'),
    ('manifest', lambda f: {p.name: (p.stat().st_size, 'x') for p in Path(f).iterdir()}, 'size and sum'),
    ('write_atomically', in_place, 'old one is gone'),
    ('write_atomically', leaves_a_copy, 'lying about'),
    ('newest_whole', lambda found: max(found, default=None), 'whole|numbers'),
    ('newest_whole', lambda found: max((n for n in found if found[n]), default=None), 'numbers'),
    ('newest_whole', lambda found: max((n for n in found if found[n]), key=lambda n: int(n[5:])), 'None'),
    ('trapezoid', lambda s, n, w, c, peak: peak*min(s/w, 1, (n - s)/c), 'rate 0'),
    ('trapezoid', lambda s, n, w, c, peak: peak*min((s + 1)/w, 1), 'at step 90'),
    ('overfit', lambda m, x, y: None, 'Nothing was learnt'),
    ('accumulate', no_division, 'four times'),
    ('clip', lambda g, limit: [t.clamp_(-limit, limit) for t in g] and 5., 'norm afterwards|direction'),
    ('clip', lambda g, limit: [t.mul_(limit/5) for t in g] and 5., 'limit 100'),
    ('likeliest', greedy, 'greedy does not find'),
    ('likeliest', lambda f, n: [1], 'were asked'),
    ('gumbel', lambda z, u: (z + u).argmax(), 'shares'),
    ('gumbel', lambda z, u: z.argmin(), 'largest score wins'),
    ('temperature_for', lambda z, bits: 1., 'were asked'),
    ('word_bits', lambda t, b: [(w, 0) for w in t.split()], 'letters only|come'),
    ('word_bits', lambda t, b: [(w, len(w)) for w in t.replace('.', ' ').split()], 'and you have'),
    ('read_stream', lambda lines: ''.join(json.loads(s[6:])['choices'][0]['delta'].get('content', '') for s in lines
                                          if s[:6] == 'data: ' and 'DONE' not in s), 'raised IndexError'),
    ('make_chunks', lambda t: [check._chunk({'content': c}) for c in t], 'role'),
    ('whole_answer', lambda chunks: chunks[0], 'chat.completion'),
]


@pytest.mark.parametrize('name, answer, why', WRONG, ids=[f'{n}-{i}' for i, (n, *_) in enumerate(WRONG)])
def test_mistake_is_explained(name, answer, why):
    verdict = getattr(check, name)(answer)
    assert not verdict and re.search(why, verdict.why), verdict
