// The page: it asks a source for letters and draws them. What a source is, see `mount`.
"use strict";
const $ = id => document.getElementById(id);
const bits = logprob => -logprob / Math.LN2;
const shade = logprob => logprob == null ? "" : "s" + Math.max(0, Math.min(5, Math.floor(bits(logprob)) - 1));
const shown = text => ({ " ": "space", "\n": "new line", "\t": "tab" })[text] ?? text;
const percent = logprob => (100 * Math.exp(logprob)).toFixed(1) + " %";

function element(tag, fields = {}, ...children) {
  const e = Object.assign(document.createElement(tag), fields);
  e.append(...children);
  return e;
}

// The letters of one text: appended as they come, walked through by arrow keys, explained in #info.
class Letters {
  constructor(box) {
    Object.assign(this, { box, at: -1, letters: [] });
    box.replaceChildren();
    box.onmouseover = box.onclick = e => this.select(this.letters.findIndex(l => l.span === e.target));
    box.onkeydown = e => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -1e9, End: 1e9 }[e.key];
      if (!step || !this.letters.length) return;
      e.preventDefault();
      this.select(Math.max(0, Math.min(this.letters.length - 1, this.at < 0 ? 0 : this.at + step)));
    };
    box.onfocus = () => this.at < 0 && this.letters.length && this.select(0);
  }
  plain(text) { this.box.append(element("span", { className: "soft", textContent: text })); }
  add(letter) {
    letter.span = element("span", { className: shade(letter.logprob), textContent: letter.text });
    this.letters.push(letter);
    this.box.append(letter.span);
  }
  select(i) {
    if (i < 0) return;
    this.letters[this.at]?.span.classList.remove("here");
    const { text, logprob, top } = this.letters[this.at = i];
    this.letters[i].span.classList.add("here");
    const rows = (top ?? []).map(([t, p]) => element("tr", {}, element("th", { scope: "row", textContent: shown(t) }),
      element("td", {}, element("meter", { value: Math.exp(p), ariaLabel: `probability of ${shown(t)}` }), " " + percent(p))));
    const how = logprob == null ? "" : ` surprised the model by ${bits(logprob).toFixed(1)} bits (${percent(logprob)}). Likeliest here:`;
    $("info").replaceChildren(element("p", { textContent: `Letter ${i + 1}, ${shown(text)},${how}` }), element("table", {}, ...rows));
  }
  get text() { return this.letters.map(l => l.text).join(""); }
}

// `source` answers three questions:
//   models()                  a promise of [{id, context, vocab_size, ...}]
//   stream(request, signal)   an async iterator of {text, logprob, top: [[text, logprob], ...]}; the request has `prompt` or
//                             `messages`, and model, temperature, top_k, top_p, max_tokens, seed as numbers
//   program(kind, request)    how to ask the same by 'curl' or 'python', or null where there is nobody to ask
function mount(source) {
  const sliders = ["temperature", "top_k", "top_p", "max_tokens"];
  let running = null, tab = "write", last = null;

  const request = () => {
    const r = tab === "write" ? { prompt: $("prompt").value } : { messages: [{ role: "user", content: $("say").value }] };
    if ($("model").value) r.model = $("model").value;
    for (const name of sliders) r[name] = Number($(name).value);
    return { ...r, seed: Number($("seed").value) };
  };
  const sketch = () => {
    const kind = $("code").dataset.kind ?? "curl";
    $("snippet").textContent = source.program?.(kind, request()) ?? "";
  };
  const busy = on => {
    $("go").disabled = on;
    $("stop").disabled = !on;
    $("on").hidden = on || tab !== "write" || !last?.letters.length;
    $("status").textContent = on ? "writing" : last?.letters.length ? "The model wrote: " + last.text : "";
  };

  async function write() {
    if (running) return;
    if (!$("lock").checked) $("seed").value = Math.floor(Math.random() * 2 ** 31);
    $("error").textContent = "";
    const r = request();
    let box = $("out");
    if (tab === "chat") {
      box = element("div", { className: "out", tabIndex: 0, ariaLabel: "The answer. Arrow keys walk through its letters." });
      box.setAttribute("role", "group");
      $("talk").append(element("li", { className: "you", textContent: $("say").value }), element("li", {}, box));
    }
    last = new Letters(box);
    if (tab === "write") last.plain($("prompt").value);
    const control = running = new AbortController();
    busy(true);
    try { for await (const letter of source.stream(r, control.signal)) last.add(letter); }
    catch (e) {
      if (!control.signal.aborted) $("error").textContent = e.message;
      if (e.status === 401) { $("key-label").hidden = false; $("key").focus(); }
    }
    running = null;
    busy(false);
    if (tab === "chat" && last.letters.length) $("say").value = "";
    sketch();
  }

  function show(name) {
    tab = name;
    for (const t of ["write", "chat"]) {
      $(t).hidden = t !== name;
      $("tab-" + t).setAttribute("aria-selected", t === name);
      $("tab-" + t).tabIndex = t === name ? 0 : -1;
    }
    for (const id of ["out", "on"]) $(id).hidden = name === "chat" || (id === "on" && !last?.letters.length);
    $("go").textContent = name === "chat" ? "Send" : "Write";
    sketch();
  }

  for (const t of ["write", "chat"]) {
    $("tab-" + t).onclick = () => show(t);
    $("tab-" + t).onkeydown = e => {
      if (!["ArrowLeft", "ArrowRight"].includes(e.key)) return;
      show(t === "write" ? "chat" : "write");
      $("tab-" + tab).focus();
    };
  }
  for (const name of sliders) $(name).oninput = () => { $(name).previousElementSibling.textContent = $(name).value; sketch(); };
  for (const id of ["prompt", "say", "seed", "model"]) $(id).oninput = sketch;
  $("go").onclick = write;
  $("stop").onclick = () => running?.abort();
  $("on").onclick = () => { $("prompt").value += last.text; write(); };
  document.onkeydown = e => {
    if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) write();
    if (e.key === "Escape") running?.abort();
  };
  for (const kind of ["curl", "python"]) $(kind).onclick = async () => {
    $("code").dataset.kind = kind;
    sketch();
    try { await navigator.clipboard.writeText($("snippet").textContent); $("copied").textContent = "copied"; }
    catch { getSelection().selectAllChildren($("snippet")); $("copied").textContent = "selected: copy it by hand"; }
  };

  async function greet() {
    try {
      const models = await source.models(), first = models[0];
      $("model").replaceChildren(...models.map(m => element("option", { textContent: m.id })));
      $("model-label").hidden = models.length < 2;
      const size = first.parameters ? `${first.parameters.toLocaleString("en")} parameters` : "A small model";
      $("about").textContent = `${size}: reads up to ${first.context} letters and guesses the next, again and again.`;
      if (first.vocab_size) $("top_k").max = first.vocab_size;
      $("top_k").oninput();
    } catch (e) { $("error").textContent = e.message; }
    sketch();
  }
  $("code").hidden = !source.program;
  $("docs").hidden = !source.program;
  return greet();
}
