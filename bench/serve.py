"""The server under load: many streams at once, beside its own engine and two other servers.

    python bench/serve.py --save bench/results/serve.json                    # ours
    python bench/serve.py --peers PYTHON --save bench/results/serve.json     # and the others
    python bench/serve.py --requests 10000 --save bench/results/serve_memory.json   # is anything left behind?

Everything talks over 127.0.0.1 and is started and stopped here. `--streams` clients each ask for a text, read it as it comes and
ask for the next, until `--seconds` are over. `engine` is the rate of `Engine` with as many streams and nobody between: its events
are taken out in the process that makes them. `long texts` is both again with texts of a thousand characters, of which a new
request is a smaller part; the others cannot write past the window. `one by one` is the server when each character is asked for in a chunk of its own;
`overload` has more clients than places. PYTHON is an interpreter with `transformers[serving]` and `llama-cpp-python[server]`;
they get the same weights by our own export, and the same requests. `load_average` says how busy the machine was: where it is far
above the number of contenders' threads, compare `cpu_us_per_char`, the processor time of the whole process, rather than the rates.
"""
import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from common import machine, save

from microjulia import load
from microjulia.checkpoint import save_checkpoint
from microjulia.exchange.convert import convert
from microjulia.generation import SamplingParams, encode_prompt
from microjulia.gpt import GPT, config_for
from microjulia.serving.engine import Engine
from microjulia.serving.server import bind
from microjulia.tokenizer import CharTokenizer

LONG, PROMPT = 1000, "the city is "
TEXT = re.compile(rb'"(?:text|content)": ?"((?:[^"\\]|\\.)*)"')


# The load: HTTP by hand, so that the client costs little of the machine it shares with the server

def head(body):
    raw = json.dumps(body).encode()
    path = "chat/completions" if "messages" in body else "completions"
    return b"POST /v1/%b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(raw), raw)


async def answer(reader, on_text):
    "Status and headers of one answer; `on_text` is told of every piece of text."
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    if headers.get("transfer-encoding") != "chunked": body = await reader.readexactly(int(headers["content-length"]))
    else:
        body, tail = b"", b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            piece = await reader.read(1 << 16)
            if not piece: raise ConnectionError("the stream broke off")
            tail = (tail + piece)[-16:]
            whole, _, body = (body + piece).rpartition(b"\n")
            for m in TEXT.finditer(whole): on_text(len(m[1]))
    return int(lines[0].split()[1]), headers, body


class Load:
    "What `streams` clients saw."
    def __init__(self, port, body, streams): self.port, self.request, self.streams = port, head(body), streams
    async def client(self, until):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        while time.perf_counter() < until:
            start, first, chars = time.perf_counter(), None, 0
            def on_text(n):
                nonlocal first, chars
                if n and first is None: first = time.perf_counter() - start
                if time.perf_counter() < until: self.chars += n
                chars += n
            writer.write(self.request)
            status, headers, body = await answer(reader, on_text)
            self.statuses[status] += 1
            if first is not None: self.first.append(first)
            if status != 200:
                if not headers.get("retry-after"): self.bare_refusals += 1
                await asyncio.sleep(.5)
        writer.close()
    async def run(self, seconds):
        self.chars, self.first, self.statuses, self.bare_refusals, self.broken = 0, [], Counter(), 0, Counter()
        start = time.perf_counter()
        tasks = [asyncio.ensure_future(self.client(start + seconds)) for _ in range(self.streams)]
        _, late = await asyncio.wait(tasks, timeout=seconds + 10)
        for t in late: t.cancel()  # of a server so slow, the text begun before the end is not waited for
        for e in await asyncio.gather(*tasks, return_exceptions=True):
            if e is not None: self.broken["late" if isinstance(e, asyncio.CancelledError) else type(e).__name__] += 1
        cuts = statistics.quantiles(self.first, n=100) if len(self.first) > 1 else [0] * 99
        return dict(streams=self.streams, seconds=seconds, chars_per_second=round(self.chars / seconds), requests=dict(self.statuses),
                    first_text_ms=dict(median=round(1e3 * cuts[49], 1), p99=round(1e3 * cuts[98], 1)),
                    refusals_without_retry_after=self.bare_refusals, broken=dict(self.broken))


# The contenders

@contextmanager
def running(command, port, **options):
    "A server as a process, ready; stopped afterwards."
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        for _ in range(1200):
            try:
                asyncio.run(ask(port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"))
                break
            except (OSError, asyncio.IncompleteReadError):
                if process.poll() is not None: raise SystemExit(f"{command[:4]} ended with {process.returncode}") from None
                time.sleep(.1)
        yield process
    finally:
        process.terminate()
        try: process.wait(30)
        except subprocess.TimeoutExpired: process.kill()


async def ask(port, raw):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(raw)
    try: return await answer(reader, lambda n: None)
    finally: writer.close()


def cpu_seconds(process):
    "Processor time of a process so far, its threads and what it started not counted apart."
    stat = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def free_port():
    with bind("127.0.0.1", 0) as s: return s.getsockname()[1]


def ours(model, *more, port): return [sys.executable, "-m", "microjulia", "serve", "--model", model, "--port", port, "--device", "cpu", *more]


def engine_rate(folder, streams, seconds, length):
    "Characters per second of the engine alone, its events taken out every few milliseconds."
    m = load(folder, "cpu")
    with Engine(m.model, m.tokenizer, max_batch=streams) as engine:
        ids, params = encode_prompt(m.tokenizer, PROMPT), SamplingParams(max_new_tokens=length)
        rows = [engine.stream(ids, params) for _ in range(streams)]
        start, used, chars = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() < start + seconds:
            for i, s in enumerate(rows):
                chars += sum(len(e.text) for e in s.ready())
                if s.finish_reason: rows[i] = engine.stream(ids, params)
            time.sleep(.005)
        return dict(chars_per_second=round(chars / (time.perf_counter() - start)),
                    cpu_us_per_char=round(1e6 * (time.process_time() - used) / chars, 1))


def measure(name, command, port, body, streams, seconds):
    with running(command, port) as process:
        load_ = Load(port, body, streams)
        asyncio.run(load_.run(min(5, seconds)))  # warm
        used = cpu_seconds(process)
        result = asyncio.run(load_.run(seconds))
        result["cpu_us_per_char"] = round(1e6 * (cpu_seconds(process) - used) / max(1, load_.chars), 1)
    print(name, json.dumps(result), flush=True)
    return result


def against(name, found, base):
    found[name]["of_the_engine"] = round(found[name]["chars_per_second"] / base, 3)


def compare(args, folder, length):
    "Every contender, one after the other, the engine before and after."
    body = dict(prompt=PROMPT, max_tokens=length, stream=True, model="small")
    model, short, found = f"small={folder}", max(5, args.seconds // 4), {}
    port, n = free_port(), args.streams
    rate = lambda length=length: engine_rate(folder, n, short, length)
    engines = [rate()]
    found["server"] = measure("server", ours(model, "--max-batch", n, port=port), port, body, n, args.seconds)
    engines.append(rate())
    port, long = free_port(), rate(LONG)
    found["long texts"] = measure("long texts", ours(model, "--max-batch", n, port=port), port, body | dict(max_tokens=LONG), n, short)
    against("long texts", found, long["chars_per_second"])
    found["engine, long texts"] = dict(streams=n, **long)
    port = free_port()
    found["one by one"] = measure("one by one", ours(model, "--max-batch", n, port=port), port, body | dict(chunk_chars=1), n, short)
    engines.append(rate())
    port = free_port()
    few = ours(model, "--max-batch", n // 2, "--max-queue", n // 4, port=port)
    found["overload"] = measure("overload", few, port, body, n, short)
    medians = {k: statistics.median(e[k] for e in engines) for k in engines[0]}
    found["engine"] = dict(streams=n, **medians, runs=engines)
    for name in "server", "one by one": against(name, found, medians["chars_per_second"])
    if args.peers: found |= peers(args, folder, body, short)
    return found


def peers(args, folder, body, seconds):
    "The same for `transformers serve` and the server of llama-cpp-python."
    found, work = {}, Path(folder).parent
    convert(folder, work / "hf", "hf")
    convert(folder, work / "small.gguf", "gguf")
    port, chat = free_port(), {k: v for k, v in body.items() if k != "prompt"} | dict(messages=[dict(role="user", content=PROMPT)])
    hf = [Path(args.peers).with_name("transformers"), "serve", work / "hf", "--port", port, "--host", "127.0.0.1", "--device", "cpu"]
    if not hf[0].exists(): hf[:1] = [args.peers, "-m", "transformers.cli.transformers"]
    for batching in [], ["--continuous-batching"]:
        name = " ".join(["transformers serve", *batching])
        try: found[name] = measure(name, [*hf, *batching], port, chat | dict(model=str(work / "hf")), args.streams, seconds)
        except SystemExit as e: found[name] = dict(failed=str(e))
    port = free_port()
    llama = [args.peers, "-m", "llama_cpp.server", "--model", work / "small.gguf", "--port", port, "--n_threads", "1",
             "--interrupt_requests", "False"]
    try: found["llama_cpp.server"] = measure("llama_cpp.server", llama, port, body, args.streams, seconds)
    except SystemExit as e: found["llama_cpp.server"] = dict(failed=str(e))
    return found


# Many short requests: is anything left behind?

def resident(process):
    return round(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024, 1)


async def short_request(port, i, random_):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head(dict(prompt=PROMPT, max_tokens=random_.randint(1, 20), stream=i % 2 == 0, n=1 + i % 2)))
    try:
        if i % 5 == 0: await reader.read(100)   # leaves in the middle
        elif i % 7: return (await answer(reader, lambda n: None))[0]
    finally: writer.close()                     # a seventh leave without reading anything
    return "left"


async def storm(port, first, n, together):
    random_, gate, seen = random.Random(first), asyncio.Semaphore(together), Counter()
    async def one(i):
        async with gate: seen[await short_request(port, i, random_)] += 1
    await asyncio.gather(*[one(first + i) for i in range(n)])
    return seen


def memory(args, folder):
    "Resident memory of the server after each tenth of the requests, and what it still holds."
    port, levels, seen = free_port(), [], Counter()
    with running(ours(folder, port=port), port) as process:
        for part in range(10):
            seen += asyncio.run(storm(port, part * args.requests // 10, args.requests // 10, 32))
            levels.append(resident(process))
            print(levels[-1], "MiB", dict(seen), flush=True)
        figures = asyncio.run(ask(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"))[2].decode()
    held = float(re.search(r"(?m)^microjulia_texts\{.*\} (\S+)", figures)[1])
    return dict(requests=args.requests, answers={str(k): v for k, v in seen.items()}, resident_mib=levels, texts_held=held,
                growth_of_second_half_mib=round(levels[-1] - levels[4], 1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="checkpoint folder (default: a small model with random weights)")
    p.add_argument("--streams", type=int, default=128)
    p.add_argument("--seconds", type=int, default=60)
    p.add_argument("--requests", type=int, help="count the memory after so many short requests instead")
    p.add_argument("--peers", help="Python with transformers[serving] and llama-cpp-python[server]")
    p.add_argument("--save", type=Path)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = args.model or Path(work) / "small"
        if not args.model:
            torch.manual_seed(0)
            save_checkpoint(folder, GPT(config_for("gpt2", "small", vocab_size=28)), CharTokenizer(), step=0)
        config = load(folder, "cpu").model.config
        length = min(200, config.block_size - len(PROMPT) - 1)
        found = memory(args, folder) if args.requests else compare(args, folder, length)
    figures = dict(machine(), load_average=os.getloadavg(), model=config.to_dict(), new_characters=length, results=found)
    if args.save: save(args.save, figures)
    else: print(json.dumps(figures, indent=1))


if __name__ == "__main__": main()
