"""What a checkpoint costs a run: written at once, or in a thread while training goes on.

    python bench/saving.py                      # on the fastest device; on a CPU about a minute
"""
import argparse
import tempfile
import time
from pathlib import Path

from common import machine, save, spread

from microjulia.corpus import Corpus
from microjulia.gpt import GPT, config_for
from microjulia.scaling.durable import Writer
from microjulia.training import TrainConfig, Trainer, get_device

WAYS = {"at once": False, "in a thread": True}


def trainer(size, out, device):
    "A trainer of one size after its first step, so that the optimiser has its memory."
    config = config_for("gpt2", size)
    t = Trainer(GPT(config), Corpus.from_paths(), TrainConfig(steps=1000, batch_size=16, keep=1), Path(out), device=device)
    t.train_step()
    return t


def saves(t, rounds):
    "Seconds that a save takes from the run, and until it is on the disk, by way."
    seen, done = {w: [] for w in WAYS}, {w: [] for w in WAYS}
    for _ in range(rounds):
        for way, background in WAYS.items():
            t.writer, t.step, start = Writer(background), t.step + 1, time.perf_counter()
            t.save()
            seen[way].append(1e3 * (time.perf_counter() - start))
            t.writer.wait()
            done[way].append(1e3 * (time.perf_counter() - start))
    return seen, done


def steps(t, rounds, n):
    "Seconds of `n` steps with a save in the middle, by way."
    seconds = {w: [] for w in WAYS}
    for _ in range(rounds):
        for way, background in WAYS.items():
            t.writer, start = Writer(background), time.perf_counter()
            for i in range(n):
                if i == n // 2: t.save()
                float(t.train_step()[0])
            t.writer.wait()
            seconds[way].append(time.perf_counter() - start)
    return seconds


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", help="cpu, cuda (default: the fastest)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "saving.json")
    args = p.parse_args()
    device, figures = get_device(args.device), {}
    for size, n in (("small", 40), ("large", 4)):
        with tempfile.TemporaryDirectory() as out:
            t = trainer(size, out, device)
            (seen, done), total = saves(t, args.rounds), steps(t, 3, n)
            data = sum(f.stat().st_size for f in next((Path(out) / "checkpoints").iterdir()).rglob("*"))
        figures[size] = dict(parameters=t.model.num_params(), megabytes=round(data / 1e6, 1), steps=n,
                             stall_ms={w: spread(v) for w, v in seen.items()}, written_ms={w: spread(v) for w, v in done.items()},
                             steps_s={w: spread(v, 2) for w, v in total.items()},
                             thread_saves=spread([100 * (1 - b / a) for a, b in zip(total["at once"], total["in a thread"])]))
    save(args.out, dict(machine(device), **figures))


if __name__ == "__main__": main()
