"""Published corpora of language modelling: where they come from, and which files of them are read."""

import dataclasses
import pathlib
import shutil
import zipfile
from collections.abc import Mapping

from efficient_attn.tasks.base import TaskError
from efficient_attn.tasks.download import BLOCK, fetch, part_of


@dataclasses.dataclass(frozen=True)
class Corpus:
    """url: a file, a zip archive of which `members` are taken out, or what `files` lie below, both by the names they get here.

    One file is one text, cut by the task's fractions; train.txt, valid.txt and test.txt are its splits.
    """

    url: str
    members: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


CORPORA: Mapping[str, Corpus] = {
    "enwik8": Corpus("http://mattmahoney.net/dc/enwik8.zip", {"enwik8": "enwik8.txt"}),
    "text8": Corpus("http://mattmahoney.net/dc/text8.zip", {"text8": "text8.txt"}),
    "wikitext103": Corpus(
        "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        {f"wikitext-103-raw/wiki.{split}.raw": f"{split}.txt" for split in ("train", "valid", "test")},
    ),
    "wikitext2": Corpus(
        "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/",
        files={f"{split}.txt": f"{split}.txt" for split in ("train", "valid", "test")},
    ),
    "tiny_shakespeare": Corpus("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
}
"""By the name that `task.corpus` uses. enwik8 and text8 hold 100,000,000 bytes: fractions of 0.05 are the published splits."""


def locate(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The corpus's text, a file or a folder of splits in `data_dir`/NAME, downloaded if it is not there.

    Raises `TaskError` where it cannot be had; the message says what to put where, or to give task.path.
    """
    corpus, folder = CORPORA[name], data_dir / name
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
