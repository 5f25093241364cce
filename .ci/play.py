"""Make the page with a model that runs in the browser: what the server serves at /, with the model beside it.

    python .ci/play.py FOLDER [MODEL]   # MODEL: a checkpoint folder; without it the one that ships with the package

Its files can be put on any web server. `nbdev_docs` takes them from nbs/play, where the workflow puts them.
"""
import argparse, shutil
from pathlib import Path

from microjulia.api import shipped_model
from microjulia.serving.server import page


def play(out, model):
    "Write the page and the three files of the model into the folder `out`."
    (out/'model').mkdir(parents=True, exist_ok=True)
    for name in ('config.json', 'vocab.json', 'model.safetensors'): shutil.copyfile(model/name, out/'model'/name)
    (out/'index.html').write_text(page('model.js', 'local.js', 'inside.js'), encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('model', type=Path, nargs='?', default=shipped_model())
    args = parser.parse_args()
    play(args.folder, args.model)
    size = sum(p.stat().st_size for p in args.folder.rglob('*') if p.is_file())
    print(f'{args.folder}: {size/1e6:.1f} MB')


if __name__ == '__main__': main()
