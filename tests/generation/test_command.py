"""The command on a small run: text that seeds decide, and one clear line where there can be none."""

import dataclasses
import pathlib

import jax
import pytest

from configs import lm_text, quickstart
from efficient_attn import evaluation, workdir
from efficient_attn.arguments import ConfigError
from efficient_attn.checkpoints import Checkpoints
from efficient_attn.generation.command import Options, run
from efficient_attn.generation.sampling import GREEDY, Sampling
from efficient_attn.plan import make_plan

OPTIONS = Options(["so"], max_tokens=6, num_samples=1, num_beams=1, sampling=Sampling(temperature=2.0), seed=3)


def record(folder: pathlib.Path, config) -> pathlib.Path:
    """A folder with the run.json of a run that has saved nothing yet."""
    folder.mkdir()
    workdir.write_json(folder / "run.json", {"config": make_plan(config).config})
    return folder


def text_config(folder: pathlib.Path, **model):
    config = lm_text.get_config()
    (folder / "text.txt").write_text("Something to read. " * 200)
    config.task.update(path=str(folder / "text.txt"), data_dir=str(folder / "data"), context=16)
    config.model.update(depth=1, width=8, feed_forward_width=8, **model)
    config.model.mixer.num_heads = 2
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A run's folder with one checkpoint, of random weights, with learned positions up to 16."""
    parent = tmp_path_factory.mktemp("runs")
    folder = record(parent / "run", text_config(parent, positions=dict(name="learned")))
    _, plan = evaluation.open_run(folder)
    checkpoints = Checkpoints(folder / "checkpoints", metric="valid_loss", mode="min")
    checkpoints.save(1, jax.jit(plan.init_state)(), {}, {"valid_loss": 1.0})
    checkpoints.close()
    return folder


def text_of(capsys, folder, **changes) -> str:
    run(folder, dataclasses.replace(OPTIONS, **changes))
    return capsys.readouterr().out


def test_text_goes_on_from_the_prompt_as_the_seed_says(capsys, caplog, trained):
    text = text_of(capsys, trained)
    assert text.startswith("so") and 4 <= len(text) <= 2 + 6 + 1 and text.endswith("\n")
    assert text == text_of(capsys, trained)
    assert len(text_of(capsys, trained, max_tokens=None)) <= 2 + 14 + 1 and "more than the" not in caplog.text
    several = text_of(capsys, trained, num_samples=2, prompts=["so", "Read"]).split("--- ")
    assert [part[:1] for part in several[1:]] == list("1234") and several[3][2:].startswith("Read")
    assert len({part[2:] for part in several[1:3]}) == 2
    beams = text_of(capsys, trained, num_beams=2, sampling=GREEDY)
    assert beams.startswith("so") and beams == text_of(capsys, trained, num_beams=2, sampling=GREEDY, seed=9)


def test_what_cannot_be_continued_is_said_in_a_line(tmp_path, trained):
    with pytest.raises(
        ConfigError, match="a prompt of 12 tokens and max_tokens=6 are more than the model takes: learned positions"
    ):
        run(trained, dataclasses.replace(OPTIONS, prompts=["twelve bytes"]))
    with pytest.raises(workdir.WorkdirError, match="holds no run"):
        run(tmp_path / "nowhere", OPTIONS)
    with pytest.raises(workdir.WorkdirError, match="no checkpoint yet"):
        run(record(tmp_path / "new", text_config(tmp_path)), OPTIONS)
    with pytest.raises(ConfigError, match="task 'multi_query_recall', which has no text to continue"):
        run(record(tmp_path / "recall", quickstart.get_config()), OPTIONS)
    for change, words in (
        (dict(max_tokens=0), "max_tokens=0 must be at least 1"),
        (dict(seed=-1), "seed=-1"),
        (dict(num_beams=2, num_samples=2), "leave one of them out"),
        (dict(num_beams=2, sampling=Sampling(0.0, top_p=0.9)), "searches and draws nothing"),
        (dict(prompts=[""]), "prompt is empty"),
    ):
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(OPTIONS, **change)


def test_bytes_of_a_character_are_shown_together():
    decode = lm_text_decoder()
    assert [decode([0xC3]), decode([0xA9, 0x41]), decode([0xFF])] == ["", "éA", "\ufffd"]


def lm_text_decoder():
    from efficient_attn.tasks.lm_text import LMText

    assert LMText().encode("é\udcff") == [0xC3, 0xA9, 0xFF]
    return LMText().decoder()
