"""Check the documentation as far as that can be done without Quarto.

    python .ci/docs.py

The notebooks are processed into _proc/ as `nbdev_docs` does, then each of `PAGES` looks at what came
out and each of `FILES` at what is committed. A check is a function that yields problems, one line each.
"""
import ast, base64, os, re, sys, warnings
from configparser import ConfigParser
from pathlib import Path

import nbformat, yaml

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC = ROOT/'nbs', ROOT/'_proc'
INI = ConfigParser(delimiters=['='])
INI.read(ROOT/'settings.ini', encoding='utf-8')
CFG = INI['DEFAULT']
REPO, BRANCH = CFG['git_url'].removeprefix('https://github.com/'), CFG['branch']
COLAB = 'https://colab.research.google.com'


# %% reading

def notebooks():
    "Every notebook of the site, by its path below nbs/."
    return {p.relative_to(NBS).as_posix(): nbformat.read(p, as_version=4) for p in sorted(NBS.rglob('*.ipynb'))
            if not any(part[0] in '_.' for part in p.relative_to(NBS).parts)}


def documents():
    "Every Markdown text: the documents of the repository, the plain pages and the prose of the notebooks, by path."
    files = sorted(ROOT.glob('*.md')) + sorted(NBS.rglob('*.qmd'))
    docs = {p.relative_to(ROOT).as_posix(): p.read_text(encoding='utf-8') for p in files}
    return docs | {f'nbs/{name}': '\n\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown')
                   for name, nb in notebooks().items()}


def prose(text):
    "`text` without its code."
    return re.sub(r'`[^`\n]+`', '', re.sub(r'(?ms)^ *```.*?^ *```', '', text))


def module(nb):
    "The module a notebook exports to, if any."
    found = re.search(r'(?m)^#\|\s*default_exp\s+(\S+)', '\n'.join(c.source for c in nb.cells if c.cell_type == 'code'))
    return found and found[1]


def public_names(mod):
    "The public functions and classes of a module, as nbdev's index has them."
    tree = ast.parse((ROOT/'microjulia'/'_modidx.py').read_text(encoding='utf-8'))
    syms = ast.literal_eval(tree.body[0].value)['syms'].get(f'microjulia.{mod}', {})
    names = [s.removeprefix(f'microjulia.{mod}.') for s in syms]
    return [n for n in names if '.' not in n and n[0] != '_']


def anchors(text):
    "The anchors that Quarto gives to the headings of a Markdown text."
    heads = re.findall(r'(?m)^#{1,6} +(.+?) *#*$', re.sub(r'(?ms)^ *```.*?^ *```', '', text))
    given = [re.findall(r'\{#([\w.-]+)', h) for h in heads]
    plain = [re.sub(r'[^\w\s.-]', '', re.sub(r'\{.*\}|\]\(.*?\)', '', h)).lower() for h in heads]
    return {a for g in given for a in g} | {re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', h.strip())) for h in plain}


# %% what processing gives

def process():
    "Make _proc/ from the notebooks: signatures are rendered, so every exported cell runs."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    os.chdir(ROOT)
    warnings.filterwarnings('error', 'Found cells containing imports')  # they run here, so they must be nothing else
    refresh_quarto_yml()
    proc_nbs(n_workers=0, force=True)


def check_pages():
    "Each page has a title and a description, each public name its signature, and nothing failed."
    for name in notebooks():
        nb = nbformat.read(PROC/name, as_version=4)
        front = yaml.safe_load(nb.cells[0].source.strip().strip('-')) if nb.cells[0].cell_type == 'raw' else {}
        for key in ('title', 'description'):
            if not front.get(key): yield f'{name}: the first cell gives no {key}'
        outputs = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
        for o in outputs:
            if o.output_type == 'error': yield f'{name}: a stored {o.ename}: {o.evalue}'
        rendered = '\n'.join(''.join(o.data.get('text/markdown', '')) for o in outputs if 'data' in o)
        for n in public_names(module(notebooks()[name])):
            if not re.search(rf'### {n}\n+```python\n(async def|def|class) {n}\b', rendered): yield f'{name}: no signature of {n}'


# %% what is committed

def check_quarto():
    "The site's configuration: every target exists, every notebook is in the sidebar once."
    conf = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    site = conf['website']
    if conf['project']['output-dir'] != CFG['doc_path']: yield '_quarto.yml: output-dir is not doc_path of settings.ini'
    for key in {'title', 'description', 'site-url', 'repo-url', 'repo-branch'} & {*site}:
        yield f'_quarto.yml: {key} comes from settings.ini'

    def targets(item):
        if isinstance(item, list): return [t for i in item for t in targets(i)]
        if isinstance(item, str): return [item]
        return ([item['href']] if 'href' in item else []) + targets(item.get('contents', [])) + targets(item.get('menu', []))

    side = targets(site['sidebar']['contents'])
    bar = targets([i for where in ('left', 'right') for i in site['navbar'].get(where, [])])
    for t in side + bar + [conf['format']['html'][k] for k in ('css',) if k in conf['format']['html']]:
        if '://' not in t and not (NBS/t).is_file(): yield f'_quarto.yml: no {t} in nbs/'
    for name in notebooks():
        if side.count(name) != 1: yield f'_quarto.yml: {name} is in the sidebar {side.count(name)} times'


def check_links():
    "Each relative link and image leads to a file, each anchor to a heading, each image has a description."
    docs = documents()
    names = {f'nbs/{n}': {p.lower() for p in public_names(module(nb))} for n, nb in notebooks().items()}
    for name, text in docs.items():
        body = prose(text)
        for target in re.findall(r'\]\(<?([^)\s>]+)', body) + re.findall(r'(?:href|src)="([^"]+)"', body):
            if re.match(r'[a-z]+:', target) or target == 'play/index.html': continue  # the workflow makes it, with play.py
            path, _, anchor = target.partition('#')
            file = (ROOT/name).parent/path if path else ROOT/name
            key = os.path.relpath(file, ROOT).replace(os.sep, '/')
            if not file.exists(): yield f'{name}: {target} leads nowhere'
            elif anchor and key in docs and anchor not in anchors(docs[key]) | names.get(key, set()):
                yield f'{name}: no heading for {target}'
        if re.search(r'!\[\s*\]\(', body): yield f'{name}: an image without a description'


PAPER = re.compile(r'https?://(?:arxiv\.org|doi\.org|proceedings\.)[^)\s]+')


def check_references():
    "Each paper that a page links to is in the list of references."
    known = (NBS/'references.bib').read_text(encoding='utf-8')
    for name, text in documents().items():
        for url in PAPER.findall(text):
            if f'{{{url}}}' not in known: yield f'{name}: {url} is not in references.bib'


def check_figures():
    "Each figure has an alternative text; figures and notebooks stay light."
    for name, nb in notebooks().items():
        kb = (NBS/name).stat().st_size/1000
        if kb > 500: yield f'{name}: {kb:.0f} kB, more than 500'
        for cell in nb.cells:
            figures = [o.data['image/png'] for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
            if figures and not re.search(r'(?m)^#\|\s*fig-alt:\s*\S', cell.source):
                yield f'{name}: a figure without fig-alt, in cell {cell.id}'
            for f in figures:
                kb = len(base64.b64decode(f))/1000
                if kb > 100: yield f'{name}: a figure of {kb:.0f} kB, more than 100, in cell {cell.id}'


def badge(name):
    "The Colab badge of the notebook `name`."
    return (f'[![Open in Colab]({COLAB}/assets/colab-badge.svg)]'
            f'({COLAB}/github/{REPO}/blob/{BRANCH}/nbs/{name})')


def check_badges():
    "The second Markdown cell of a notebook opens with its own Colab badge, and the index has everyone's."
    nbs = notebooks()
    index = '\n'.join(c.source for c in nbs['index.ipynb'].cells) if 'index.ipynb' in nbs else ''
    for name, nb in nbs.items():
        if name == 'index.ipynb': continue
        text = [c.source for c in nb.cells if c.cell_type == 'markdown']
        if not ''.join(text[1:2]).startswith(badge(name)): yield f'{name}: the second Markdown cell should start {badge(name)}'
        if badge(name).partition('](')[2] not in index: yield f'index.ipynb: no badge of {name}'


def check_costs():
    "Each notebook says at its head how long it takes and how much memory, as `.ci/notebooks.py` measures them."
    for name, nb in notebooks().items():
        head = '\n'.join([c.source for c in nb.cells if c.cell_type == 'markdown'][:3])
        if name != 'index.ipynb' and not re.search(r'\d GB of memory|\| memory \|', head): yield f'{name}: its head does not say how much memory it takes'


ADDRESS = re.compile(r'(?:github\.com|githubusercontent\.com|google\.com/github)/([\w.-]+/microjulia)(?![\w-])(?:\.git)?'
                     r'(?:/(?:blob|tree|raw|edit)/([\w.-]+)/([^\s)#"\'\\>]*)|@([\w.-]+))?')
SITE = re.compile(r'https://([\w-]+)\.github\.io/microjulia(?:/([\w/-]+\.html))?')


def check_addresses():
    "Each address of the project is the one in settings.ini, and what it points to is in the repository."
    pages = {'', *(re.sub(r'(^|/)\d+_', r'\1', n).replace('.ipynb', '.html') for n in notebooks())}
    patterns = '*.md', '*.yml', '*.cff', '*.txt', 'nbs/**/*.ipynb', 'microjulia/**/*.py', '.github/**/*.*'
    for file in [p for pattern in patterns for p in sorted(ROOT.glob(pattern)) if p.is_file()]:
        name, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding='utf-8')
        for repo, branch, path, at in ADDRESS.findall(text):
            if repo != REPO: yield f'{name}: {repo} is not {REPO}, the repository in settings.ini'
            if (branch or at or BRANCH) != BRANCH: yield f'{name}: {branch or at} is not {BRANCH}, the branch in settings.ini'
            if not (ROOT/path).exists(): yield f'{name}: no {path} in the repository'
        for host, page in SITE.findall(text):
            if page not in pages: yield f'{name}: the site has no {page}'
            if not CFG['doc_host'].startswith(f'https://{host}.'): yield f"{name}: {host} is not at {CFG['doc_host']}"


PAGES = [check_pages]
FILES = [check_quarto, check_links, check_references, check_figures, check_badges, check_costs, check_addresses]


def main():
    process()
    problems = [problem for check in PAGES + FILES for problem in check()]
    print(*problems, sep='\n', end='\n' * bool(problems))
    print(f'{len(notebooks())} pages, {len(problems)} problems')
    return bool(problems)


if __name__ == '__main__': sys.exit(main())
