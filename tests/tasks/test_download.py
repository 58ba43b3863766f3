"""Downloads from a local server: resuming, verification, refusals; and archives that are whole, damaged or wrong."""

import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest

from efficient_attn.tasks import download
from efficient_attn.tasks.base import TaskError

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under any path; breaks off after `cut` bytes of a response, and notes the ranges asked for."""

    content, cut, resumable = CONTENT, None, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = []
        self.url = f"http://127.0.0.1:{self.server_port}/set.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.resumable else 0
        if start and start >= len(server.content):
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut])

    def log_message(self, *args):
        """Keeps the test output clean."""


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_fetch_downloads_verifies_and_renames(server, tmp_path, capsys):
    path = tmp_path / "new" / "set.tar.gz"
    assert download.fetch(server.url, path, sha256=SHA256) == path
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["set.tar.gz"]
    assert server.url in capsys.readouterr().err


def test_fetch_takes_a_file_that_is_there(server, tmp_path):
    path = tmp_path / "set.tar.gz"
    path.write_bytes(CONTENT)
    download.fetch(server.url, path, sha256=SHA256)
    assert server.ranges == []


def test_fetch_refuses_a_wrong_file_that_is_there_and_keeps_it(server, tmp_path):
    path = tmp_path / "set.tar.gz"
    path.write_bytes(b"something else")
    with pytest.raises(TaskError, match="not the published file"):
        download.fetch(server.url, path, sha256=SHA256)
    assert path.read_bytes() == b"something else"


@pytest.mark.parametrize("resumable", [True, False])
def test_broken_connection_leaves_only_a_part_and_the_next_call_finishes(server, tmp_path, resumable):
    path = tmp_path / "set.tar.gz"
    server.cut, server.resumable = 120_000, resumable
    with pytest.raises(TaskError, match=r"broke after 120,000 of 300,000 bytes.*Run again to continue"):
        download.fetch(server.url, path, sha256=SHA256)
    assert not path.exists()
    assert download.part_of(path).read_bytes() == CONTENT[:120_000]
    server.cut = None
    download.fetch(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=120000-"]


def test_complete_part_that_was_not_renamed(server, tmp_path):
    path = tmp_path / "set.tar.gz"
    download.part_of(path).write_bytes(CONTENT)
    download.fetch(server.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=300000-", None]


def test_wrong_download_is_removed(server, tmp_path):
    path = tmp_path / "set.tar.gz"
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(TaskError, match=SHA256):
        download.fetch(server.url, path, sha256=SHA256)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_noticed_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1_000}))
    with pytest.raises(TaskError, match="free"):
        download.fetch(server.url, tmp_path / "set.tar.gz")
    assert list(tmp_path.iterdir()) == []


def test_no_network_says_what_to_fetch_and_where_to_put_it(tmp_path):
    url, path = "http://127.0.0.1:1/set.tar.gz", tmp_path / "set.tar.gz"
    with pytest.raises(TaskError) as raised:
        download.fetch(url, path, note="A hint.")
    message = str(raised.value)
    assert url in message
    assert str(path) in message
    assert message.endswith("A hint.")


def archive_of(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


MEMBERS = {"set/readme": b"no", "set/not-a.bin": b"no", "set/a.bin": CONTENT[:200_000], "set/deep/b.bin": CONTENT[200_000:]}


def targets_in(folder):
    return {"a.bin": folder / "a.bin", "deep/b.bin": folder / "sub" / "b.bin"}


def test_extract_writes_the_named_members(tmp_path):
    archive_of(tmp_path / "set.tar.gz", MEMBERS)
    download.extract(tmp_path / "set.tar.gz", targets_in(tmp_path / "out"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"a.bin": CONTENT[:200_000], "b.bin": CONTENT[200_000:]}


def truncate(data):
    return data[: len(data) * 2 // 3]


def flip_a_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda data: b"<html>403</html>"])
def test_extract_from_a_damaged_archive_gives_no_file(tmp_path, damage):
    archive = tmp_path / "set.tar.gz"
    archive_of(archive, MEMBERS)
    archive.write_bytes(damage(archive.read_bytes()))
    targets = targets_in(tmp_path / "out")
    with pytest.raises(TaskError, match="not a sound tar archive"):
        download.extract(archive, targets)
    assert not any(target.exists() for target in targets.values())


def test_extract_names_what_another_archive_lacks(tmp_path):
    archive_of(tmp_path / "set.tar.gz", {"set/a.bin": b"a"})
    with pytest.raises(TaskError, match=r"no deep/b\.bin"):
        download.extract(tmp_path / "set.tar.gz", targets_in(tmp_path / "out"))
    assert not (tmp_path / "out" / "a.bin").exists()


def test_check_size_names_the_field(tmp_path):
    download.check_size("train", 5, 5, tmp_path)
    with pytest.raises(TaskError, match=r"num_valid=5 or less"):
        download.check_size("valid", 6, 5, tmp_path)
