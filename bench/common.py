"What the benches share: where a figure was measured, how it spread, and how it is kept."
import json
import os
import platform
import statistics
import sys
from pathlib import Path


def cpu():
    "The name of the processor."
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device=None):
    "Command, processor or graphics card, cores and versions of a run."
    import torch
    on = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else cpu()
    argv = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    return dict(command=" ".join(["python", f"bench/{Path(sys.argv[0]).name}", *argv]), machine=on, cores=os.cpu_count(),
                threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__)


def spread(values, digits=1):
    "Median, quartiles and range."
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return dict(median=round(median, digits), quartiles=[round(low, digits), round(high, digits)],
                range=[round(min(values), digits), round(max(values), digits)])


def peak(f):
    "Megabytes that `f()` takes at its peak, above what is there before."
    def read(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
    before = read("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    f()
    return (read("VmHWM") - before) / 1024


def save(path, figures, show=True):
    "Write `figures` as JSON, whole or not at all, and print them."
    path, text = Path(path), json.dumps(figures, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
    if show: print(text)
