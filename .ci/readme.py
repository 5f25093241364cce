"""Make README.md from nbs/index.ipynb, as nbdev_readme does but without Quarto.

    python .ci/readme.py           # write README.md
    python .ci/readme.py --check   # fail if README.md is behind the notebook
"""
import argparse, os, re, sys, tempfile
from pathlib import Path

import nbdev.serve_drv, nbformat, pypandoc, yaml
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parent.parent
# Pandoc wraps each cell and output in a Div, and a README lies one folder above its notebook.
FILTER = """
function Div(div) return div.content end
local function from_root(target)
  return target:match('^[%w+.-]+:') and target or target:match('^#') and target or 'nbs/' .. target
end
function Link(link) link.target = from_root(link.target) return link end
function Image(image) image.src = from_root(image.src) return image end
"""
ONLY_ON_THE_SITE = re.compile(r'(?ms)^::: \{\.content-visible when-format="html"\}.*?^:::$')


def readme():
    "The README as Markdown text."
    with tempfile.TemporaryDirectory() as tmp:
        page, lua = Path(tmp)/'index.ipynb', Path(tmp)/'readme.lua'
        lua.write_text(FILTER)
        nbdev.serve_drv.main((ROOT/'nbs'/'index.ipynb', page, FilterDefaults))
        nb = nbformat.read(page, as_version=4)
        for cell in nb.cells: cell.source = ONLY_ON_THE_SITE.sub('', cell.source)
        nbformat.write(nb, page)
        front = yaml.safe_load(nb.cells[0].source.strip().strip('-'))
        body = pypandoc.convert_file(page, 'gfm', format='ipynb', extra_args=['--wrap=preserve', f'--lua-filter={lua}'])
    return f"# {front['title']}\n\n> {front['description']}\n\n{body.strip()}\n".replace('\r\n', '\n')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--check', action='store_true', help='compare, change nothing')
    args = p.parse_args()
    os.chdir(ROOT)
    file, new = ROOT/'README.md', readme()
    if not args.check: file.write_text(new, encoding='utf-8', newline='\n')
    elif not file.exists() or file.read_text(encoding='utf-8').split() != new.split():
        return 'README.md is behind nbs/index.ipynb: run `python .ci/readme.py`'


if __name__ == '__main__': sys.exit(main())
