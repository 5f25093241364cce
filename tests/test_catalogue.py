"The catalogue against the raw books, and the download against a server on this machine."
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from microjulia.corpus import Corpus, decode_bytes, fingerprints, read_work, shipped_paths
from microjulia.exchange import catalogue as cat
from microjulia.exchange.catalogue import (Book, DownloadError, Mirror, catalogue, compare_text, describe, fetch_books,
                                           fetch_dataset, find_books, layouts, make_catalogue, open_answer)
from microjulia.tokenizer import CharTokenizer

pytest.importorskip("pooch", reason="the extra [corpus] is not installed")
CORPUS = Path(__file__).resolve().parents[2] / "shared" / "corpus"
needs_raw = pytest.mark.skipif(not CORPUS.exists(), reason="the raw books are not here")

TEXTS = [read_work(p) for p in shipped_paths()[:3]]
HTML = b"<!DOCTYPE html>\n<html><body>Project Gutenberg: please prove that you are human</body></html>"


def dress(text):
    "A file as the archive makes it."
    return (f"The Project Gutenberg eBook of A Title\r\n\r\n*** START OF THE PROJECT GUTENBERG EBOOK A TITLE ***\r\n\r\n{text}"
            "\r\n\r\n*** END OF THE PROJECT GUTENBERG EBOOK A TITLE ***\r\n\r\nlicence").encode()


def toy(i, text): return Book(f"book_{i}", "Someone", f"Title {i}", None, "1900", 1490 + i, "public domain", **describe(text))


BOOKS = [toy(i, text) for i, text in enumerate(TEXTS)]


class Archive:
    "A web server in a thread. `answers` has for each path what to send, in turn; the last one stays."
    def __init__(self):
        self.answers, self.asked, self.headers = {}, [], []
        archive = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.lstrip("/")
                archive.asked.append(path)
                archive.headers.append(self.headers)
                queue = archive.answers.get(path, [(404, HTML)])
                status, body, *more = queue.pop(0) if len(queue) > 1 else queue[0]
                headers = more[0] if more else {}
                self.send_response(status)
                self.send_header("Content-Length", headers.pop("Content-Length", str(len(body))))
                for k, v in headers.items(): self.send_header(k, v)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args): pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True)
        self.thread.start()

    def has(self, book, *answers, layout=0): self.answers[layouts(book.gutenberg)[layout]] = list(answers)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def archive(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MICROJULIA_MIRROR", raising=False)
    a = Archive()
    yield a
    a.close()


def mirror(archive, pauses=None, pause=0., **kw):
    return Mirror(archive.url, pause=pause, wait=(pauses if pauses is not None else []).append, **kw)


def files(folder): return sorted(p.name for p in folder.iterdir())


# %% the list

@needs_raw
def test_catalogue_is_what_the_raw_books_give():
    made = make_catalogue(CORPUS)
    assert len(made) == 46
    assert made == catalogue(), "the cleaning has changed: run the cell of 22_catalogue that writes the file"


@needs_raw
def test_a_raw_file_is_recognised():
    book, = find_books("plato crito")
    raw = (CORPUS / "raw" / "plato_crito_1657.txt").read_bytes()
    assert compare_text(book, open_answer(raw)) == "exactly as in the catalogue"
    assert book.characters == len(CharTokenizer().normalize(read_work(CORPUS / "raw" / "plato_crito_1657.txt")))
    other, = find_books("plato apology")
    with pytest.raises(ValueError, match="another text"): compare_text(other, open_answer(raw))


@needs_raw
def test_the_archives_other_prints_of_a_book_are_the_book():
    "The Meditations as the archive has them in three encodings, from three years."
    book, = find_books("marcus aurelius")
    for name in ("marcus_aurelius_meditations_2680.txt", "marcus_aurelius_meditations_2680-8.txt"):
        note = compare_text(book, open_answer((CORPUS / "edge" / name).read_bytes()))
        assert "newer edition" in note or "exactly" in note


@needs_raw
def test_sketches_tell_books_apart():
    prints = {b.name: fingerprints(read_work(next((CORPUS / "raw").glob(f"{b.name}_*.txt")))) for b in catalogue()}
    for b in catalogue():
        hits = {name: sum(f in p for f in b.sketch) for name, p in prints.items()}
        assert hits.pop(b.name) == len(b.sketch) == 12
        assert max(hits.values()) < 6, (b.name, hits)


def test_wishes():
    assert len(find_books()) == len(catalogue()) >= 45
    assert [b.author for b in find_books(["spinoza ethics", 1497])] == ["Benedict de Spinoza", "Plato"]
    for wish in ("nobody at all", 10**9, "", "²"):
        with pytest.raises(ValueError, match="no book of the catalogue"): find_books(wish)


@pytest.mark.parametrize("number,folder", [(1497, "1/4/9/1497"), (59, "5/59"), (216, "2/1/216"), (5, "0/5"),
                                           (42930, "4/2/9/3/42930")])
def test_layouts(number, folder):
    assert layouts(number) == [f"{folder}/{number}-0.txt", f"{folder}/{number}-8.txt", f"{folder}/{number}.txt",
                               f"cache/epub/{number}/pg{number}.txt"]


def test_a_table_row_is_short(): assert all(len(str(b)) < 90 and "\n" not in str(b) for b in catalogue())


# %% one book

def test_good_book(archive, tmp_path):
    archive.has(BOOKS[0], (200, dress(TEXTS[0])))
    lines = []
    path, = fetch_books(BOOKS[0], tmp_path / "new" / "folder", mirror(archive), say=lines.append)
    assert path.read_bytes() == dress(TEXTS[0])
    assert read_work(path) == TEXTS[0] and Corpus.from_paths([path]).works[0].name == "book_0"
    assert lines == [f"1/1 book_0: {BOOKS[0].characters:,} characters, exactly as in the catalogue"]
    agent = archive.headers[0]["User-Agent"]
    assert agent.startswith("microjulia/") and "https://github.com/microjulia/microjulia" in agent


def test_a_book_that_is_there_is_not_asked_for(archive, tmp_path):
    archive.has(BOOKS[0], (200, dress(TEXTS[0])))
    first = fetch_books(BOOKS[0], tmp_path, mirror(archive), say=None)
    archive.close()
    assert fetch_books(BOOKS[0], tmp_path, mirror(archive), say=None) == first
    assert fetch_books(BOOKS[0], tmp_path, say=None) == first
    assert len(archive.asked) == 1


def test_next_layout_after_404(archive, tmp_path):
    pauses = []
    archive.has(BOOKS[0], (200, dress(TEXTS[0])), layout=3)
    archive.has(BOOKS[1], (200, dress(TEXTS[1])), layout=3)
    fetch_books(BOOKS[:2], tmp_path, mirror(archive, pauses, pause=2.), say=None)
    assert archive.asked == [*layouts(1490), layouts(1491)[3]]  # what worked once is asked first
    assert pauses == [2.] * 5


def test_trouble_then_success(archive, tmp_path):
    pauses = []
    archive.has(BOOKS[0], (503, b"busy"), (429, b"slowly", {"Retry-After": "30"}), (500, b""), (200, dress(TEXTS[0])))
    fetch_books(BOOKS[0], tmp_path, mirror(archive, pauses, pause=2.), say=None)
    assert pauses == [2, 4, 30, 16] and archive.asked == [layouts(1490)[0]] * 4


def test_a_pause_of_none_for_a_server_at_home(archive, tmp_path):
    pauses = []
    archive.has(BOOKS[0], (503, b""), (200, dress(TEXTS[0])))
    fetch_books(BOOKS[0], tmp_path, mirror(archive, pauses), say=None)
    assert pauses == [0, 0]


def test_an_answer_that_breaks_off_is_asked_for_again(archive, tmp_path):
    data = dress(TEXTS[0])
    archive.has(BOOKS[0], (200, data[:3000], {"Content-Length": str(len(data))}), (200, data))
    path, = fetch_books(BOOKS[0], tmp_path, mirror(archive), say=None)
    assert path.read_bytes() == data and len(archive.asked) == 2


@pytest.mark.parametrize("body,why", [
    (HTML, "web page"), (b"\xef\xbb\xbf \n" + HTML, "web page"), (b"A poem.", "mark of Project Gutenberg"),
    (dress(TEXTS[0][:6000]), "instead of"), (dress(TEXTS[0])[:6000], "instead of"), (dress(TEXTS[0] * 2), "instead of"),
    (b"", "mark of Project Gutenberg"), (bytes(range(256)) * 50 + b"gutenberg", "binary"),
    (dress((TEXTS[1] * 2)[:len(TEXTS[0])]), "sentences differ"),
], ids=["html", "html with bom", "no marker", "short", "truncated", "long", "empty", "binary", "wrong book"])
def test_what_is_not_the_book(archive, tmp_path, body, why):
    archive.has(BOOKS[0], (200, body))
    with pytest.raises(DownloadError, match="1 of 1 books are missing") as e:
        fetch_books(BOOKS[0], tmp_path, mirror(archive), say=None)
    assert why in str(e.value) and files(tmp_path) == [] and e.value.missing == BOOKS[:1]


def test_html_under_one_layout_the_book_under_another(archive, tmp_path):
    archive.has(BOOKS[0], (200, HTML))
    archive.has(BOOKS[0], (200, dress(TEXTS[0])), layout=2)
    assert fetch_books(BOOKS[0], tmp_path, mirror(archive), say=None)[0].exists()


def test_a_newer_edition_is_taken_and_said(archive, tmp_path):
    newer = TEXTS[0].replace("'", "’").replace("--", "—").replace("virtue", "vertue", 3) + "\n\nA new last line."
    assert newer != TEXTS[0]
    archive.has(BOOKS[0], (200, b"\xef\xbb\xbf" + dress(newer)))
    lines = []
    path, = fetch_books(BOOKS[0], tmp_path, mirror(archive), say=lines.append)
    assert "newer edition" in lines[0] and read_work(path) == newer


@pytest.mark.parametrize("share,ok", [(.97, True), (.93, False)])
def test_five_in_a_hundred(share, ok):
    short = TEXTS[0][:int(share * len(TEXTS[0]))]
    if ok: assert "newer edition" in compare_text(BOOKS[0], short)
    else:
        with pytest.raises(ValueError, match="instead of"): compare_text(BOOKS[0], short)


def test_encodings_of_one_book():
    text = TEXTS[0] + "\n\nA naïve café."
    book = toy(5, text)
    for encoding in ("utf-8", "utf-8-sig", "cp1252"):
        assert compare_text(book, open_answer(decode_bytes(dress(text)).encode(encoding))).startswith("exactly")


# %% several books and mirrors

def test_it_goes_on_where_it_stopped(archive, tmp_path):
    for b, t in zip(BOOKS, TEXTS): archive.has(b, (200, dress(t)))
    archive.has(BOOKS[1], (404, b""))
    with pytest.raises(DownloadError, match=r"1 of 3 books are missing \(book_1\)") as e:
        fetch_books(BOOKS, tmp_path, mirror(archive), say=None)
    assert [p.name for p in e.value.paths] == files(tmp_path) == ["book_0.txt", "book_2.txt"]
    archive.has(BOOKS[1], (200, dress(TEXTS[1])))
    archive.asked.clear()
    paths = fetch_books(BOOKS, tmp_path, mirror(archive), say=None)
    assert archive.asked == [layouts(1491)[0]] and [p.name for p in paths] == ["book_0.txt", "book_1.txt", "book_2.txt"]


def test_interrupted_it_keeps_whole_books(archive, tmp_path):
    archive.has(BOOKS[0], (200, dress(TEXTS[0])))
    pauses = []
    def wait(seconds):
        pauses.append(seconds)
        if len(pauses) == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fetch_books(BOOKS, tmp_path, Mirror(archive.url, 0, wait=wait), say=None)
    assert files(tmp_path) == ["book_0.txt"]


def test_no_room_leaves_no_half_file(archive, tmp_path, monkeypatch):
    archive.has(BOOKS[0], (200, dress(TEXTS[0])))
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(cat.os, "replace", full)
    with pytest.raises(OSError, match="No space left"): fetch_books(BOOKS[0], tmp_path, mirror(archive), say=None)
    assert files(tmp_path) == []


def test_offline(archive, tmp_path):
    archive.close()
    pauses = []
    with pytest.raises(DownloadError) as e:
        fetch_books(BOOKS, tmp_path, mirror(archive, pauses, pause=2.), say=None)
    line = str(e.value)
    assert "\n" not in line and isinstance(e.value, OSError)
    for words in ("3 of 3 books are missing", "book_0, book_1, book_2", "cannot be reached", "MICROJULIA_MIRROR",
                  "a folder of texts", "ships with the package"): assert words in line
    assert pauses == [2, 4, 8, 16]  # and the other two books are not tried on a mirror that is not there
    assert e.value.missing == BOOKS and e.value.paths == []


@pytest.mark.parametrize("status", [401, 403, 451])
def test_a_refusal_is_taken_for_one(archive, tmp_path, status):
    for b in BOOKS: archive.has(b, (status, b"no"))
    with pytest.raises(DownloadError, match=f"status {status}"): fetch_books(BOOKS, tmp_path, mirror(archive), say=None)
    assert len(archive.asked) == 1


def test_a_mirror_of_web_pages_is_left_alone(archive, tmp_path):
    for b in BOOKS:
        for layout in range(4): archive.has(b, (200, HTML), layout=layout)
    with pytest.raises(DownloadError, match="web pages, no books"): fetch_books(BOOKS, tmp_path, mirror(archive), say=None)
    assert len(archive.asked) == 4


def test_the_second_mirror_helps(archive, tmp_path, monkeypatch):
    other = Archive()
    other.close()
    for b, t in zip(BOOKS, TEXTS): archive.has(b, (200, dress(t)))
    monkeypatch.setattr(cat, "MIRRORS", (other.url, archive.url))
    assert len(fetch_books(BOOKS, tmp_path, pause=0, say=None)) == 3 and len(archive.asked) == 3


def test_the_mirror_of_the_environment(archive, tmp_path, monkeypatch):
    archive.has(BOOKS[0], (200, dress(TEXTS[0])))
    monkeypatch.setenv("MICROJULIA_MIRROR", archive.url + "/")
    assert fetch_books(BOOKS[0], tmp_path, pause=0, say=None)[0].exists()
    monkeypatch.setenv("MICROJULIA_MIRROR", "not an address")
    with pytest.raises(ValueError, match="is no address"): fetch_books(BOOKS[1], tmp_path, say=None)


def test_manners():
    assert all(m.startswith("https://") and "gutenberg.org" not in m for m in cat.MIRRORS)
    assert [m.pause for m in cat._mirrors(None, cat.PAUSE)] == [2., 2.]
    for base in ("https://www.gutenberg.org", "http://gutenberg.org/files"):
        with pytest.raises(ValueError, match="human readers"): Mirror(base)
    with pytest.raises(ValueError, match="at least 2 s"): Mirror("https://mirror.example", pause=1.9)
    for base in ("mirror.example", "ftp://mirror.example", "", "/a/folder"):
        with pytest.raises(ValueError, match="is no address"): Mirror(base)


def test_at_most_a_hundred_at_once(archive, tmp_path):
    many = [replace(BOOKS[0], name=f"b{i}") for i in range(101)]
    with pytest.raises(ValueError, match="at most 100"): fetch_books(many, tmp_path, mirror(archive), say=None)
    assert archive.asked == []
    (tmp_path / "b0.txt").write_text("here already")
    archive.has(BOOKS[0], (200, dress(TEXTS[0])))
    assert len(fetch_books(many, tmp_path, mirror(archive), say=None)) == 101 and len(archive.asked) == 100


def test_without_pooch_one_line_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(DownloadError, match="needs pooch: pip install pooch"):
        fetch_books(BOOKS[0], tmp_path, Mirror("http://127.0.0.1", 0, wait=lambda s: None), say=None)


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    def snapshot_download(repo_id, local_dir, **options):
        asked.append((repo_id, options))
        if "gone" in repo_id: raise OSError("404 Client Error.\nRepository not found")
        (local_dir / "deep").mkdir(parents=True)
        if "empty" not in repo_id: (local_dir / "deep" / "plato.txt").write_text("Virtue is one.")
        (local_dir / ".cache").mkdir()
        (local_dir / ".cache" / "other.txt").write_text("not ours")
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert fetch_dataset("plato/dialogues", tmp_path / "a") == [tmp_path / "a" / "deep" / "plato.txt"]
    assert asked[0][1]["repo_type"] == "dataset" and asked[0][1]["allow_patterns"] == ["*.txt"]
    with pytest.raises(DownloadError, match="no .*txt file") : fetch_dataset("plato/empty", tmp_path / "b")
    with pytest.raises(DownloadError, match="gone: not downloaded .*404 Client Error. Repository") : fetch_dataset("plato/gone", tmp_path / "c")
