// A source for the page: a model that runs here, in the browser. Its checkpoint lies beside the page in model/.
const local = {
  async open() {
    const get = async (name, as) => {
      const answer = await fetch("model/" + name);
      if (!answer.ok) throw new Error(`the model is not there: ${name} could not be read`);
      return answer[as]();
    };
    const [config, chars, weights] = await Promise.all(
      [get("config.json", "json"), get("vocab.json", "json"), get("model.safetensors", "arrayBuffer")]);
    return new MicroJulia.GPT(weights, config.hyperparams, chars);
  },
  get model() { return this.opened ??= this.open(); },
  async models() {
    const { config, tokenizer, w } = await this.model;
    const parameters = Object.values(w).reduce((n, x) => n + x.length, 0);
    return [{ id: "microjulia", context: config.block_size, vocab_size: config.vocab_size, parameters }];
  },

  // Number `position` of `seed`, between 0 and 1: the hash of `01_corpus`, so that a seed means the same text everywhere.
  uniform(seed, position) {
    const mask = (1n << 64n) - 1n;
    const mix = x => {
      x = x + 0x9e3779b97f4a7c15n & mask;
      x = (x ^ x >> 30n) * 0xbf58476d1ce4e5b9n & mask;
      x = (x ^ x >> 27n) * 0x94d049bb133111ebn & mask;
      return x ^ x >> 31n;
    };
    return Number(mix(mix(BigInt(seed)) ^ BigInt(position)) >> 11n) / 2 ** 53;
  },

  async *stream({ prompt, messages, max_tokens, seed, ...choice }, signal) {
    const model = await this.model, { tokenizer, config } = model;
    const asked = prompt ?? messages.at(-1).content;
    let ids = tokenizer.encode(asked), painted = performance.now();
    if (!ids.length || asked.trim() && !tokenizer.decode(ids).trim())
      throw new Error("nothing is left of the text: write at least one letter from a to z");
    for (let i = 0; i < max_tokens && !signal.aborted; i++) {
      if (ids.length > config.block_size) ids = ids.slice(-Math.floor(config.block_size / 2));
      const logits = model.next(ids), p = MicroJulia.softmax(Float64Array.from(logits));
      const id = MicroJulia.draw(MicroJulia.probabilities(logits, choice), this.uniform(seed, i));
      const top = Array.from(p.keys()).sort((a, b) => p[b] - p[a]).slice(0, 5);
      ids.push(id);
      yield { text: tokenizer.decode([id]), logprob: Math.log(p[id]), top: top.map(j => [tokenizer.decode([j]), Math.log(p[j])]) };
      if (performance.now() - painted > 16) {                            // let the page show it, and be clicked
        await new Promise(done => setTimeout(done));
        painted = performance.now();
      }
    }
  },
};
mount(local);
