"The command as a user runs it: the installed console script, its output, and what it does with bad input."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import microjulia
from microjulia.cli import main

SCRIPT = Path(sys.executable).with_name("microjulia" + (".exe" if os.name == "nt" else ""))
TINY = "--n-layer 1 --n-embd 32 --n-head 2 --block-size 32 --device cpu".split()
TEXT = "The city is a ship, and the pilot must know the stars. Who knows them? He that has looked. " * 200
VERBS = "demo", "train", "generate", "chat", "score", "info", "convert", "corpus", "serve", "space"


def run(*argv, cwd=None, **kw):
    "The finished process of `microjulia ARGV...`."
    return subprocess.run([SCRIPT, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=300, encoding="utf-8",
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}, **kw)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with a text `plato.txt`, files that are not texts, and a model `m` of the text."
    d = tmp_path_factory.mktemp("desk")
    (d / "plato.txt").write_text(TEXT, encoding="utf-8")
    (d / "empty.txt").write_text("")
    (d / "blank.txt").write_text(" \n\n ")
    (d / "picture.txt").write_bytes(bytes(range(256)) * 9)
    (d / "short.txt").write_text("too short")
    (d / "nothing").mkdir()
    (d / "digits.txt").write_text("12345 67890 " * 500)
    done = run("train", "plato.txt", "--out", "m", "--steps", 120, *TINY, cwd=d)
    assert done.returncode == 0, done.stderr
    (d / "pickled").mkdir()
    (d / "pickled" / "model.pt").write_bytes(b"\x80\x04.")
    for name in ("cut", "foreign", "newer"): shutil.copytree(checkpoint(d), d / name)
    weights = d / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    (d / "foreign" / "model.safetensors").write_bytes(b"\x80\x04.")
    for name in ("config.json", "manifest.json"):
        file = d / "newer" / name
        file.write_text(re.sub(r'"format_version": \d+', '"format_version": 99', file.read_text()))
    return d


def checkpoint(desk): return sorted((desk / "m" / "checkpoints").iterdir())[-1]


BAD = [
    ("", "a verb is needed"), ("dance", "invalid choice: 'dance'"), ("train", "train needs text files"),
    ("train nowhere.txt", "nowhere.txt"), ("train empty.txt", "empty.txt"), ("train blank.txt", "blank.txt"),
    ("train picture.txt", "binary"), ("train short.txt", "at least 129"), ("train nothing", "nothing"),
    ("train *.nope", "nope"), ("train plato.txt --size huge", "known: small, medium, large"),
    ("train plato.txt --arch lstm", "lstm"), ("train plato.txt --n-embd 30 --n-head 4", "not divisible by n_head"),
    ("train plato.txt --steps 5 --minutes 1", "give one length"), ("train plato.txt --steps few", "invalid int"),
    ("train plato.txt --steps 0", "above 0"), ("train plato.txt --recipe secret", "known: default, card"),
    ("train plato.txt --out m", "not empty"), ("train plato.txt --out plato.txt", "is a file"),
    ("train plato.txt --init-from m --alphabet abcX", "lacks 'X'"), ("train plato.txt --init-from m --n-embd 64", "own shape"),
    ("train plato.txt --init-from nowhere", "nowhere"), ("train plato.txt --device tpu9", "tpu9"),
    ("generate virtue --model nowhere", "nowhere"),
    ("generate virtue --model plato.txt", "plato.txt"), ("generate virtue --model nothing", "nothing"),
    ("generate virtue --model pickled", "pickle"), ("generate virtue --model foreign", "foreign"),
    ("generate virtue --model cut", "cut"), ("generate virtue --model newer", "99"),
    ("generate 42 --model m", "nothing is left of the prompt"), ("generate virtue --model m --temperature -1", "temperature"),
    ("generate virtue --model m --top-p 2", "top_p"), ("generate virtue --model m --until noon", "sentence"),
    ("generate virtue --model m --frequency x", "unrecognized arguments"),
    ("chat --model nowhere", "nowhere"), ("score nowhere.txt --model m", "nowhere.txt"),
    ("info", "info takes a folder"), ("info m --arch gpt2", "info takes a folder"), ("info --arch gpt2 --size huge", "huge"),
    ("convert m m --to hf", "already there"), ("convert nowhere x", "nowhere"), ("convert plato.txt x", "plato.txt"),
    ("corpus shred plato.txt --out o", "shred"), ("corpus clean plato.txt", "--out"), ("corpus list nobody", "nobody"),
    ("corpus get --mirror https://www.gutenberg.org", "gutenberg.org"),
    ("corpus list --hub x", "no option --hub"), ("corpus stats plato.txt --out o", "no option --out"), ("corpus build plato.txt", "--out"),
    ("corpus get plato --hub x", "no names"), ("corpus build empty.txt --out o", "empty.txt"), ("corpus stats empty.txt", "empty.txt"),
    ("train plato.txt --held-out ion", "'ion'"), ("corpus clean plato.txt --out m", "not empty"), ("corpus clean empty.txt --out o", "empty.txt"),
]


@pytest.mark.parametrize("line, says", BAD, ids=[b[0] or "nothing" for b in BAD])
def test_bad_input_is_one_line_and_status_2(desk, line, says, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    before = sorted(p.name for p in desk.iterdir())
    try: status = main(line.split())
    except SystemExit as stop: status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and err.startswith("microjulia: ") and err.count("\n") == 1, err
    assert says in err
    assert sorted(p.name for p in desk.iterdir()) == before, "something was left behind"


def test_the_script_itself_shows_no_traceback(desk):
    done = run("train", "picture.txt", cwd=desk)
    assert done.returncode == 2 and done.stderr == "microjulia: error: picture.txt is not text but binary data\n"


def test_version_and_help():
    assert run("--version").stdout.strip() == f"microjulia {microjulia.__version__}"
    text = run("--help").stdout
    for verb in VERBS: assert re.search(rf"^ +{verb} ", text, re.M)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_every_option(verb):
    done = run(verb, "--help")
    assert done.returncode == 0
    for option in re.findall(r"^  (?:-h, )?(--[\w-]+)(.*)", done.stdout, re.M): assert option[0]
    body = done.stdout.split("options:")[1]
    entries = re.split(r"\n  (?=-)", body)[1:]
    assert all(len(e.split()) > 2 for e in entries), entries
    if verb == "generate": assert "(default: 0.8)" in done.stdout and "(default: 200)" in done.stdout


def test_same_options_have_same_names_everywhere():
    names = {v: set(re.findall(r"--[\w-]+", run(v, "--help").stdout)) for v in VERBS}
    assert {"--model", "--seed", "--temperature"} <= names["generate"] & names["chat"]
    assert "--json" in names["generate"] & names["score"] & names["info"]
    assert "--out" in names["train"] & names["demo"] & names["corpus"]


def test_help_needs_no_torch():
    code = ("import sys, microjulia.cli as c\n"
            "try: c.main(['train', '--help'])\nexcept SystemExit: pass\n"
            "sys.exit(bool({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_seeded_text_is_the_same_in_every_process_and_form(desk):
    options = "generate", "The city", "--model", "m", "--temperature", 2, "--max-new-tokens", 80, "--seed", 7
    streamed = run(*options, cwd=desk).stdout.rstrip("\n")
    whole = json.loads(run(*options, "--json", cwd=desk).stdout)
    assert streamed == whole["prompt"] + whole["text"] and len(whole["text"]) == 80
    assert run(*options, cwd=desk).stdout.rstrip("\n") == streamed
    assert run(*options[:-1], 8, cwd=desk).stdout.rstrip("\n") != streamed
    assert microjulia.load(desk / "m", "cpu").generate("The city", temperature=2, seed=7, max_new_tokens=80) == whole["text"]


def test_philosophy_without_a_model_of_ones_own(tmp_path):
    nowhere = os.environ | {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([SCRIPT, "generate", "Virtue is", "--seed", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=50, env=nowhere)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("virtue is ") and len(done.stdout) == 210
    brought = [p for p in tmp_path.rglob("*") if p.suffix in (".safetensors", ".txt")]
    assert not brought                                                    # libraries may keep caches, but no weights or books came


def test_until_sentence(desk):
    done = json.loads(run("generate", "the city", "--model", "m", "--seed", 1, "--until", "sentence", "--min-new-tokens", 30,
                          "--json", cwd=desk).stdout)
    assert done["text"].endswith(".") and done["finish_reason"] == "stop" and len(done["text"]) >= 30
    assert "." not in done["text"][29:-1]


def test_score_in_total_and_by_file(desk):
    (desk / "other.txt").write_text("The stars are the pilot of the city.")
    out = json.loads(run("score", "plato.txt", "other.txt", "--model", "m", "--json", cwd=desk).stdout)
    files = out.pop("files")
    assert set(files) == {"plato.txt", "other.txt"} and set(out) == {"characters", "nats_per_char", "bits_per_char"}
    assert out["characters"] == sum(f["characters"] for f in files.values())
    total = sum(f["characters"] * f["nats_per_char"] for f in files.values())
    assert out["nats_per_char"] == pytest.approx(total / out["characters"])
    assert out["bits_per_char"] == pytest.approx(out["nats_per_char"] / 0.6931471805599453)
    (desk / "other.txt").unlink()


def test_info_of_a_run_and_of_a_size(desk):
    run_info = json.loads(run("info", "m", "--json", cwd=desk).stdout)
    assert run_info["arch"] == "gpt2" and run_info["hyperparams"]["n_embd"] == 32
    small = json.loads(run("info", "--arch", "gpt2", "--size", "small", "--vocab-size", 28, "--json").stdout)
    assert small["parameters"] == 418_048 == sum(s["parameters"] for s in small["shapes"])
    assert "418,048" in run("info", "--arch", "gpt2").stdout


def test_convert_there_and_back(desk, tmp_path):
    assert run("convert", desk / "m", tmp_path / "hf", "--to", "hf").returncode == 0
    done = run("convert", tmp_path / "hf", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert json.loads(run("info", tmp_path / "hf", "--json").stdout)["kind"] == "hf"
    options = dict(seed=1, max_new_tokens=30)
    assert microjulia.load(tmp_path / "back", "cpu").generate("the city", **options) == microjulia.load(desk / "m", "cpu").generate(
        "the city", **options)


def test_chat_reads_lines(desk):
    done = run("chat", "--model", "m", "--max-new-tokens", 20, "--seed", 1, cwd=desk, input="the city\n42\nthe pilot\n\nnot read\n")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert "nothing is left" in done.stderr and "not taught to converse" in done.stderr


def test_corpus_list():
    lines = run("corpus", "list").stdout.splitlines()
    assert len(lines) >= 45 and len(run("corpus", "list", "plato").stdout.splitlines()) < len(lines)


def test_corpus_clean(desk, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text("Of the\nSoul.[12]\n\nIt _is_ one.\n")
    done = run("corpus", "clean", "a", "b", "--out", "clean", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    texts = {p.name: p.read_text() for p in (tmp_path / "clean").iterdir()}
    assert texts == {"a-book.txt": "Of the Soul.\n\nIt is one.\n", "b-book.txt": "Of the Soul.\n\nIt is one.\n"}
    run("corpus", "clean", "a", "--out", "small", "--alphabet", "default", cwd=tmp_path)
    assert (tmp_path / "small" / "book.txt").read_text() == "of the soul. it is one.\n"


def test_corpus_build_and_stats(desk, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2): (tmp_path / f"book{i}.txt").write_text(TEXT + f"The {i} th.[{i}]\n")
    assert main(["corpus", "build", "book0.txt", "book1.txt", "--out", "built", "--alphabet", "default"]) == 0
    assert sorted(p.name for p in (tmp_path / "built").iterdir()) == ["README.md", "book0.txt", "book1.txt"]
    card = (tmp_path / "built" / "README.md").read_text()
    assert "| works | 2 |" in card and "| book0 | 18,007 |" in card
    capsys.readouterr()
    assert main(["corpus", "stats", "built/book0.txt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["characters"] == len((tmp_path / "built" / "book0.txt").read_text().rstrip("\n"))
    assert len(found["entropy_bits"]) == 5 and found["longest_repeat"]["characters"] > 20


def test_dropped_characters_are_a_warning_that_names_the_remedy(desk):
    (desk / "code.txt").write_text("{[()]};:<>=+-*/" * 200 + TEXT)
    done = run("train", "code.txt", "--out", "warned", "--steps", 1, *TINY, cwd=desk)
    assert done.returncode == 0 and "--alphabet auto" in done.stderr
    learnt = run("train", "code.txt", "--out", "learnt", "--steps", 1, "--alphabet", "auto", *TINY, cwd=desk)
    assert learnt.returncode == 0 and "--alphabet auto" not in learnt.stderr
    assert json.loads(run("info", "learnt", "--json", cwd=desk).stdout)["hyperparams"]["vocab_size"] > 28
    for name in ("code.txt", "warned", "learnt"): shutil.rmtree(desk / name) if (desk / name).is_dir() else (desk / name).unlink()


def test_fine_tuning_starts_from_the_weights(desk, tmp_path):
    done = run("train", desk / "plato.txt", "--out", tmp_path / "tuned", "--init-from", desk / "m", "--steps", 5, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    records = map(json.loads, (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines())
    assert next(r for r in records if r["kind"] == "eval")["bits_per_char"] < 3        # a fresh model has 4.8


def test_a_train_without_out_takes_the_next_free_name(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    for name in ("run", "run-2"):
        assert run("train", "t.txt", "--steps", 1, *TINY, cwd=tmp_path).returncode == 0
        assert (tmp_path / name / "checkpoints").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind do not exist on Windows")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_saved_and_resumes(desk, tmp_path, signum):
    argv = [SCRIPT, "train", desk / "plato.txt", "--out", tmp_path / "r", "--steps", "100000", *TINY]
    p = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in iter(lambda: p.stderr.read(1), b""):            # the bar shows a step as soon as one is logged
        if line == b"/": break
    p.send_signal(signum)
    err = p.communicate(timeout=60)[1].decode()
    assert p.returncode == 128 + signum and "saved" in err and "Traceback" not in err
    saved = sorted((tmp_path / "r" / "checkpoints").iterdir())[-1]
    again = run("train", desk / "plato.txt", "--out", tmp_path / "r", "--steps", int(saved.name[5:]) + 3, "--resume", *TINY)
    assert again.returncode == 0, again.stderr


def test_a_closed_pipe_is_no_error(desk):
    p = subprocess.Popen([SCRIPT, "generate", "the city", "--model", "m", "--max-new-tokens", "3000"], cwd=desk,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.read(10)
    p.stdout.close()
    assert p.stderr.read() == b"" and p.wait(60) == 0


@pytest.mark.skipif(os.name == "nt", reason="file size limits of this kind do not exist on Windows")
def test_no_room_on_the_disk(desk, tmp_path):
    import resource
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = run("train", desk / "plato.txt", "--out", tmp_path / "full", "--steps", 3, *TINY, preexec_fn=limit)
    assert done.returncode == 2 and re.search("disk|space", done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "microjulia", "--version"], capture_output=True, text=True)
    assert done.stdout == run("--version").stdout
