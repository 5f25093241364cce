"""Does training survive what happens to it? Kills, full disks, damaged files, signals, bad numbers, hostile folders.

    python bench/faults.py                      # the whole table, about half an hour of a quiet core
    python bench/faults.py --only F1 F7         # some of its rows, the others kept as they stand in the results
    python bench/faults.py --runs 3             # few of each

The faults are those of tests/fault_runs.py; F9 and F10, of several processes, are those of tests/distributed_runs.py.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from common import machine

import fault_runs

FULL = dict(F1=100, F2=3, F3=10, F4=50, F5=200, F6=20, F7=50, F8=12, F8c=4, F9=8, F10=10, F11=12, F12=40, F13=3, F14=3, F15=5)


def layouts(n, work):
    "F9: other layouts of processes, and changes between them half way."
    import distributed_runs
    got = {k: v for k, v in distributed_runs.layouts(work).items() if isinstance(v, dict)}
    near = [v["difference"] <= (1e-2 if k in distributed_runs.KINDS else 1e-6) for k, v in got.items()]
    return dict(what="one process and two, DDP and FSDP2, and changes between them: losses equal within 1e-6 (Muon, bfloat16: 1e-2)",
                runs=len(near), recovered=sum(near))


def workers(n, work):
    "F10: a worker killed under `torchrun --max-restarts`."
    import distributed_runs
    got = [distributed_runs.killed_worker(work / str(i)) for i in range(n)]
    fine = [g["status"] == 0 and g["finished"] and g["steps_lost"] <= g["interval"] for g in got]
    return dict(what="a worker killed under torchrun --max-restarts: the run goes on, an interval lost at most", runs=n,
                detected=n, recovered=sum(fine), longest_s=round(max(g["restart_s"] for g in got), 1))


def row(name, n):
    "One row of the table."
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        other = dict(F9=layouts, F10=workers).get(name)
        found = dict(fault=name) | other(n, Path(work)) if other else fault_runs.tally(name, n, Path(work))
    return found | dict(took_s=round(time.monotonic() - start))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--only", nargs="+", choices=FULL, default=list(FULL), help="rows to make anew")
    p.add_argument("--runs", type=int, help="of each, in place of the full counts")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    args = p.parse_args()
    torch.set_num_threads(1)
    fine = True
    for name in args.only:
        r = row(name, min(args.runs or FULL[name], FULL[name]))
        fine &= r["recovered"] == r["runs"] == r.get("detected", r["runs"])
        print(f"{name:4} {r['recovered']:>4} of {r['runs']:>4} recovered, {r.get('detected', '-'):>4} detected  {r['what']}", flush=True)
        rows = {r["fault"]: r for r in json.loads(args.out.read_text())["rows"]} if args.out.exists() else {}
        rows[name] = r
        args.out.write_text(json.dumps(dict(machine(), command="python bench/faults.py", rows=[rows[k] for k in FULL if k in rows]), indent=1) + "\n")
    return 0 if fine else 1


if __name__ == "__main__": sys.exit(main())
