"The repository around the notebooks: one source for each fact, a light import, a whole package."
import ast, importlib.util, json, re, shutil, subprocess, sys, zipfile
from importlib import metadata
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import microjulia

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('docs', ROOT/'.ci'/'docs.py')
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)
CFG, NOTEBOOKS = docs.CFG, docs.notebooks()
EXTRAS = [k for k in CFG if k.endswith('requirements')]
MODULES = {docs.module(nb): name for name, nb in NOTEBOOKS.items() if docs.module(nb)}


def requirements(key): return [Requirement(r) for r in CFG[key].split()]


def versions(file):
    "Name and version of each line of a file of exact versions."
    lines = [line for line in (ROOT/file).read_text(encoding='utf-8').splitlines() if line and line[0] != '#']
    return {canonicalize_name(name): version for name, version in (line.split('==') for line in lines)}


def python(code, *args):
    "The output of a new Python that runs `code`."
    done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def code(nb): return [c for c in nb.cells if c.cell_type == 'code']


# %% one source for each fact

def test_version(): assert microjulia.__version__ == CFG['version']


@pytest.mark.parametrize('check', docs.FILES, ids=lambda check: check.__name__)
def test_documentation(check): assert list(check()) == []


def test_front_door_says_the_same_to_type_checkers():
    tree = ast.parse((ROOT/'microjulia'/'__init__.py').read_text(encoding='utf-8'))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    assert {a.asname: n.module for n in block.body for a in n.names} == microjulia._home


@pytest.mark.parametrize('name', microjulia.__all__)
def test_front_door_opens(name): assert getattr(microjulia, name).__name__ == name


def test_front_door_refuses():
    with pytest.raises(AttributeError, match='no attribute .philosophy'): microjulia.philosophy


@pytest.mark.parametrize('key', EXTRAS)
def test_constraints_hold_every_requirement(key):
    exact = versions('constraints.txt')
    for r in requirements(key): assert r.specifier.contains(exact[canonicalize_name(r.name)]), r


# %% Colab

def test_installing_in_colab_changes_nothing():
    colab = versions('.ci/colab.txt')
    missing = [r for r in requirements('requirements') if canonicalize_name(r.name) not in colab]
    for r in [r for key in EXTRAS if key != 'dev_requirements' for r in requirements(key)]:
        if canonicalize_name(r.name) in colab: assert r.specifier.contains(colab[canonicalize_name(r.name)]), r
        assert not re.search('[<=~!]=|<', str(r.specifier).replace('>=', '')), f'{r} is more than a floor'
    for r in missing: assert not metadata.requires(r.name), f'{r} is not there, and would bring others'


@pytest.mark.parametrize('name', [n for n in NOTEBOOKS if n != 'index.ipynb'])
def test_first_code_cell_installs_the_package(name):
    source = CFG['lib_name'] if CFG.getboolean('published') else f"git+{CFG['git_url']}@{CFG['branch']}"
    cell = ('#| hide\n#| eval: false\ntry: import microjulia\nexcept ImportError:\n'
            f'    %pip install -q {source}')
    cells = [c.source for c in code(NOTEBOOKS[name]) if '%pip ' in c.source]
    assert cells == [cell]
    ast.parse(TransformerManager().transform_cell(cell))


# %% notebooks and modules

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook_needs_no_nbdev(name):
    assert not any(re.search(r'(?m)^\s*(from|import)\s+nbdev', c.source) for c in code(NOTEBOOKS[name]))


@pytest.mark.parametrize('module', MODULES)
def test_notebook_module_and_page_share_one_name(module):
    name = MODULES[module]
    assert Path(name).stem.partition('_')[2] == module.rpartition('.')[2]
    assert NOTEBOOKS[name].cells[0].source.startswith(f"# {module.rpartition('.')[2]}\n")
    head = (ROOT/'microjulia'/f"{module.replace('.', '/')}.py").read_text(encoding='utf-8').splitlines()
    assert any(f'../nbs/{name}' in line for line in head[:5])


def test_every_module_has_its_notebook():
    made = {p.relative_to(ROOT/'microjulia').with_suffix('').as_posix().replace('/', '.')
            for p in (ROOT/'microjulia').rglob('*.py') if p.name[0] != '_'}
    assert made == set(MODULES)


@pytest.mark.parametrize('module', MODULES)
def test_notebook_imports_from_lower_numbers(module):
    "The pictures stand on the ground floor: they import nothing of ours, and every notebook may draw."
    text = '\n'.join(c.source for c in code(NOTEBOOKS[MODULES[module]]))
    used = set(re.findall(r'(?m)^\s*(?:from|import) microjulia\.([\w.]+)', text)) - {module}
    if module == 'viz': assert not used
    number = {m: Path(n).name[:2] for m, n in MODULES.items()} | {'viz': ''}
    assert all(number[m] < Path(MODULES[module]).name[:2] for m in used), used


# %% a light import that needs only what is declared

def test_import_brings_no_torch():
    assert python('import sys, microjulia; print([m for m in ("torch", "numpy") if m in sys.modules])').strip() == '[]'


def declared():
    "The top-level names of our requirements, and of theirs."
    seen, queue = set(), [Requirement(r).name for r in CFG['requirements'].split()]
    while queue:
        name = canonicalize_name(queue.pop())
        if name in seen: continue
        try: needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        seen.add(name)
        queue += [r.name for r in map(Requirement, needs) if not r.marker or r.marker.evaluate({'extra': ''})]
    return sorted({top for top, dists in metadata.packages_distributions().items()
                   if seen & {canonicalize_name(d) for d in dists}})


ONLY_DECLARED = '''
import importlib.machinery, json, pkgutil, sys
allowed = {*json.loads(sys.argv[1]), *sys.stdlib_module_names, 'microjulia'}
find = importlib.machinery.PathFinder.find_spec
class Declared:
    "Finds what a new environment with our requirements alone would find."
    def find_spec(name, path=None, target=None):
        top = name.partition('.')[0]
        return find(name, path, target) if top in allowed or top.startswith('_sysconfigdata') else None
sys.meta_path = [Declared if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
for tool in 'pytest', 'nbdev', 'IPython', 'openai':
    try: __import__(tool)
    except ImportError: pass
    else: raise SystemExit(f'{tool} was found')
import microjulia
for m in pkgutil.walk_packages(microjulia.__path__, 'microjulia.'):
    try: __import__(m.name)
    except ImportError as e:
        if "pip install 'microjulia[" not in str(e): raise  # a module for which an extra is needed says so in a line
from microjulia.cli import main
sys.argv = ['microjulia', '--help']
raise SystemExit(main())
'''


def test_package_needs_only_what_is_declared():
    assert 'usage: microjulia' in python(ONLY_DECLARED, json.dumps(declared()))


# %% the distributions

BUILD = '''
import sys
from setuptools import build_meta
out = sys.argv[1]
build_meta.build_wheel(out)
build_meta.build_sdist(out)
'''


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A wheel and a source distribution, made from a copy."
    pytest.importorskip('setuptools')
    src, out = tmp_path_factory.mktemp('src'), tmp_path_factory.mktemp('out')
    shutil.copytree(ROOT/'microjulia', src/'microjulia', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, src)
    subprocess.run([sys.executable, '-c', BUILD, str(out)], cwd=src, check=True, capture_output=True, timeout=300)
    return out


def test_wheel_holds_the_package_and_nothing_else(built):
    wheel = next(built.glob('*.whl'))
    assert wheel.name == f"microjulia-{CFG['version']}-py3-none-any.whl"
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in n}
    model = [i for i in zipfile.ZipFile(wheel).infolist() if i.filename.startswith('microjulia/data/model/')]
    assert {i.filename.split('/')[-1] for i in model} >= {'model.safetensors', 'config.json', 'vocab.json', 'README.md'}
    assert sum(i.compress_size for i in model) < 5_000_000
    assert inside == {p.relative_to(ROOT).as_posix() for p in (ROOT/'microjulia').rglob('*')
                      if p.is_file() and '__pycache__' not in p.parts}
    assert 'microjulia/py.typed' in inside and any(re.fullmatch(r'microjulia/data/text/\w+\.txt', n) for n in inside)


def test_wheel_says_what_settings_say(built):
    wheel = zipfile.ZipFile(next(built.glob('*.whl')))
    read = lambda name: next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith(f'.dist-info/{name}'))
    meta = read('METADATA')
    needs = {Requirement(r) for r in re.findall(r'(?m)^Requires-Dist: (.+)', meta)}
    assert {r.name for r in needs if not r.marker} == {r.name for r in requirements('requirements')}
    assert f"Requires-Python: >={CFG['min_python']}" in meta
    assert 'microjulia = microjulia.cli:main' in read('entry_points.txt')


def test_source_distribution_builds_a_wheel(built, tmp_path):
    source = next(built.glob('*.tar.gz'))
    shutil.unpack_archive(source, tmp_path)
    src = tmp_path/source.name.removesuffix('.tar.gz')
    subprocess.run([sys.executable, '-c', BUILD, str(tmp_path)], cwd=src, check=True, capture_output=True, timeout=300)
    names = lambda folder: sorted(zipfile.ZipFile(next(folder.glob('*.whl'))).namelist())
    assert names(tmp_path) == names(built)
