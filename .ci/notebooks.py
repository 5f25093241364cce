"""Run notebooks from a fresh kernel as `nbdev_test` does, and store or compare their outputs.

    python .ci/notebooks.py nbs/00_tokenizer.ipynb ...   # run and store the outputs
    python .ci/notebooks.py --check                      # run all, compare the text outputs
    python .ci/notebooks.py --dry                        # run all, only to see that they run

Cells that `nbdev_test` leaves out (`#| eval: false`, `#| gpu`, `#| slow`) keep what they have; those with
widgets are run by `--dry`, for they must work with both lines of ipywidgets.
"""
import argparse, os, re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SKIP = re.compile(r"^#\|\s*(eval:\s*false|gpu|slow)\b", re.M)
VOLATILE = re.compile(r"^#\s*volatile|\bminutes=", re.M)  # how far a run gets in a given time depends on the machine


class Client(NotebookClient):
    "A client that leaves the skipped cells as they are."
    widgets = False  # run the cells that make widgets

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        wanted = self.widgets and "widgets." in cell.source
        if cell.cell_type == "code" and SKIP.search(cell.source) and not wanted: return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def notebooks():
    "Every notebook of the site, in order."
    return [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(s[0] in "_." for s in p.relative_to(ROOT).parts)]


def texts(nb):
    "The text outputs of each code cell that repeats, by cell id."
    out = {}
    for c in nb.cells:
        if c.cell_type != "code" or SKIP.search(c.source) or VOLATILE.search(c.source): continue
        parts = [o.get("text", "") if o.output_type == "stream" else "".join(o.get("data", {}).get("text/plain", ""))
                 for o in c.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        out[c.id] = re.sub(r" at 0x[0-9a-f]+", "", "".join(parts)).strip()
    return out


def merge_streams(nb):
    "Join neighbouring pieces of one stream, and keep no progress bars nor widgets, which need a live kernel."
    for c in nb.cells:
        if c.cell_type != "code": continue
        kept = []
        for o in c.outputs:
            if o.output_type == "stream" and o.name == "stderr": continue
            if "application/vnd.jupyter.widget-view+json" in o.get("data", {}): continue
            if kept and o.output_type == "stream" == kept[-1].output_type: kept[-1].text += o.text
            else: kept.append(o)
        c.outputs = kept
    return nb


PEAK = "import resource, sys; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))"


def run(path, widgets=False):
    "The notebook at `path`, executed, and the most memory it took, bytes."
    nb = nbformat.read(path, as_version=4)
    kernel = nb.metadata.get("kernelspec", {}).get("name", "python3")
    nb.cells.append(nbformat.v4.new_code_cell(PEAK))
    client = Client(nb, timeout=600, kernel_name=kernel, store_widget_state=widgets, resources={"metadata": {"path": str(path.parent)}})
    client.widgets = widgets
    client.execute()
    return merge_streams(nb), int(nb.cells.pop().outputs[0].text)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="*", type=Path)
    p.add_argument("--check", action="store_true", help="compare with the stored text outputs, change nothing")
    p.add_argument("--dry", action="store_true", help="only run them, change nothing")
    args = p.parse_args()
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    bad = 0
    for path in [q.resolve() for q in args.paths] or notebooks():
        start, before = time.perf_counter(), texts(nbformat.read(path, as_version=4))
        nb, peak = run(path, widgets=args.dry)
        print(f"{path.relative_to(ROOT)}  {time.perf_counter() - start:.1f} s  {peak / 1e9:.1f} GB", flush=True)
        if not (args.check or args.dry): nbformat.write(nb, path)
        for id, new in texts(nb).items():
            if args.check and new != before.get(id, ""):
                bad += 1
                print(f"  cell {id}: stored\n    {before.get(id, '')!r}\n  now\n    {new!r}")
    return bool(bad)


if __name__ == "__main__": sys.exit(main())
