"""Published corpora: from a local server or from disk, whole or not at all."""

import functools
import http.server
import threading
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


@pytest.mark.parametrize("config", [lm_enwik8, lm_text8])
def test_published_shapes(config, tmp_path):
    """41M parameters; a path takes the place of the download."""
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT * 3)
    chosen = config.get_config("transformer_xl")
    chosen.task.update(path=str(path), data_dir=str(tmp_path / "data"))
    plan = make_plan(chosen)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(plan.state.params))
    assert 40e6 < count < 42e6
