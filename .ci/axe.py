"""Look at every page of a built site with axe, in light and in dark.

    npm install --prefix FOLDER axe-core@4.14.1
    python .ci/axe.py _docs FOLDER/node_modules/axe-core/axe.min.js

It needs the Python package `playwright` and a Chromium: that of `$CHROMIUM`, the system's, or playwright's own.
"""
import argparse, functools, http.server, os, shutil, sys, threading
from pathlib import Path

from playwright.sync_api import sync_playwright

RULES = {'runOnly': ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def problems(page, axe):
    "What axe finds on the page that is open, one line each."
    page.evaluate(axe)
    for v in page.evaluate('rules => axe.run(rules)', RULES)['violations']:
        for node in v['nodes']: yield f"{v['id']} ({v['impact']}): {node['html'][:120]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('site', type=Path)
    parser.add_argument('axe', type=Path)
    args = parser.parse_args()
    axe, found, seen = args.axe.read_text(encoding='utf-8'), 0, 0
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=args.site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ.get('CHROMIUM') or shutil.which('chromium'), args=['--no-sandbox'])
        for scheme in ('light', 'dark'):
            page = browser.new_page(color_scheme=scheme, reduced_motion='reduce')
            for path in sorted(args.site.rglob('*.html')):
                name = path.relative_to(args.site).as_posix()
                page.goto(f'http://127.0.0.1:{server.server_port}/{name}', wait_until='load')
                seen += 1
                for problem in problems(page, axe):
                    found += 1
                    print(f'{name}, {scheme}: {problem}')
    print(f'{seen} views, {found} problems')
    return bool(found)


if __name__ == '__main__': sys.exit(main())
