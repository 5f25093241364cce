// Inside the sentence that is typed: what may come next, and where each head looks. For a model that runs in the page.
async function inside(model) {
  const { n_layer, n_head, block_size } = model.config, { tokenizer } = model;
  let head = 0, at = 0, ids = [];

  const buttons = Array.from({ length: n_layer * n_head }, (_, h) => {
    const layer = Math.floor(h / n_head) + 1, name = `${layer}.${h % n_head + 1}`;
    return element("button", { textContent: name, ariaLabel: `${name}: layer ${layer}, head ${h % n_head + 1}`,
      onclick: () => { head = h; draw(); } });
  });
  const box = (tag, id, role, ariaLabel) => {
    const e = element(tag, { id, ariaLabel });
    if (role) e.setAttribute("role", role);
    return e;
  };
  const sentence = Object.assign(box("div", "sentence", "group", "Your text. Arrow keys walk through its letters."),
    { className: "out", tabIndex: 0 });
  document.querySelector("main").append(element("section", { id: "inside" },
    element("h2", { textContent: "Inside your text" }),
    element("p", { textContent: "What may come after it, under the settings above:" }),
    box("table", "next", null, "The likeliest next letters"),
    element("p", { textContent: "And where each head looks, from the letter you point at to those before it. Choose a head:" }),
    Object.assign(box("div", "heads", "toolbar", "Heads, by layer and number"), { className: "row" }), sentence, box("p", "looks", "status")));

  const weights = () => model.layers[Math.floor(head / n_head)].att[at][head % n_head];

  function read() {
    ids = tokenizer.encode($("prompt").value).slice(-block_size);
    if (ids.length) model.next(ids);
    $("sentence").replaceChildren(...ids.map(id => element("span", { textContent: tokenizer.decode([id]) })));
    at = ids.length - 1;
    draw();
  }
  function draw() {
    buttons.forEach((b, h) => { b.setAttribute("aria-pressed", h === head); b.classList.toggle("main", h === head); });
    $("next").replaceChildren();
    $("looks").textContent = "";
    if (!ids.length) return;
    const p = weights(), spans = [...$("sentence").children];
    spans.forEach((s, j) => {
      s.classList.toggle("here", j === at);
      s.style.background = j <= at ? `color-mix(in srgb, var(--s5) ${Math.round(100 * p[j])}%, transparent)` : "";
    });
    const far = Array.from(p.keys()).sort((a, b) => p[b] - p[a]).slice(0, 3);
    $("looks").textContent = `${shown(spans[at].textContent)} (letter ${at + 1}) looks at `
      + far.map(j => `${shown(spans[j].textContent)} (${j + 1}) ${Math.round(100 * p[j])} %`).join(", ");
    bars();
  }
  function bars() {
    const choice = Object.fromEntries(["temperature", "top_k", "top_p"].map(name => [name, Number($(name).value)]));
    const p = MicroJulia.probabilities(model.logits, choice), order = Array.from(p.keys()).sort((a, b) => p[b] - p[a]);
    $("next").replaceChildren(...order.slice(0, 8).map(i => element("tr", {},
      element("th", { scope: "row", textContent: shown(tokenizer.decode([i])) }),
      element("td", {}, element("meter", { value: p[i], ariaLabel: `probability of ${shown(tokenizer.decode([i]))}` }),
        ` ${(100 * p[i]).toFixed(1)} %`))));
  }
  const go = i => { if (i >= 0 && i < ids.length) { at = i; draw(); } };
  $("sentence").onmouseover = e => go([...$("sentence").children].indexOf(e.target));
  $("sentence").onkeydown = e => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[e.key];
    if (step) { e.preventDefault(); go(Math.max(0, Math.min(ids.length - 1, at + step))); }
  };
  $("heads").replaceChildren(...buttons);
  $("prompt").addEventListener("input", read);
  for (const name of ["temperature", "top_k", "top_p"]) $(name).addEventListener("input", () => ids.length && bars());
  read();
}
local.model.then(model => inside(model.twin()), () => {});                // the page itself says what went wrong
