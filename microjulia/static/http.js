// A source for the page: the HTTP API of the server that the page came from.
const http = {
  headers() {
    const key = $("key").value;
    return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
  },
  async failed(answer) {
    const said = await answer.json().catch(() => null);
    return Object.assign(new Error(said?.error?.message ?? `the server answered ${answer.status}`), { status: answer.status });
  },
  async models() {
    const answer = await fetch("./", { headers: { Accept: "application/json" } });
    if (!answer.ok) throw await this.failed(answer);
    return (await answer.json()).models;
  },
  body(request) { return { ...request, stream: true, ...(request.messages ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 }) }; },
  path(request) { return request.messages ? "v1/chat/completions" : "v1/completions"; },
  async *stream(request, signal) {
    const answer = await fetch(this.path(request), { method: "POST", headers: this.headers(), body: JSON.stringify(this.body(request)), signal });
    if (!answer.ok) throw await this.failed(answer);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (text += value).split("\n\n");
      text = parts.pop();
      for (const line of parts) if (line.startsWith("data: {")) yield* this.letters(JSON.parse(line.slice(6)));
    }
  },
  *letters(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const found = chunk.choices[0]?.logprobs;
    for (const t of found?.content ?? []) yield { text: t.token, logprob: t.logprob, top: t.top_logprobs.map(a => [a.token, a.logprob]) };
    for (const [i, token] of (found?.tokens ?? []).entries()) {
      const top = Object.entries(found.top_logprobs[i] ?? {}).sort((a, b) => b[1] - a[1]);
      yield { text: token, logprob: found.token_logprobs[i], top };
    }
  },
  program(kind, request) {
    const url = new URL(this.path(request), location.href).href, key = !$("key-label").hidden;
    if (kind === "curl") return `curl -N ${url} -H 'Content-Type: application/json'${key ? ' -H "Authorization: Bearer $KEY"' : ""} \\\n`
      + `  -d '${JSON.stringify({ ...request, stream: true }).replaceAll("'", "'\\''")}'`;
    const { top_k, model, ...rest } = request, base = new URL("v1", location.href).href;
    const fields = Object.entries(rest).map(([k, v]) => `${k}=${JSON.stringify(v)}`).join(", ");
    return `from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key ? "KEY" : '"none"'})\n`
      + `stream = client.${request.messages ? "chat." : ""}completions.create(model=${JSON.stringify(model ?? "microjulia")}, stream=True,\n    ${fields}, extra_body={"top_k": ${top_k}})\n`
      + `for chunk in stream: print(chunk.choices[0].${request.messages ? 'delta.content or ""' : "text"}, end="", flush=True)`;
  },
};
mount(http);
