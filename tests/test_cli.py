"""Foreseen errors end a command in one line, with a status of their own."""

import pytest
from absl import app

from efficient_attn import cli
from efficient_attn.analysis.base import AnalysisError
from efficient_attn.arguments import ConfigError
from efficient_attn.workdir import WorkdirBusy


@pytest.mark.parametrize("error, status", [(ConfigError, 2), (AnalysisError, 2), (WorkdirBusy, 5)])
def test_an_error_ends_in_one_line_with_the_status_of_its_nearest_ancestor(error, status, monkeypatch, capsys):
    def fail():
        raise error("what was wrong")

    monkeypatch.setattr(app, "run", lambda guarded, **_: guarded([]))
    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert ended.value.code == status and capsys.readouterr().err == "error: what was wrong\n"
