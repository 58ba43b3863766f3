"""Foreseen errors end a command in one line, with a status of their own."""

import pathlib

import pytest
from absl import app, flags
from ml_collections import config_flags

from efficient_attn import cli, distributed
from efficient_attn.analysis.base import AnalysisError
from efficient_attn.arguments import ConfigError
from efficient_attn.distributed import PeerLost
from efficient_attn.workdir import WorkdirBusy

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("error, status", [(ConfigError, 2), (AnalysisError, 2), (WorkdirBusy, 5)])
def test_an_error_ends_in_one_line_with_the_status_of_its_nearest_ancestor(error, status, monkeypatch, capsys):
    def fail():
        raise error("what was wrong")

    monkeypatch.setattr(app, "run", lambda guarded, **_: guarded([]))
    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert ended.value.code == status and capsys.readouterr().err == "error: what was wrong\n"


def test_a_process_whose_others_are_lost_does_not_wait_for_them(monkeypatch, capsys):
    def fail():
        raise PeerLost("one is lost")

    def leave(status):
        raise SystemExit(f"at once with {status}")

    monkeypatch.setattr(app, "run", lambda guarded, **_: guarded([]))
    monkeypatch.setattr(distributed.os, "_exit", leave)
    with pytest.raises(SystemExit, match="at once with 6"):
        cli.run(fail)
    assert capsys.readouterr().err == "error: one is lost\n"


@pytest.mark.parametrize(
    "override, line",
    [
        (
            "model.mixer.window=3",
            "--config.model.mixer is a sequence of 4; set fields of one by --config.model.mixer[0].NAME=VALUE",
        ),
        ("model.mixer[4].window=3", "--config.model.mixer is a sequence of 4; set fields"),
        ("model.mixer.0.window=3", "--config.model.mixer is a sequence of 4; set fields"),
        (
            "model.mixer[3].windo=3",
            "no field --config.model.mixer[3].windo (did you mean 'window'?); --config.model.mixer[3] has: name",
        ),
        ("model.norms=x", "no field --config.model.norms (did you mean 'norm'?)"),
        ("seeds.x=1", "no field --config.seeds.x (did you mean 'seed'?)"),
        ("optimizer.q=1", "no field --config.optimizer.q; config.optimizer has: algorithm, b1, b2, clip_norm"),
        ("q=1", "no field --config.q; config has: model, name, optimizer, recipe, seed, sharding, task, train"),
        ("train.batch_size.x=2", "no field --config.train.batch_size.x; config.train.batch_size is 64"),
    ],
)
def test_an_override_of_nothing_is_told_what_there_is(override, line, monkeypatch, capsys):
    monkeypatch.setattr(cli.flags, "FLAGS", flags.FlagValues())
    config_flags.DEFINE_config_file("config", None, "", flag_values=cli.flags.FLAGS)
    config = "configs/lra_listops.py:bigbird" if "mixer" in override else "configs/quickstart.py"
    argv = ["train.py", f"--config={config}", f"--config.{override}"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        cli.parse_flags(argv)
    assert line in capsys.readouterr().err
