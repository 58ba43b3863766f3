"""A small sample of the fuzzed bad input; `python -m tests.fuzz` has the rest."""

import os
import pathlib
import random
import re
import subprocess
import sys

import pytest

from tests.fuzz import attention, judge

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_a_sample_of_every_kind_is_right_or_refused():
    command = [sys.executable, "-m", "tests.fuzz", "--kind=all", "--count=12", "--seed=2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert re.findall(r"^(\w+): 12 cases, seed 2", result.stdout, re.MULTILINE) == ["config", "attend", "scan", "text"]


def outcome(check, clear=None, expects=None) -> tuple[str, list[str]]:
    tally = judge.Tally()
    judge.run(judge.Case("case", check, expects), clear, 0.2, tally)
    ((name, _),) = tally.outcomes.items()
    return name, [finding.what for finding in tally.findings]


def raising(error):
    def check():
        raise error

    return check


def test_what_counts_as_a_defect():
    clear = re.compile("^attend: ")
    assert outcome(lambda: "right") == ("right", [])
    assert outcome(raising(judge.ConfigError("model.width=-1 must be at least 1"))) == ("refused", [])
    assert outcome(raising(ValueError("attend: q is wrong")), clear) == ("refused", [])
    assert outcome(raising(ValueError("not enough values to unpack")), clear) == ("bare error", ["bare error"])
    assert outcome(raising(KeyError("name"))) == ("bare error", ["bare error"])
    assert outcome(raising(judge.ConfigError("one\ntwo"))) == ("unclear error", ["unclear error"])
    assert outcome(raising(judge.WrongResult("differs by 3"))) == ("wrong result", ["wrong result"])


def test_what_is_expected_of_a_case_is_judged():
    refusing = raising(ValueError("attend: q is wrong"))
    clear = re.compile("^attend: ")
    assert outcome(refusing, clear, "refused") == ("refused", [])
    assert outcome(refusing, clear, "right") == ("sound, but refused", ["sound, but refused"])
    assert outcome(lambda: "right", clear, "right") == ("right", [])
    assert outcome(lambda: "right", clear, "refused") == ("bad, but accepted", ["bad, but accepted"])


def test_sound_masks_are_fuzzed():
    """A harness whose own masks are refused fuzzes nothing: many calls are sound and masked, and all of those are right."""
    cases = [attention.case(random.Random(f"attend 3 {i}")) for i in range(24)]
    masked = [case for case in cases if case.expects == "right" and " mask=" in case.told]
    assert len(masked) >= 6
    tally = judge.Tally()
    for case in masked:
        judge.run(case, attention.CLEAR, attention.SECONDS, tally)
    assert tally.outcomes == {"right": len(masked)}, tally.findings


def test_a_hang_is_a_defect():
    def check():
        while True:
            random.random()

    assert outcome(check) == ("hang", ["hang"])
