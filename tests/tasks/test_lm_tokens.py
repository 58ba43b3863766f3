"""Subwords and words: what is lost, what is kept apart, what is on disk."""

import numpy as np
import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.tasks.base import TaskError

pytest.importorskip("tokenizers", reason="lm_tokens needs the optional package tokenizers")

from efficient_attn.tasks.lm_tokens import LMTokens

LINE = "The {n}th line, naïve – {square}.\n"


@pytest.fixture
def folder(tmp_path):
    """Four documents; files of equal size go to one split, so that all differ in size."""
    root = tmp_path / "texts"
    root.mkdir()
    for i, lines in enumerate((300, 20, 21, 22)):
        (root / f"{i}.txt").write_text("".join(LINE.format(n=n, square=n * n) for n in range(lines)))
    return root


def task(tmp_path, folder, **fields):
    fractions = dict(valid_fraction=0.09, test_fraction=0.09)
    return LMTokens(path=str(folder), data_dir=str(tmp_path / "data"), **{"context": 8, "max_vocab": 300, **fractions, **fields})


def test_subwords_are_fewer_than_bytes_and_lose_nothing(tmp_path, folder):
    made = task(tmp_path, folder)
    for split in ("train", "valid", "test"):
        tokens, text = made.tokens(split), (made.folder / f"{split}.bin").read_bytes().decode()
        assert tokens.dtype == np.uint16 and len(tokens) == made._lengths[split] < 0.8 * len(text)
        documents = np.split(tokens, np.flatnonzero(tokens == 0))
        assert len(documents) == text.count("\0") + 1
        assert "\0".join(made.decoder()(part[part > 0].tolist()) for part in documents) == text
    assert made.vocab_size == made.num_outputs == 300 and made.stop_token == 0
    assert made.sizes["train"] == made._lengths["train"] - 8
    example = made.source("train").batch(np.arange(3))
    np.testing.assert_array_equal(example["inputs"][1], made.tokens("train")[1:9])
    np.testing.assert_array_equal(example["targets"][1], made.tokens("train")[2:10])
    text = "naïve, 🙂 unseen"
    decode = made.decoder()
    assert "".join(decode([token]) for token in made.encode(text)) == text, "characters come whole, token by token"


def test_words_end_lines_and_leave_the_rare_ones_out(tmp_path, folder):
    made = task(tmp_path, folder, tokenizer="words", max_vocab=8)
    known = made.encode("The line, naïve –\nThe 17th")
    assert made.vocab_size == 8 and 1 not in known[:5] and known[-1] == 1 and known[5] == known[0] and 0 not in known
    assert made.decoder()(known[:3]) == "The line, naïve"
    lines = (made.folder / "train.bin").read_bytes().decode().count("\n")
    assert int((made.tokens("train") == known[4]).sum()) == lines


def test_what_is_made_is_found_again_and_named_by_its_tokenizer(tmp_path, folder, monkeypatch):
    made = task(tmp_path, folder)
    name = made.name
    monkeypatch.setattr(LMTokens, "_make", lambda self: pytest.fail("it is there already"))
    again = task(tmp_path, folder)
    assert again.name == name and "bpe300" in name
    (again._folder / "valid.bin").write_bytes(b"12")
    with pytest.raises(TaskError, match="it will be made again"):
        again.tokens("valid")


def test_bad_input_is_an_error_before_anything_is_written(tmp_path, folder):
    with pytest.raises(TaskError, match="max_vocab=257 must be more than 257"):
        task(tmp_path, folder, max_vocab=257)
    with pytest.raises(ConfigError, match="bpe, words"):
        task(tmp_path, folder, tokenizer="unigram")
    (folder / "0.txt").write_bytes(b"caf\xe9 " * 2000)
    with pytest.raises(TaskError, match="not UTF-8"):
        task(tmp_path, folder).prepare()
    assert not (task(tmp_path, folder)._folder / "made.json").exists()
    with pytest.raises(TaskError, match="give more text"):
        (folder / "0.txt").write_text("a b c d e f g " * 2000)
        _ = task(tmp_path, folder / "0.txt", context=20_000, tokenizer="words", max_vocab=10).sizes
