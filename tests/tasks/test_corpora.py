"""Published corpora: from a local server or from disk, whole or not at all."""

import functools
import http.server
import json
import threading
import urllib.parse
import zipfile

import jax
import numpy as np
import pytest

from configs import lm_enwik8, lm_text8
from efficient_attn.plan import make_plan
from efficient_attn.tasks import corpora
from efficient_attn.tasks.base import TaskError
from efficient_attn.tasks.corpora import Corpus
from efficient_attn.tasks.lm_text import LMText

TEXT = b"".join(b"%d squared is %d. " % (n, n * n) for n in range(300))


@pytest.fixture
def server(tmp_path):
    """Serves a folder; yields the folder and its address."""
    root = tmp_path / "published"
    root.mkdir()
    handler = functools.partial(
        type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=root
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield root, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def publish(monkeypatch, name, corpus):
    monkeypatch.setattr(corpora, "CORPORA", {**corpora.CORPORA, name: corpus})


def test_an_archive_of_splits_is_fetched_once(server, tmp_path, monkeypatch):
    root, url = server
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for split in ("train", "valid", "test"):
            archive.writestr(f"set/wiki.{split}.raw", split.encode() + b" " + TEXT)
    members = {f"set/wiki.{split}.raw": f"{split}.txt" for split in ("train", "valid", "test")}
    publish(monkeypatch, "wikitext103", Corpus(f"{url}/set.zip", members))
    task = LMText(corpus="wikitext103", context=8, data_dir=str(tmp_path / "data"))
    task.prepare()
    assert (task.folder / "valid.bin").read_bytes() == b"valid " + TEXT and "wikitext103" in task.name
    (root / "set.zip").unlink()
    again = LMText(corpus="wikitext103", context=8, data_dir=str(tmp_path / "data"))
    assert again.name == task.name


def test_one_text_is_cut_by_fractions(server, tmp_path, monkeypatch):
    root, url = server
    with zipfile.ZipFile(root / "one.zip", "w") as archive:
        archive.writestr("enwik8", TEXT)
    publish(monkeypatch, "enwik8", Corpus(f"{url}/one.zip", {"enwik8": "enwik8.txt"}))
    task = LMText(corpus="enwik8", context=8, data_dir=str(tmp_path / "data"))
    task.prepare()
    parts = [len(task.tokens(split)) for split in ("train", "valid", "test")]
    assert sum(parts) == len(TEXT) and abs(parts[1] - 0.05 * len(TEXT)) <= 1
    np.testing.assert_array_equal(task.tokens("train")[:9], np.frombuffer(TEXT[:9], np.uint8))


def test_a_bucket_of_documents_is_listed_page_by_page_and_fetched_once(tmp_path, monkeypatch):
    """Two pages of books in train; each is a document of the split whose folder it is in."""
    books = {f"{folder}/{n}.txt": f"Book {n} of {folder}. ".encode() * (n + 1)
             for folder, count in (("train", 5), ("validation", 2), ("test", 1)) for n in range(count)}  # fmt: skip
    asked = []

    class Bucket(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None  # noqa: E731

        def do_GET(self):
            path, _, query = self.path.partition("?")
            asked.append(self.path)
            if path == "/list":
                query = dict(urllib.parse.parse_qsl(query))
                names = [name for name in books if name.startswith(query["prefix"])]
                start = int(query.get("pageToken", 0))
                page = {"items": [{"name": name} for name in [f"{query['prefix']}", *names][start : start + 3]]}
                body = json.dumps(page | ({"nextPageToken": str(start + 3)} if start + 3 <= len(names) else {})).encode()
            else:
                body = books[path.removeprefix("/bucket/")]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{running.server_port}"
        folders = {"train": "train", "validation": "valid", "test": "test"}
        publish(monkeypatch, "pg19", Corpus(f"{url}/bucket/", listing=f"{url}/list", folders=folders))
        for _ in range(2):
            task = LMText(corpus="pg19", context=8, data_dir=str(tmp_path / "data"))
            task.prepare()
        running.shutdown()
    text = (task.folder / "train.bin").read_bytes()
    assert sorted(text.split(b"\0")) == sorted(body for name, body in books.items() if name.startswith("train"))
    assert (task.folder / "valid.bin").read_bytes().count(b"\0") == 1 and len(asked) == len(set(asked)) == 2 + 1 + 1 + len(books)
    publish(monkeypatch, "pg19", Corpus(f"{url}/bucket/", listing=f"{url}/list", folders=folders))
    with pytest.raises(TaskError, match=r"Cannot list .*task\.path"):
        LMText(corpus="pg19", context=8, data_dir=str(tmp_path / "elsewhere")).prepare()


def test_a_wrong_archive_and_no_network_are_errors_that_say_what_to_do(server, tmp_path, monkeypatch):
    root, url = server
    (root / "bad.zip").write_bytes(b"not an archive")
    publish(monkeypatch, "text8", Corpus(f"{url}/bad.zip", {"text8": "text8.txt"}))
    with pytest.raises(TaskError, match="Delete it"):
        LMText(corpus="text8", data_dir=str(tmp_path / "data")).prepare()
    assert not (tmp_path / "data" / "text8" / "text8.txt").exists()
    publish(monkeypatch, "text8", Corpus(f"{url}/missing.zip", {"text8": "text8.txt"}))
    with pytest.raises(TaskError, match=r"task\.path"):
        LMText(corpus="text8", data_dir=str(tmp_path / "elsewhere")).prepare()
    with pytest.raises(TaskError, match="enwik8, text8"):
        LMText(corpus="enwik9")


def test_published_shapes(tmp_path):
    """41M parameters, of which layers after the first are alike; a path takes the place of the download."""
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT * 3)
    chosen = lm_enwik8.get_config("transformer_xl")
    assert chosen.model == lm_text8.get_config("transformer_xl").model and chosen.model.depth == 12
    chosen.task.update(path=str(path), data_dir=str(tmp_path / "data"))
    one, two = (
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(make_plan({**chosen.to_dict(), "model": model}).params))
        for model in ({**chosen.model.to_dict(), "depth": depth} for depth in (1, 2))
    )
    assert 40e6 < one + 11 * (two - one) < 42e6
