"""Make the page with a model that runs in the browser: what the server serves at /, with the model beside it.

    python .ci/play.py FOLDER [MODEL]   # MODEL: a checkpoint folder; without it the one that ships with the package

Its files can be put on any web server. `nbdev_docs` takes them from nbs/play, where the workflow puts them.
"""
import argparse, re, shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT/'microjulia'/'static'
SCRIPTS = 'model.js', 'page.js', 'local.js', 'inside.js'


def play(out, model):
    "Write the page and the three files of the model into the folder `out`."
    (out/'model').mkdir(parents=True, exist_ok=True)
    for name in ('config.json', 'vocab.json', 'model.safetensors'): shutil.copyfile(model/name, out/'model'/name)
    script = '\n'.join((STATIC/name).read_text(encoding='utf-8') for name in SCRIPTS)
    page, n = re.subn(r'/\* script \*/', lambda _: script, (STATIC/'page.html').read_text(encoding='utf-8'))
    if n != 1: raise SystemExit('page.html has no one place for its script')
    (out/'index.html').write_text(page, encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('model', type=Path, nargs='?', default=ROOT/'microjulia'/'data'/'model')
    args = parser.parse_args()
    play(args.folder, args.model)
    size = sum(p.stat().st_size for p in args.folder.rglob('*') if p.is_file())
    print(f'{args.folder}: {size/1e6:.1f} MB')


if __name__ == '__main__': main()
