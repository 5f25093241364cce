"""Time and memory of one mixing layer against the context: Monarch matrices and attention.

    python bench/monarch.py                     # the figures in bench/results/monarch.json

One layer of 256 channels, one text, one thread, float32. Monarch is the whole mixer with convolution and gate; "realised"
makes the masked matrices as the original did; attention is PyTorch's fused kernel, with and without the two Dense layers
around it. Every case runs in a process of its own: times are processor time, the median of several passes; memory is the
peak above what was there before the pass. "step" is one further token, the mean over the last `p` positions of the context.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import machine, peak, save

C, HEADS, CONTEXTS = 256, {"Monarch": 8, "attention": 4}, (16, 64, 256, 1024, 4096, 16384)
NAMES = "Monarch", "Monarch, realised", "attention", "attention, bare"
REALISED_LIMIT = 4096  # at 16,384 the matrices alone would take 8.6 GB


def median_ms(f, seconds=1.0, most=50):
    "Milliseconds of processor time, the median of passes for about `seconds`."
    times = []
    while len(times) < most and (len(times) < 3 or sum(times) < seconds) and (not times or sum(times) < 8):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def case(kind, name, T):
    "One measurement: milliseconds and megabytes."
    import torch
    from torch.nn import functional as F

    from microjulia.family.monarch import History, MonarchMixer
    torch.set_num_threads(1)
    torch.manual_seed(1337)
    u, p, nh = torch.randn(1, T, C), math.isqrt(T), HEADS["attention"]

    def split(x): return x.view(1, -1, nh, C // nh).transpose(1, 2)

    if name.startswith("Monarch"):
        mixer = MonarchMixer(C, HEADS["Monarch"], T)
        cache = History(torch.zeros(1, T, C), mixer.monarch.new_history(1, C))
        def realised():
            x = u.view(T, HEADS["Monarch"], -1).transpose(0, 1)                              # (nh, T, C / nh)
            y = (mixer.monarch.matrix() @ x).transpose(0, 1).reshape(1, T, C)
            return mixer.gate.sigmoid() * (mixer.conv(u) + y)
        forward = realised if "realised" in name else lambda: mixer(u)
        def step(t): return mixer(u[:, t:t + 1], cache, t)
        weights = list(mixer.parameters())
    else:
        qkv, proj = torch.nn.Linear(C, 3 * C, bias=False), torch.nn.Linear(C, C, bias=False)
        q, k, v = torch.randn(3, 1, nh, T, C // nh)
        bare = "bare" in name
        if bare: q, k, v = (x.requires_grad_() for x in (q, k, v))
        def forward():
            a, b, c = (q, k, v) if bare else map(split, qkv(u).split(C, 2))
            y = F.scaled_dot_product_attention(a, b, c, is_causal=True).transpose(1, 2).reshape(1, -1, C)
            return y if bare else proj(y)
        def step(t):
            now = slice(t, t + 1)
            a, b, c = (x[:, :, now] for x in (q, k, v)) if bare else map(split, qkv(u[:, now]).split(C, 2))
            k[:, :, now], v[:, :, now] = b, c
            y = F.scaled_dot_product_attention(a, k[:, :, :t + 1], v[:, :, :t + 1]).transpose(1, 2).reshape(1, -1, C)
            return y if bare else proj(y)
        weights = [q, k, v] if bare else [*qkv.parameters(), *proj.parameters()]

    if kind == "training":
        def run():
            torch.autograd.grad(forward().sum(), weights)
        if T <= 1024: run()
    else:
        plain = forward
        def run():
            with torch.no_grad(): plain() if kind == "forward" else [step(t) for t in range(T - p, T)]
        if kind == "step" and name.startswith("Monarch"):
            with torch.no_grad(): mixer(u[:, :T - p], cache, 0)
        if T <= 1024: run()
    mb = peak(run)
    ms = median_ms(run) / (p if kind == "step" else 1)
    return {"ms": float(f"{ms:.3g}"), "mb": round(max(mb, 0), 1)}


def slope(cases, above=256):
    "How the time grows: the exponent of T between `above` and the longest context."
    times = {int(T): c["ms"] for T, c in cases.items()}
    last = max(times)
    return round(math.log(times[last] / times[above]) / math.log(last / above), 2)


def crossover(ours, theirs):
    "The shortest measured context from which on `ours` is faster, or None."
    both = [T for T in ours if T in theirs]
    faster = [T for i, T in enumerate(both) if all(ours[S]["ms"] < theirs[S]["ms"] for S in both[i:])]
    return int(faster[0]) if faster else None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "monarch.json")
    p.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.case:
        print(json.dumps(case(args.case[0], args.case[1], int(args.case[2]))))
        return

    def measure(kind, name, T):
        done = subprocess.run([sys.executable, __file__, "--case", kind, name, str(T)], check=True, text=True,
                              stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(done.stdout)

    result = {"what": f"one layer, {C} channels, one text, one thread, float32: milliseconds of processor time, peak MB"}
    for kind in ("forward", "training", "step"):
        names = [n for n in NAMES if not (kind == "step" and ("realised" in n or "bare" in n))]
        result[kind] = {n: {str(T): measure(kind, n, T) for T in args.contexts
                            if not ("realised" in n and T > REALISED_LIMIT) and not (kind != "forward" and T < 256)}
                        for n in names}
        print(kind, json.dumps(result[kind]), flush=True)
    forward = result["forward"]
    result["crossover"] = {n: crossover(forward["Monarch"], forward[n]) for n in NAMES[1:]}
    result["crossover_step"] = crossover(result["step"]["Monarch"], result["step"]["attention"])
    result["slope"] = {n: slope(forward[n]) for n in NAMES}
    save(args.out, result | machine() | {"threads": 1})


if __name__ == "__main__": main()
