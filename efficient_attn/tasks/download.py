"""Published archives: downloads that resume and are verified before they count, and members taken out of a tar file.

Nothing unfinished ever stands under its final name: a download grows as `<name>.part`, and files taken out of an archive
are written as `<name>.part` until the whole archive has proved sound. Only then are they renamed.
"""

import contextlib
import gzip
import hashlib
import http.client
import os
import pathlib
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping

from efficient_attn.tasks.base import TaskError

BLOCK = 1 << 20  # bytes read at a time
REPORT_SECONDS = 5.0
TIMEOUT_SECONDS = 60.0  # of silence from the server
_FIELDS = {"train": "num_examples", "valid": "num_valid", "test": "num_test"}


def fetch(url: str, path: pathlib.Path, *, sha256: str | None = None, note: str = "") -> pathlib.Path:
    """Returns `path`, after downloading `url` to it unless the file is there already (a user may have put it there).

    An interrupted download continues where it stopped if the server can. Progress goes to stderr.

    Args:
      url: where the file is published.
      path: where it belongs.
      sha256: its published checksum, verified after a download and of a file found; None where none is published.
      note: a sentence for the error message about getting the file by hand.

    Raises:
      TaskError: no network or a refusing server (the message says what to fetch by hand and where to put it), a broken
        connection, too little disk space, or a wrong checksum (a downloaded file is then removed).
    """
    if path.exists():
        _verify(path, path, sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        _download(url, part)
    except (OSError, http.client.HTTPException) as error:
        message = (
            f"Cannot download {url}: {error}. Run again to continue, or fetch that file by other means and put it at {path}."
        )
        raise TaskError(f"{message} {note}".rstrip()) from error
    try:
        _verify(part, path, sha256)
    except TaskError:
        part.unlink()
        raise
    os.replace(part, path)
    return path


def part_of(path: pathlib.Path) -> pathlib.Path:
    """Where a file is written until it is complete."""
    return path.with_name(path.name + ".part")


def _download(url: str, part: pathlib.Path) -> None:
    """Appends to `part` what it lacks of `url`; starts over if the server will not continue."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if not have or error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        part.unlink()
        return _download(url, part)
    with response:
        have = have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers["Content-Length"]
        total = None if length is None else have + int(length)
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - have > free:
            raise TaskError(f"{url} needs {_megabytes(total - have)} in {part.parent}, which has {_megabytes(free)} free.")
        _say(f"fetching {url} ({'size unknown' if total is None else _megabytes(total)}) to {part.parent}")
        with part.open("ab" if have else "wb") as file:
            _copy_reporting(response, file, have, total)
            written = file.tell()
    if total is not None and written != total:
        raise ConnectionError(f"the connection broke after {written:,} of {total:,} bytes")


def _copy_reporting(response, file, have: int, total: int | None) -> None:
    started = reported = time.monotonic()
    done = have
    while block := response.read(BLOCK):
        file.write(block)
        done += len(block)
        now = time.monotonic()
        if now - reported >= REPORT_SECONDS:
            reported, speed = now, (done - have) / (now - started)
            left = "" if total is None else f" of {_megabytes(total)}, about {(total - done) / speed:.0f} s left"
            _say(f"{_megabytes(done)}{left}, {_megabytes(speed)}/s")


def _verify(file: pathlib.Path, path: pathlib.Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise TaskError(
            f"{path} is not the published file: its SHA-256 is {found}, expected {sha256} ({file.stat().st_size:,} bytes). "
            "If it is there, delete it; then run again to download it anew."
        )


@contextlib.contextmanager
def open_tar(archive: pathlib.Path) -> Iterator[tarfile.TarFile]:
    """Opens a tar archive of any compression for reading once in order; raises `TaskError` where it proves damaged.

    Leaving the block reads what is left of the file, so that the compression's checksum has covered all of it.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            yield tar
            while tar.fileobj.read(BLOCK):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TaskError(
            f"{archive} is not a sound tar archive ({' '.join(str(error).split())}). Delete it, and fetch it again."
        ) from error


def extract(archive: pathlib.Path, targets: Mapping[str, pathlib.Path]) -> None:
    """Writes the members whose paths end in one of `targets` (such as "folder/file.bin") to the files it names.

    Raises `TaskError` if the archive is damaged or lacks one of them; then no target exists that did not before.
    """
    missing = dict(targets)
    with open_tar(archive) as tar:
        for member in tar:
            ending = next((key for key in missing if f"/{member.name}".endswith(f"/{key}")), None)
            if ending is None or not member.isfile():
                continue
            _say(f"{archive.name}: writing {member.name} ({_megabytes(member.size)})")
            target = missing.pop(ending)
            target.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, part_of(target).open("wb") as file:
                shutil.copyfileobj(source, file, BLOCK)
    if missing:
        raise TaskError(f"{archive} has no {', no '.join(missing)}: it is another archive. Delete it, and fetch it again.")
    for target in targets.values():
        os.replace(part_of(target), target)


def check_size(split: str, wanted: int, found: int, where: pathlib.Path) -> None:
    """Raises `TaskError` if a split should have more examples than there are, naming the field of the task to set."""
    if wanted > found:
        raise TaskError(
            f"{where} holds {found:,} {split} examples, but {_FIELDS[split]}={wanted:,}. "
            f"If these are the data you mean, set config.task.{_FIELDS[split]}={found} or less; otherwise remove them."
        )


def _megabytes(count: int | float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
