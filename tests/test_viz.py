"""Pictures: sizes, values, and pages that work without a kernel, without a network and without scripts."""
import base64
import html
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fastcore.docments import docments

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from microjulia import viz  # noqa: E402

node = pytest.mark.skipif(not shutil.which("node"), reason="needs node")
TEXT = "virtue is knowledge. the soul remembers what it."
CHARS = " .abcdefghijklmnopqrstuvwxyz"
rng = np.random.default_rng(0)

def heads(n, T=48):
    "Random causal attention, `(n, T, T)`."
    att = np.tril(rng.random((n, T, T))**3 + 1e-6)
    return att / att.sum(-1, keepdims=True)

def chunk(finish_reason=None, **delta): return {"choices": [{"delta": delta, "finish_reason": finish_reason}]}

PROBS = rng.dirichlet(np.ones(28))
HISTORY = [{"step": i, "kind": "train", "loss": 3 - i/100} for i in range(100)]
HISTORY += [{"step": i, "kind": "eval", "val_loss": 3.1 - i/100} for i in range(0, 100, 20)]
HISTORY += [{"step": 50, "kind": "sample", "text": "virtue"}]
WORKS = [(f"A work with a long name, number {i}", 1000*i) for i in range(1, 48)]
CHUNKS = [chunk(role="assistant"), *(chunk(content=c) for c in TEXT), chunk("stop"),
          {"choices": [], "usage": {"total_tokens": 9}}, "[DONE]"]
PICTURES = {
    "coverage": lambda ax=None: viz.plot_coverage({c: i + 1 for i, c in enumerate(CHARS)}, ax=ax),
    "matrix": lambda ax=None: viz.plot_matrix(rng.normal(size=(4, 6)), "virt", list("abcdef"), "scores", ax=ax),
    "mask": lambda ax=None: viz.plot_mask(np.where(np.tri(5), 0, -np.inf), "virtu", ax=ax),
    "large mask": lambda ax=None: viz.plot_mask(np.where(np.tri(64), 0, -np.inf), ax=ax),
    "attention": lambda ax=None: viz.plot_attention(heads(1)[0], TEXT, ax=ax),
    "params": lambda ax=None: viz.plot_params([("wte.weight", (28, 8), 224), ("blocks.0.ln1.bias", (8,), 8)], ax=ax),
    "loss": lambda ax=None: viz.plot_loss(HISTORY, {"uniform": 4.81, "bigram": 3.3, "5-gram": 1.8}, ax=ax),
    "schedule": lambda ax=None: viz.plot_schedule([0, 1e-3, 5e-4], ax=ax),
    "next": lambda ax=None: viz.plot_next(PROBS, CHARS, ax=ax),
    "cut": lambda ax=None: viz.plot_cut(PROBS, PROBS > .02, CHARS, ax=ax),
    "temperature": lambda ax=None: viz.plot_temperature(np.log(PROBS), CHARS, ax=ax),
    "surprise": lambda ax=None: viz.plot_surprise(TEXT, 8*rng.random(len(TEXT)), ax=ax),
    "split": lambda ax=None: viz.plot_split(WORKS, ax=ax),
    "stream": lambda ax=None: viz.plot_stream(CHUNKS, ax=ax)}

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")

def png(figure):
    "What a notebook would store."
    out = io.BytesIO()
    figure.savefig(out, dpi=100, bbox_inches="tight", facecolor=figure.get_facecolor())
    return out.getvalue()


# Pictures

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PICTURES)
def test_picture(name):
    ax = PICTURES[name]()
    data = png(ax.figure)
    assert len(data) < 100_000
    pixels = plt.imread(io.BytesIO(data))
    assert pixels[0, 0, 3] == 0 and pixels[..., 3].max() > .5  # transparent, and something is there
    assert ax.figure.get_size_inches()[0] <= 7
    texts = [t for t in ax.figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) >= 9

@pytest.mark.parametrize("name", PICTURES)
def test_picture_into_given_axes(name):
    fig, axes = plt.subplots(1, 2, figsize=(7, 3))
    got = PICTURES[name](axes[1])
    assert got is axes[1] and len(plt.get_fignums()) == 1
    assert tuple(fig.get_size_inches()) == (7, 3)
    assert not axes[0].has_data() and not axes[0].texts

@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 12])
def test_all_heads(n):
    fig = viz.plot_heads(heads(n), TEXT)
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert titles == [f"head {i}" for i in range(n)]
    assert len(png(fig)) < 100_000

def test_every_public_plot_is_pictured():
    plots = {n for n in viz.__all__ if n.startswith("plot_")} - {"plot_heads", "plot_run"}  # whole figures, with tests of their own
    assert plots <= {"plot_" + n.split()[-1] for n in PICTURES}

def test_labels_do_not_overlap():
    for T in (5, 48, 128, 256):
        ax = viz.plot_attention(heads(1, T)[0], "x"*T)
        ax.figure.canvas.draw()
        boxes = [t.get_window_extent() for t in ax.get_xticklabels()]
        assert all(a.x1 <= b.x0 + 1 for a, b in zip(boxes[:-1], boxes[1:], strict=True))

def test_loss_is_in_bits():
    ax = viz.plot_loss(HISTORY, {"bigram": 3.3})
    train, val, base = ax.lines
    assert np.allclose(train.get_ydata(), (3 - np.arange(100)/100) / np.log(2))
    assert np.allclose(val.get_ydata(), (3.1 - np.arange(0, 100, 20)/100) / np.log(2))
    assert set(base.get_ydata()) == {3.3} and base.get_label() == "bigram 3.30"
    assert ax.get_ylabel() == "bits per character"

def test_loss_prefers_the_measured_bits_per_character():
    ax = viz.plot_loss([{"step": 1, "val_loss": 4.0, "bits_per_char": 1.5}])
    assert list(ax.lines[0].get_ydata()) == [1.5]

@pytest.mark.parametrize("history", [[], [{}], [{"loss": float("nan")}], [{"loss": None}]])
def test_loss_of_nothing(history): assert not viz.plot_loss([r | {"step": 0} for r in history]).lines

def test_lines_differ_without_colour():
    ax = viz.plot_loss(HISTORY, {"a": 1, "b": 2, "c": 3})
    looks = [(line.get_linestyle(), line.get_linewidth(), line.get_marker()) for line in ax.lines]
    assert len(set(looks)) == len(looks)

def test_params_add_up_blocks():
    rows = [(f"blocks.{i}.ffwd.net.{j}.weight", (1,), 10) for i in range(12) for j in (0, 2)]
    ax = viz.plot_params([("wte.weight", (2, 3), 6), *rows])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["wte.weight", "blocks.*.ffwd.net.0.weight × 12",
                                                             "blocks.*.ffwd.net.2.weight × 12"]
    assert np.allclose([b.get_width() for b in ax.patches], [.006, .12, .12])

def test_temperature_bars_are_softmax():
    logits = rng.normal(size=28)
    ax = viz.plot_temperature(logits, CHARS, (.5, 2.0), top=28)
    order = np.argsort(-logits)
    for i, t in enumerate((.5, 2.0)):
        p = np.exp(logits/t) / np.exp(logits/t).sum()
        assert np.allclose([b.get_height() for b in ax.patches[28*i:28*(i + 1)]], 100*p[order])

def test_cut_shows_both_sides():
    ax = viz.plot_cut(PROBS, PROBS >= np.sort(PROBS)[-5], CHARS)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["kept (5)", "cut (23)"]

def test_split_names_the_largest_and_adds_the_rest():
    ax = PICTURES["split"]()
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert len(labels) == 16 and labels[-1] == "32 more"
    assert np.isclose(sum(b.get_width() for b in ax.patches), sum(range(1, 48)))

@pytest.mark.parametrize("c, shown", [
    (chunk(role="assistant", content=""), "assistant"), (chunk(content=" "), "␣"), (chunk("stop"), "stop"),
    (chunk("length", content="s"), "s length"), ({"choices": [{"text": "ab", "finish_reason": None}]}, "ab"),
    ({"choices": [{"text": "", "finish_reason": "stop"}]}, "stop"), ({"choices": [], "usage": {}}, "…"),
    ({"choices": [], "usage": {"total_tokens": 1}}, "usage"), ("[DONE]", "[DONE]")])
def test_stream_boxes(c, shown): assert [t.get_text() for t in viz.plot_stream([c]).texts] == [shown]

def test_white_space_is_visible(): assert viz.show_char(" \n\tx") == "␣↵→x"

def test_masks_are_told_apart_from_numbers():
    ax = viz.plot_mask(np.where(np.tri(3), 0, -np.inf))
    assert [t.get_text() for t in ax.texts] == ["0", "−∞", "−∞", "0", "0", "−∞", "0", "0", "0"]

def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="does not fit 3 tokens"): viz.plot_attention(heads(1)[0], "abc")
    with pytest.raises(ValueError, match="3 characters, but 2 values"): viz.plot_surprise("abc", [1, 2])


# Pages

class Page(HTMLParser):
    "Ids, attributes and texts of a page, with a check that every element is closed."
    def __init__(self, markup):
        super().__init__()
        self.ids, self.tags, self.data, self.spans, self.open = [], [], {}, [], []
        self.feed(markup)
        self.close()
        assert not self.open
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if "id" in attrs: self.ids.append(attrs["id"])
        self.data |= {k[5:]: v for k, v in attrs.items() if k.startswith("data-")}
        if tag == "span": self.spans.append("")
        self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, text):
        if self.open and self.open[-1] == "span": self.spans[-1] += text

def surprise(text=TEXT, **kw):
    bits = 8*rng.random(len(text))
    return viz.surprise_html(text, bits, [{"e": .5, '"': .25, "<": .125} for _ in text], **kw), bits

def pages(): return {"surprise": surprise()[0], "attention": viz.attention_html(heads(6), TEXT)}

@pytest.mark.parametrize("kind", ["surprise", "attention"])
def test_nothing_comes_from_elsewhere(kind):
    markup = re.sub(r'data-\w+="[^"]*"', "", pages()[kind]._repr_html_())  # base64 may hold a //
    assert not re.search(r"//|src=|href=|@import|url\(|fetch|import\(|require|XMLHttp", markup)

def test_pages_are_small():
    assert len(pages()["attention"]._repr_html_()) < 21_000  # six heads of 48 x 48
    assert len(surprise("x"*1000)[0]._repr_html_()) < 120_000
    assert len(viz.attention_html(heads(36, 64).reshape(6, 6, 64, 64), "x"*64)._repr_html_()) < 130_000

def test_copies_do_not_clash():
    a, b = pages().values()
    shown = "".join(x._repr_html_() for x in (a, b, a, b, b))
    ids = Page(shown).ids
    assert len(ids) == len(set(ids)) == 5

@pytest.mark.parametrize("text", [TEXT, '<b>&"\'</script>', "æ—\n  x", ["to", "ken", " <s>"], ""])
def test_text_survives(text):
    bits = np.arange(len(text), dtype=float)
    page = Page(viz.surprise_html(text, bits)._repr_html_())
    assert page.spans == list(text)
    if not len(text): return
    att = heads(2, len(text))
    assert Page(viz.attention_html(att, text)._repr_html_()).spans == list(text)

def test_readable_without_scripts_and_styles():
    for page in pages().values():
        bare = re.sub(r"<(style|script)>.*?</\1>", "", page._repr_html_(), flags=re.S)
        assert TEXT in html.unescape(re.sub(r"<[^>]+>", "", bare)) and "{" not in re.sub(r"<[^>]+>", "", bare)
        assert TEXT in repr(page)

def test_surprise_round_trip():
    page, bits = surprise()
    data = Page(page._repr_html_()).data
    got = np.frombuffer(base64.b64decode(data["bits"]), np.uint8) / 16
    assert abs(got - bits).max() <= 1/32
    assert json.loads(data["alt"]) == [["e", '"', "<"]]*len(TEXT)
    p = np.frombuffer(base64.b64decode(data["p"]), np.uint8).reshape(-1, 3) / 255
    assert abs(p - [.5, .25, .125]).max() <= .5/255

def test_surprise_of_the_unknown_and_the_enormous():
    data = Page(viz.surprise_html("abc", [np.nan, 99, np.inf])._repr_html_()).data
    assert list(base64.b64decode(data["bits"])) == [255, 254, 255]
    assert "3 characters" in repr(viz.surprise_html("abc", [np.nan]*3))

def test_attention_round_trip():
    att = heads(6).reshape(2, 3, len(TEXT), -1)
    data = Page(viz.attention_html(att, TEXT)._repr_html_()).data
    got = np.zeros_like(att)
    i, j = np.tril_indices(len(TEXT))
    got[..., i, j] = np.frombuffer(base64.b64decode(data["w"]), np.uint8).reshape(2, 3, -1) / 255
    assert abs(got - att).max() <= .5/255

def test_page_input_is_checked():
    with pytest.raises(ValueError, match="looks ahead"): viz.attention_html(np.ones((1, 2, 2)), "ab")
    with pytest.raises(ValueError, match="does not fit"): viz.attention_html(heads(2), "ab")
    with pytest.raises(ValueError, match="1 alternatives"): viz.surprise_html("ab", [1, 2], [{}])

def test_heads_and_status_have_names():
    tags = Page(viz.attention_html(heads(2), TEXT)._repr_html_()).tags
    assert [a["aria-label"] for t, a in tags if t == "button"] == ["0.0: layer 0 head 0", "0.1: layer 0 head 1"]
    assert [a["aria-live"] for _, a in tags if a.get("role") == "status"] == ["polite"]
    assert all(a.get("aria-label") for _, a in tags if a.get("role") in ("group", "toolbar"))

def script_of(page): return re.search(r"<script>(.*)</script>", page._repr_html_(), re.S)[1]

@node
@pytest.mark.parametrize("kind", ["surprise", "attention"])
def test_script_is_valid(kind, tmp_path):
    file = tmp_path/"page.js"
    file.write_text(script_of(pages()[kind]))
    subprocess.run(["node", "--check", file], check=True, capture_output=True, timeout=60)

# Just enough of a browser to run a page: two copies, of which the script must find both, once each.
BROWSER = """
class Element{constructor(d={}){
 Object.assign(this,{dataset:{},style:{},children:[],attrs:{},on:{},textContent:'',...d})}
 setAttribute(k,v){this.attrs[k]=String(v)} addEventListener(k,f){this.on[k]=f} prepend(){}
 focus(){document.activeElement=this;if(this.onfocus)this.onfocus()}
 getContext(){return{createImageData:(w,h)=>({data:new Uint8ClampedArray(4*w*h)}),putImageData:m=>{this.pixels=m.data}}}
 querySelector(s){return s==='.mj-text'?this.text:this.status} querySelectorAll(){return this.buttons}}
const {data,text,heads,script}=JSON.parse(require('fs').readFileSync(0,'utf8'));
const many=(n,d)=>Array.from({length:n},(_,i)=>new Element(d?d(i):{}));
const make=()=>new Element({dataset:{...data},status:new Element(),buttons:many(heads),
 text:new Element({children:many(text.length,i=>({textContent:text[i]}))})});
const roots=[make(),make()],made=[];
globalThis.document={querySelectorAll:s=>roots.filter(r=>!(s.includes(':not([data-on])')&&r.dataset.on)),
 createElement:()=>(made.push(new Element()),made.at(-1))};
globalThis.getComputedStyle=()=>({getPropertyValue:()=>'63,127,191'});
for(let i=0;i<2;i++)(0,eval)(script);
const [a,b]=roots,out={started:roots.every(r=>r.dataset.on),canvases:made.length},items=a.text.children;
const key=k=>{const e={key:k,preventDefault(){}};a.text.onkeydown(e);
 if(a.text.on.keydown)a.text.on.keydown(e);return a.status.textContent};
items[3].onmouseenter();out.pointed=a.status.textContent;out.other=b.status.textContent;
out.right=key('ArrowRight');out.focus=items.indexOf(document.activeElement);
out.home=key('Home');out.left=key('ArrowLeft');out.end=key('End');
out.down=key('ArrowDown');out.pressed=a.buttons.map(x=>x.attrs['aria-pressed']);
if(heads){a.buttons[0].onclick();out.clicked=a.status.textContent;out.pixels=[...made[0].pixels.slice(0,8)]}
out.selected=items.map(x=>x.attrs['aria-selected']==='true').indexOf(true);out.role=a.text.attrs.role;
console.log(JSON.stringify(out));
"""

def browse(page, text):
    "What the page says while it is being used."
    markup = page._repr_html_()
    told = dict(data=Page(markup).data, text=list(text), heads=markup.count("<button"), script=script_of(page))
    stdin = json.dumps(told)
    run = subprocess.run(["node", "-e", BROWSER], input=stdin, capture_output=True, timeout=60, encoding="utf-8")
    assert not run.returncode, run.stderr
    return json.loads(run.stdout)

@node
def test_surprise_in_use():
    text, bits = "a b\n<c", [np.nan, 1, 2, 3.5, 4, 15]
    alternatives = [None, {"x": .5}, [("e", .25), (" ", .125)], {}, {"q": 1.0}, None]
    got = browse(viz.surprise_html(text, bits, alternatives), text)
    assert got["started"] and got["other"] == "" and got["role"] == "listbox"
    assert got["pointed"] == "new line: 3.5 bits"
    assert got["right"] == "<: 4.0 bits. Expected: q 100 %" and got["focus"] == 4
    assert got["home"] == got["left"] == "a: not predicted"
    assert got["end"] == "c: 15.0 bits" and got["selected"] == 5

@node
def test_attention_in_use():
    att = np.zeros((2, 4, 4))
    att[0] = np.eye(4)
    att[1, :, 0] = 1
    att[0, 3] = [.5, .25, .25, 0]
    got = browse(viz.attention_html(att, "a bc"), "a bc")
    assert got["started"] and got["canvases"] == 4  # two copies of two heads, each started once
    assert got["pointed"] == "c (3) looks at a (0) 50 %, space (1) 25 %, b (2) 25 %"
    assert got["home"] == "a (0) looks at a (0) 100 %"
    assert got["down"] == "c (3) looks at a (0) 100 %" and got["pressed"] == ["false", "true"]
    assert got["clicked"] == got["end"] == got["pointed"]
    assert got["pixels"] == [63, 127, 191, 255, 63, 127, 191, 0]


# The module

def test_imports_nothing_of_ours_and_no_torch():
    code = "import sys, microjulia.viz; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'microjulia')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert sorted(eval(out)) == ["microjulia", "microjulia.viz"]

def test_every_parameter_is_explained():
    for name in viz.__all__:
        f = getattr(viz, name)
        if inspect.isfunction(f): assert f.__doc__ and all(docments(f, returns=False).values()), name


# The pages with something to turn, in a real browser

SCORES = np.log([.32, .21, .14, .1, .08, .06, .05, .04])
RUN = [dict(kind="eval", step=s, bits_per_char=b) for s, b in ((0, 4.8), (50, 3.1), (100, 2.6))] + \
          [dict(kind="sample", step=s, text=t) for s, t in ((0, "xq zv"), (100, "the <wise> man"))]
PARAMS = [("wte.weight", (28, 8)), ("blocks.0.attn.qkv.weight", (24, 8)), ("blocks.0.ln1.bias", (8,))]
TURNED = dict(next=viz.next_html(SCORES, "taiswo.x"), scrub=viz.scrub_html(RUN), tree=viz.tree_html(PARAMS, "tiny"),
              encode=viz.encode_html("know thyself", CHARS))
POINTED = dict(surprise=viz.surprise_html("a\nb c", np.array([np.nan, 1., 2., 3., 4.]), [{"a": .5}]*5),
               attention=viz.attention_html(np.tri(3)[None] / np.tri(3).sum(1, keepdims=True), "a b"))
AXE = Path(os.environ.get("MICROJULIA_NODE_MODULES", "none"))/"axe-core"/"axe.min.js"

@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    "A page of real Chromium with every picture on it twice, and what it complained of."
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium: pytest.skip("needs chromium")
    file, heard = tmp_path_factory.mktemp("pages")/"all.html", []
    body = "".join(p._repr_html_() for p in [*TURNED.values(), *POINTED.values()]*2)
    head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>pages</title>'
    file.write_text(f'<!doctype html><html lang="en">{head}<main><h1>pages</h1>{body}</main></html>', encoding="utf-8")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        page.on("console", lambda m: heard.append(m.text))
        page.on("pageerror", lambda e: heard.append(str(e)))
        page.on("request", lambda r: r.url.startswith("file:") or heard.append(r.url))
        page.goto(file.as_uri())
        yield page
        assert heard == []
        browser.close()

def set_slider(page, which, value):
    "Move the first slider that `which` finds, as a hand would."
    page.locator(which).first.evaluate("(s, v) => { s.value = v; s.dispatchEvent(new Event('input')) }", value)

def status(page, kind): return page.locator(f".mj-{kind} [role=status]").first.text_content()

def test_sliders_change_the_choice(shown):
    widths = lambda: shown.locator(".mj-next").first.locator("td:last-child").all_text_contents()
    assert widths()[0] == "32.0 %" and status(shown, "next").startswith("8 of 8 characters")
    set_slider(shown, ".mj-next input >> nth=1", 2)
    assert widths()[:3] == ["60.4 %", "39.6 %", "0.0 %"] and status(shown, "next").startswith("2 of 8 characters")
    set_slider(shown, ".mj-next input >> nth=0", 0)
    assert widths()[0] == "100.0 %" and "0.00 bits" in status(shown, "next")
    assert shown.locator(".mj-next").nth(1).locator("td:last-child").first.text_content() == "32.0 %"  # the copy stays

def test_slider_goes_through_the_samples(shown):
    text = lambda: shown.locator(".mj-scrub .mj-text").first.text_content()
    assert text() == "the <wise> man" and "2.60 bits" in status(shown, "scrub")
    set_slider(shown, ".mj-scrub input", 0)
    assert text() == "xq zv" and status(shown, "scrub") == "step 0, held out 4.80 bits per character"

def test_tree_unfolds(shown):
    leaf = shown.locator(".mj-tree li", has_text="qkv").last
    assert not leaf.is_visible() and "tiny: 424" in shown.locator(".mj-tree").first.inner_text()
    for name in ("blocks", "0:", "attn", "qkv"): shown.locator(".mj-tree").nth(1).locator("summary", has_text=name).first.click()
    assert leaf.is_visible() and "24 × 8" in shown.locator(".mj-tree").nth(1).inner_text()

def test_typing_gives_ids(shown):
    shown.locator(".mj-encode input").first.fill("Naïve — or?")
    tiles = shown.locator(".mj-encode").first.locator(".mj-tiles span").all_text_contents()
    assert tiles == [f"{viz.show_char(CHARS[i])}{i}" for i in (15, 2, 10, 23, 6, 0, 16, 19, 1)]
    assert 'spelling "naive or."' in status(shown, "encode")

def test_every_control_has_a_name(shown):
    for control in shown.locator("input").all(): assert control.evaluate("c => c.labels.length") == 1

@pytest.mark.skipif(not AXE.exists(), reason="a folder $MICROJULIA_NODE_MODULES with the package axe-core is not here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(shown, scheme):
    shown.emulate_media(color_scheme=scheme)
    shown.evaluate(AXE.read_text(encoding="utf-8"))
    assert [(v["id"], v["nodes"][0]["failureSummary"]) for v in shown.evaluate("axe.run()")["violations"]] == []

@pytest.mark.parametrize("kind", TURNED)
def test_turned_pages_are_readable_without_scripts(kind):
    bare = re.sub(r"<(style|script)>.*?</\1>", "", TURNED[kind]._repr_html_(), flags=re.S)
    words = html.unescape(re.sub(r"<[^>]+>", " ", bare))
    assert {"next": "32.0 %", "scrub": "the <wise> man", "tree": "424", "encode": "know"[0]}[kind] in words
    assert "http" not in TURNED[kind].markup and len(TURNED[kind].markup) < 16_000

@pytest.mark.parametrize("shape", [(3,), (8, 1), ()])
def test_next_wants_a_score_for_each(shape):
    with pytest.raises(ValueError, match="scores of shape"): viz.next_html(np.zeros(shape), "taiswo.x")
