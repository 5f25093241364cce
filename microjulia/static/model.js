// A GPT of the model card in plain JavaScript: a checkpoint's bytes in, logits and attention out.
// It computes in float32, one position at a time, and remembers keys and values, as `06_generation` does.
"use strict";
const MicroJulia = (() => {
  // Numbers of 16 bits, widened: the sign, exponent and fraction of a half, or the upper half of a float32.
  const half = h => {
    const sign = h & 0x8000 ? -1 : 1, e = h >> 10 & 31, f = h & 1023;
    return e === 31 ? (f ? NaN : sign * Infinity) : sign * (e ? 2 ** (e - 15) * (1 + f / 1024) : 2 ** -24 * f);
  };
  const readers = {
    F32: raw => new Float32Array(raw.slice().buffer),
    F16: raw => { const table = new Float32Array(65536).map((_, h) => half(h));
      return Float32Array.from(new Uint16Array(raw.slice().buffer), h => table[h]); },
    BF16: raw => new Float32Array(Uint32Array.from(new Uint16Array(raw.slice().buffer), h => h << 16).buffer),
    I8: raw => Float32Array.from(new Int8Array(raw.slice().buffer)),
  };

  // The tensors of a safetensors file by name: eight bytes of length, a header in JSON, then the numbers.
  function tensors(buffer) {
    const bytes = new Uint8Array(buffer), n = Number(new DataView(buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + n))), found = {};
    for (const [name, t] of Object.entries(header)) {
      if (name === "__metadata__") continue;
      if (!readers[t.dtype]) throw new Error(`${name} holds ${t.dtype}; F32, F16, BF16 and I8 can be read`);
      found[name] = readers[t.dtype](bytes.subarray(8 + n + t.data_offsets[0], 8 + n + t.data_offsets[1]));
    }
    for (const [name, scale] of Object.entries(found)) {                 // small integers, in units of their row's scale
      const W = name.endsWith(".scale") && found[name.slice(0, -6)], C = W && W.length / scale.length;
      if (W) { for (let i = 0; i < W.length; i++) W[i] *= scale[Math.floor(i / C)]; delete found[name]; }
    }
    return found;
  }

  function layerNorm(x, weight, bias, eps) {
    let mean = 0, square = 0;
    for (const v of x) mean += v / x.length;
    for (const v of x) square += (v - mean) ** 2 / x.length;
    const scale = 1 / Math.sqrt(square + eps);
    return x.map((v, i) => (v - mean) * scale * weight[i] + (bias ? bias[i] : 0));
  }

  // W x + b: W has a row for each number that comes out.
  function dense(W, x, bias) {
    const C = x.length, out = new Float32Array(W.length / C);
    for (let r = 0, at = 0; r < out.length; r++) {
      let sum = 0;
      for (let c = 0; c < C; c++) sum += W[at++] * x[c];
      out[r] = sum + (bias ? bias[r] : 0);
    }
    return out;
  }

  const gelu = v => v / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v ** 3)));

  function softmax(scores) {
    const top = scores.reduce((a, b) => Math.max(a, b)), p = scores.map(s => Math.exp(s - top));
    const sum = p.reduce((a, b) => a + b);
    return p.map(v => v / sum);
  }

  // Text to ids and back, by the rules of `00_tokenizer` but for rare letters like æ, which leave a gap.
  function tokenizer(chars) {
    const id = new Map(chars.map((c, i) => [c, i])), gap = "\0";
    const known = c => [c, c.toLowerCase(), c.toUpperCase(), "?!".includes(c) ? "." : gap].find(d => d === gap || id.has(d));
    const plain = c => id.has(c) ? c : Array.from(c.normalize("NFKD").replace(/\p{M}/gu, ""), known).join("");
    const normalize = text => Array.from(text, plain).join("").replace(/ *\0[ \0]*/g, id.has(" ") ? " " : "");
    return { normalize, encode: text => Array.from(normalize(text), c => id.get(c)), decode: ids => ids.map(i => chars[i]).join("") };
  }

  class GPT {
    // `buffer`: model.safetensors; `config`: the hyperparameters; `chars`: vocab.json
    constructor(buffer, config, chars) {
      Object.assign(this, { w: tensors(buffer), config, tokenizer: tokenizer(chars) });
      this.forget();
    }
    forget() {
      Object.assign(this, { ids: [], logits: null });
      this.layers = Array.from({ length: this.config.n_layer }, () => ({ k: [], v: [], att: [] }));
    }
    // The same weights with a memory of their own.
    twin() { const other = Object.assign(Object.create(GPT.prototype), this); other.forget(); return other; }
    // The scores of what may follow `ids`; what was read before is not read again.
    next(ids) {
      ids = ids.slice(-this.config.block_size);
      let same = 0;
      while (same < this.ids.length && this.ids[same] === ids[same]) same++;
      if (same === ids.length && same < this.ids.length) same--;        // its logits were not kept
      if (same < this.ids.length) {
        this.ids.length = same;
        for (const { k, v, att } of this.layers) k.length = v.length = att.length = same;
      }
      for (const id of ids.slice(same)) this.logits = this.step(id);
      return this.logits;
    }
    step(id) {
      const { w } = this, { n_embd: C, n_layer, norm_eps: eps = 1e-5 } = this.config, t = this.ids.length;
      let x = w["wte.weight"].slice(id * C, id * C + C).map((v, i) => v + w["wpe.weight"][t * C + i]);
      for (let l = 0; l < n_layer; l++) {
        const at = s => w[`blocks.${l}.${s}`];
        const a = this.attend(this.layers[l], layerNorm(x, at("ln1.weight"), at("ln1.bias"), eps), at);
        x = x.map((v, i) => v + a[i]);
        const y = layerNorm(x, at("ln2.weight"), at("ln2.bias"), eps);
        const h = dense(at("ffwd.net.0.weight"), y, at("ffwd.net.0.bias")).map(gelu);
        const f = dense(at("ffwd.net.2.weight"), h, at("ffwd.net.2.bias"));
        x = x.map((v, i) => v + f[i]);
      }
      this.ids.push(id);
      return dense(w["lm_head.weight"], layerNorm(x, w["ln_f.weight"], w["ln_f.bias"], eps), w["lm_head.bias"]);
    }
    attend(layer, x, at) {
      const C = x.length, nh = this.config.n_head, hs = C / nh, out = new Float32Array(C);
      const qkv = dense(at("attn.qkv.weight"), x, at("attn.qkv.bias"));
      layer.k.push(qkv.subarray(C, 2 * C));
      layer.v.push(qkv.subarray(2 * C));
      layer.att.push(Array.from({ length: nh }, (_, h) => {
        const p = softmax(Float32Array.from(layer.k, k => {
          let s = 0;
          for (let i = h * hs; i < (h + 1) * hs; i++) s += qkv[i] * k[i];
          return s / Math.sqrt(hs);
        }));
        layer.v.forEach((v, j) => { for (let i = h * hs; i < (h + 1) * hs; i++) out[i] += p[j] * v[i]; });
        return p;
      }));
      return dense(at("attn.proj.weight"), out, at("attn.proj.bias"));
    }
  }

  // What the next character is drawn from: temperature, then the `top_k` likeliest, then those that reach `top_p`.
  function probabilities(logits, { temperature = 0.8, top_k = 40, top_p = 1 } = {}) {
    const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]), p = new Float64Array(logits.length);
    if (temperature === 0) { p[order[0]] = 1; return p; }
    const all = softmax(Float64Array.from(logits, z => z / temperature));
    let before = 0, kept = 0;
    order.slice(0, top_k || undefined).forEach(i => { p[i] = all[i]; kept += all[i]; });
    for (const i of order) { if (before >= top_p * kept) p[i] = 0; before += p[i]; }
    const sum = p.reduce((a, b) => a + b);
    return p.map(v => v / sum);
  }

  // The id in whose stretch of the line from 0 to 1 `u` falls.
  function draw(p, u) {
    let end = 0, last = 0;
    for (let i = 0; i < p.length; i++) if (p[i] > 0) { last = i; if (u < (end += p[i])) return i; }
    return last;
  }

  return { GPT, tokenizer, tensors, softmax, probabilities, draw };
})();
if (typeof module !== "undefined") module.exports = MicroJulia;
