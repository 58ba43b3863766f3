"""Published corpora of language modelling: where they come from, and which files of them are read."""

import concurrent.futures
import dataclasses
import http.client
import json
import pathlib
import shutil
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping

from efficient_attn.tasks.base import TaskError
from efficient_attn.tasks.download import BLOCK, fetch, part_of


@dataclasses.dataclass(frozen=True)
class Corpus:
    """url: a file; a zip archive of which `members` are taken out; what `files` lie below; or a bucket of Google Cloud Storage
    that `listing` tells the contents of, with `folders` of documents. All by the names they get here.

    One file is one text, cut by the task's fractions; train.txt, valid.txt and test.txt are its splits, or folders so named.
    """

    url: str
    members: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    listing: str = ""
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)


CORPORA: Mapping[str, Corpus] = {
    "enwik8": Corpus("http://mattmahoney.net/dc/enwik8.zip", {"enwik8": "enwik8.txt"}),
    "text8": Corpus("http://mattmahoney.net/dc/text8.zip", {"text8": "text8.txt"}),
    "wikitext103": Corpus(
        "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        {f"wikitext-103-raw/wiki.{split}.raw": f"{split}.txt" for split in ("train", "valid", "test")},
    ),
    "wikitext103_words": Corpus(
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
        {f"wikitext-103/wiki.{split}.tokens": f"{split}.txt" for split in ("train", "valid", "test")},
    ),
    "pg19": Corpus(
        "https://storage.googleapis.com/deepmind-gutenberg/",
        listing="https://storage.googleapis.com/storage/v1/b/deepmind-gutenberg/o",
        folders={"train": "train", "validation": "valid", "test": "test"},
    ),
    "wikitext2": Corpus(
        "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/",
        files={f"{split}.txt": f"{split}.txt" for split in ("train", "valid", "test")},
    ),
    "tiny_shakespeare": Corpus("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
}
"""By the name that `task.corpus` uses. enwik8 and text8 hold 100,000,000 bytes: fractions of 0.05 are the published splits.
wikitext2 and wikitext103_words are tokenised, with <unk>; wikitext103 is not. pg19: 28,602, 50 and 100 books, 11 GB.
"""


def locate(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The corpus's text, a file or a folder of splits in `data_dir`/NAME, downloaded if it is not there.

    Raises `TaskError` where it cannot be had; the message says what to put where, or to give task.path.
    """
    try:
        return _locate(name, data_dir / name)
    except OSError as error:
        raise TaskError(
            f"cannot look for {name} in task.data_dir: {error.strerror}; give another folder, or task.path"
        ) from error


def _locate(name: str, folder: pathlib.Path) -> pathlib.Path:
    corpus = CORPORA[name]
    if corpus.folders:
        return _fetch_folders(corpus, folder)
    if corpus.files:
        for remote, file in corpus.files.items():
            fetch(corpus.url + remote, folder / file, note="Or give the text as task.path.")
        return folder
    if not corpus.members:
        return fetch(corpus.url, folder / f"{name}.txt", note="Or give the text as task.path.")
    targets = {member: folder / file for member, file in corpus.members.items()}
    if not all(path.exists() for path in targets.values()):
        archive = fetch(corpus.url, folder / pathlib.PurePosixPath(corpus.url).name, note="Or give the text as task.path.")
        _extract(archive, targets)
    return folder if len(targets) > 1 else next(iter(targets.values()))


def _extract(archive: pathlib.Path, targets: Mapping[str, pathlib.Path]) -> None:
    """Members of a zip archive to the files they belong in, whole or not at all; zip's checksums cover them."""
    try:
        with zipfile.ZipFile(archive) as whole:
            for member, target in targets.items():
                with whole.open(member) as source, part_of(target).open("wb") as file:
                    shutil.copyfileobj(source, file, BLOCK)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise TaskError(f"{archive} is not the archive it should be ({error}). Delete it, and run again to fetch it.") from error
    for target in targets.values():
        part_of(target).replace(target)


CONNECTIONS = 16


def _fetch_folders(corpus: Corpus, folder: pathlib.Path) -> pathlib.Path:
    """Every document of a bucket's folders; `complete` says that all are there, so that nothing is asked again."""
    done = folder / "complete"
    if done.exists():
        return folder
    wanted = {
        name: folder / split / pathlib.PurePosixPath(name).name
        for remote, split in corpus.folders.items()
        for name in _listed(corpus.listing, f"{remote}/")
    }
    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
        note = "Or give the text as task.path."
        fetches = [pool.submit(fetch, corpus.url + name, path, note=note) for name, path in wanted.items()]
        try:
            for one in concurrent.futures.as_completed(fetches):
                one.result()
        except TaskError:
            pool.shutdown(cancel_futures=True)
            raise
    done.touch()
    return folder


def _listed(listing: str, prefix: str) -> Iterator[str]:
    """Names of the objects below a prefix, page by page (Cloud Storage's JSON interface, objects.list)."""
    query = {"prefix": prefix, "fields": "items(name),nextPageToken"}
    while True:
        url = f"{listing}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                page = json.load(answer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TaskError(f"Cannot list {url}: {error}. Run again, or give the text as task.path.") from error
        yield from (item["name"] for item in page.get("items", []) if not item["name"].endswith("/"))
        if "nextPageToken" not in page:
            return
        query["pageToken"] = page["nextPageToken"]
