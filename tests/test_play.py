"The page with a model that runs in the browser: it writes what the library writes, and asks nobody."
import functools, http.server, os, shutil, subprocess, sys, threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip('starlette', reason='the page is made by the extra serve')
playwright = pytest.importorskip('playwright.sync_api', reason='the browser is driven by playwright')
import microjulia  # noqa: E402
from microjulia.api import shipped_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium') or shutil.which('chromium-browser')
if not CHROMIUM: pytest.skip('there is no chromium here', allow_module_level=True)
AXE = Path(os.environ.get('MICROJULIA_NODE_MODULES', 'none'))/'axe-core'/'axe.min.js'
expect = playwright.expect


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The page, made as the site's workflow makes it."
    out = tmp_path_factory.mktemp('play')
    subprocess.run([sys.executable, ROOT/'.ci'/'play.py', out], check=True, timeout=300)
    return out


@pytest.fixture(scope='module')
def page(folder):
    heard, server = [], http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = f'127.0.0.1:{server.server_port}'
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on('console', lambda m: m.type in ('error', 'warning') and heard.append(m.text))
        page.on('pageerror', lambda e: heard.append(str(e)))
        page.on('request', lambda r: urlsplit(r.url).netloc in (own, '') or heard.append(r.url))
        page.goto(f'http://{own}/')
        page.wait_for_selector('#heads button')
        yield page
        browser.close()
    server.shutdown()
    assert not heard


def turn(page, name, value):
    page.locator(f'#{name}').evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", str(value))


def test_payload(folder): assert sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) <= 5e6


def test_it_writes_what_the_library_writes(page):
    "Past its window, too: the shipped model reads 256 letters."
    model = microjulia.load(device='cpu')
    page.locator('#prompt').fill('Virtue is ')
    page.locator('#lock').check()
    page.locator('#seed').fill('7')
    turn(page, 'max_tokens', 300)
    page.get_by_role('button', name='Write').click()
    expect(page.locator('#go')).to_be_enabled(timeout=120_000)
    got = ''.join(page.locator('#out span:not(.soft)').all_text_contents())
    assert got == model.generate('Virtue is ', seed=7, max_new_tokens=300, top_k=28)


def test_it_stops(page):
    turn(page, 'max_tokens', 1000)
    page.get_by_role('button', name='Write').click()
    page.wait_for_function("document.querySelectorAll('#out span').length > 3")
    page.get_by_role('button', name='Stop').click()
    expect(page.locator('#go')).to_be_enabled()
    assert page.locator('#out span').count() < 990


def test_inside_what_is_typed(page):
    page.locator('#prompt').fill('know thysel')
    assert page.locator('#sentence').text_content() == 'know thysel'
    first = page.locator('#next tr').first.text_content()
    turn(page, 'temperature', 0)
    assert first.startswith('f') and page.locator('#next td').first.text_content().strip() == '100.0 %'
    page.locator('#heads button').nth(3).click()
    page.locator('#sentence span').nth(0).hover()
    assert page.locator('#looks').text_content() == 'k (letter 1) looks at k (1) 100 %'
    page.locator('#sentence').press('ArrowRight')
    assert page.locator('#looks').text_content().startswith('n (letter 2) looks at')
    assert [b.get_attribute('aria-pressed') for b in page.locator('#heads button').all()].index('true') == 3


def test_nothing_left_to_read(page):
    page.locator('#prompt').fill('λόγος')
    page.locator('#sentence').wait_for(state='attached')
    page.get_by_role('button', name='Write').click()
    expect(page.locator('#error')).to_have_text('nothing is left of the text: write at least one letter from a to z')


@pytest.mark.skipif(not AXE.exists(), reason='a folder $MICROJULIA_NODE_MODULES with the package axe-core is not here')
def test_accessible(page):
    page.add_script_tag(path=AXE)
    assert [(v['id'], v['nodes'][0]['failureSummary']) for v in page.evaluate('axe.run()')['violations']] == []


def test_only_what_the_page_needs(folder):
    assert {p.name for p in (folder/'model').iterdir()} == {'config.json', 'vocab.json', 'model.safetensors'}
    assert (folder/'model'/'model.safetensors').read_bytes() == (shipped_model()/'model.safetensors').read_bytes()
