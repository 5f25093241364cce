"The page of the server in a real browser: typing, streaming, stopping, reading by mouse, keyboard and screen reader."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
from server_rig import WAIT, Puppet, engine, server  # noqa: E402
from microjulia.serving.server import page as page_html  # noqa: E402

expect = playwright.expect
expect.set_options(timeout=1000 * WAIT)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM: pytest.skip("there is no chromium here", allow_module_level=True)


@pytest.fixture(scope="module")
def live():
    with server(("plato", engine()), ("zeno", engine(1))) as service: yield service


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    "A function that opens the page of a service; afterwards: no complaint in the console, no other host was asked."
    contexts, problems = [], []

    def open_page(service, allowed=(), **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page, own = context.new_page(), urlsplit(service.url).netloc
        page.set_default_timeout(1000 * WAIT)
        page.on("console", lambda m: m.type in ("error", "warning") and not any(a in m.text for a in allowed) and problems.append(m.text))
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("request", lambda r: urlsplit(r.url).netloc in (own, "") or problems.append(r.url))
        page.goto(service.url)
        expect(page.locator("#snippet")).not_to_be_empty()  # the models are known
        return page
    yield open_page
    for c in contexts: c.close()
    assert not problems


def letters(page): return page.locator("#out span:not(.soft)")


def write(page, **fields):
    "Fill the page in, press Write, wait for the end; the text that came."
    for name, value in fields.items():
        if page.locator(f"#{name}").get_attribute("type") == "range":
            page.locator(f"#{name}").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", str(value))
        else: page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#go")).to_be_enabled()
    return "".join(letters(page).all_text_contents())


def test_the_page_is_small(): assert len(page_html().encode()) < 30_000


def test_type_and_stream(live, visit):
    page = visit(live)
    text = write(page, prompt="The city is ", max_tokens=60)
    assert len(text) == 60 and page.locator("#out").text_content() == "The city is " + text
    assert {c for e in letters(page).all() for c in (e.get_attribute("class") or "").split()} <= {"s0", "s1", "s2", "s3", "s4", "s5"}
    page.get_by_role("button", name="Go on from here").click()
    expect(page.locator("#go")).to_be_enabled()
    assert page.locator("#out").text_content().startswith("The city is " + text) and letters(page).count() == 60


def test_the_seed(live, visit):
    page = visit(live)
    texts, seeds = zip(*[(write(page, max_tokens=40), page.locator("#seed").input_value()) for _ in range(2)])
    assert texts[0] != texts[1] and seeds[0] != seeds[1]
    page.get_by_label("Keep the seed").check()
    assert write(page) == texts[1] and page.locator("#seed").input_value() == seeds[1]


def test_the_settings_are_sent(live, visit):
    page, sent = visit(live), []
    page.on("request", lambda r: r.method == "POST" and sent.append(json.loads(r.post_data)))
    page.get_by_label("Model").select_option("zeno")
    write(page, temperature=0, top_k=3, top_p=.5, max_tokens=20, prompt="a")
    got = sent[0]
    assert [got[k] for k in ("temperature", "top_k", "top_p", "max_tokens", "prompt", "model")] == [0, 3, .5, 20, "a", "zeno"]
    assert page.get_by_text("Temperature").locator("output").text_content() == "0"


def test_what_else_could_have_come(live, visit):
    page = visit(live)
    text = write(page, max_tokens=20)
    letters(page).nth(4).hover()
    info = page.locator("#info")
    assert info.text_content().startswith("Letter 5,") and "bits" in info.text_content()
    shares = [float(t.strip(" %")) for t in info.locator("td").all_text_contents()]
    assert 5 <= len(shares) <= 6 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    page.locator("#prompt").focus()
    page.locator("#out").focus()
    for key, place in ("End", 20), ("ArrowLeft", 19), ("Home", 1), ("ArrowRight", 2), ("ArrowDown", 12), ("ArrowUp", 2):
        page.keyboard.press(key)
        assert page.locator("#info p").text_content().startswith(f"Letter {place},"), key
    assert page.locator(".here").text_content() == text[1]


def test_by_keyboard_alone(live, visit):
    page = visit(live)
    for _ in range(2): page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("Who knows ")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("The model wrote")
    assert page.locator("#out").text_content().startswith("Who knows ")
    page.locator("#tab-write").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-chat" and page.locator("#chat").is_visible()


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(visit, how):
    puppet = Puppet("and th")
    with server(("plato", puppet)) as service:
        page = visit(service)
        page.get_by_role("button", name="Write").click()
        expect(page.locator("#out")).to_contain_text("and th")  # it streams: there is no end yet
        assert page.locator("#go").is_disabled() and puppet.waiting.wait(WAIT)
        if how == "key": page.keyboard.press("Escape")
        else: page.get_by_role("button", name="Stop").click()
        assert puppet.empty.wait(WAIT)
        expect(page.locator("#go")).to_be_enabled()
        assert page.locator("#error").text_content() == "" and letters(page).count() == 6


def test_chat_says_what_it_is(live, visit):
    page = visit(live)
    page.get_by_role("tab", name="Chat").click()
    assert page.get_by_text("was never taught to converse").is_visible() and not page.locator("#out").is_visible()
    for message in "What is virtue?", "And courage?":
        page.get_by_label("Your message").fill(message)
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#go")).to_be_enabled()
    talk = page.locator("#talk li").all_text_contents()
    assert [talk[0], talk[2]] == ["What is virtue?", "And courage?"] and [len(t) for t in talk[1::2]] == [200, 200]


def test_errors_are_shown(visit):
    with server(("plato", Puppet(room=0))) as service:
        page = visit(service, allowed=["503", "CONNECTION_REFUSED"])
        write(page)
        assert "no room" in page.get_by_role("alert").text_content() and page.get_by_role("button", name="Write").is_enabled()
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_role("alert")).to_contain_text("etch")  # "Failed to fetch": nobody listens any more


def test_a_server_with_a_key(visit):
    with server(("plato", engine()), keys=["open-sesame"]) as service:
        page = visit(service, allowed=["401"])
        write(page)
        assert "API key" in page.get_by_role("alert").text_content()
        assert len(write(page, key="open-sesame", max_tokens=20)) == 20 and page.get_by_role("alert").text_content() == ""


@pytest.mark.parametrize("kind", ["curl", "Python"])
def test_the_program_does_the_same(live, visit, kind):
    page = visit(live, permissions=["clipboard-read", "clipboard-write"])
    text = write(page, prompt="it's ", max_tokens=20)
    page.get_by_text("Ask from a program").click()
    page.get_by_role("button", name=f"Copy as {kind}").click()
    expect(page.locator("#copied")).to_have_text("copied")
    program = page.evaluate("navigator.clipboard.readText()")
    if kind == "curl" and not shutil.which("curl"): pytest.skip("there is no curl here")
    command = ["bash", "-c", program.replace("curl -N", "curl -sN")] if kind == "curl" else [sys.executable, "-c", program]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    if kind == "curl": out = "".join(json.loads(line[6:])["choices"][0]["text"] for line in out.splitlines() if line.startswith("data: {"))
    assert out == text


def test_on_a_phone_and_in_the_dark(live, visit):
    page = visit(live, viewport=dict(width=360, height=740), color_scheme="dark")
    write(page, max_tokens=60, prompt="a" * 200)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    dark, light = [sum(map(int, c[4:-1].split(","))) for c in colours]
    assert dark < 150 < 600 < light


AXE = Path(os.environ.get("MICROJULIA_NODE_MODULES", "none")) / "axe-core" / "axe.min.js"  # .ci/run puts it there


@pytest.mark.skipif(not AXE.exists(), reason="a folder $MICROJULIA_NODE_MODULES with the package axe-core is not here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(live, visit, scheme):
    page = visit(live, bypass_csp=True, color_scheme=scheme)
    page.add_script_tag(path=AXE)
    page.get_by_text("Ask from a program").click()
    for tab in "Continue a text", "Chat":
        page.get_by_role("tab", name=tab).click()
        if tab == "Chat": page.get_by_label("Your message").fill("hi")
        page.locator("#go").click()
        expect(page.locator("#go")).to_be_enabled()
        page.locator(".out:visible span").last.hover()
        found = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']})")
        assert [(v["id"], v["nodes"][0]["target"], v["help"]) for v in found["violations"]] == []
        assert len(found["passes"]) > 20
    page.goto(live.url + "/docs")
    page.add_script_tag(path=AXE)
    assert [(v["id"], v["nodes"][0]["failureSummary"]) for v in page.evaluate("axe.run()")["violations"]] == []
