"""The attention benchmark and the block tuning in small: what takes part, what resumes, what is picked."""

import json
import sys

import numpy as np
import pytest

from benchmarks import attention_tuning, cards, gpu_attention, gpu_table
from kernels.attention.mosaic import tiling


def test_the_benchmark_writes_after_each_case_and_resumes(tmp_path, monkeypatch, quick_compile):
    out = tmp_path / "attention.json"
    monkeypatch.setattr(sys, "argv", ["gpu_attention", "--quick", "--masks", "causal", f"--out={out}"])
    gpu_attention.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert {"chunked", "xla"} == set(row["contestants"]) and all(x["ms"] > 0 for x in row["contestants"].values())
        assert "interpreted" in row["left out"]["mosaic"] and "NVIDIA" in row["left out"]["cudnn"]

    def measured_again(*_):
        raise AssertionError("a case that is in the file was measured again")

    monkeypatch.setattr(gpu_attention, "measure", measured_again)
    gpu_attention.main()
    assert json.loads(out.read_text())["rows"] == rows


def test_what_a_contestant_raises_is_its_reason():
    def broken(*arrays):
        raise RuntimeError("out of memory\nand more")

    reasons = {"broken": None, "absent": "not here"}
    assert gpu_attention._started({"broken": broken, "absent": broken}, reasons, ()) == {}
    assert reasons == {"broken": "RuntimeError: out of memory", "absent": "not here"}


def test_tuning_picks_the_fastest_and_keeps_the_table_elsewhere():
    kernels = list(attention_tuning.candidates())
    own = {(name, size): blocks for name, sizes in tiling.table().items() for size, blocks in sizes.items()}
    assert set(own.items()) <= {((kernel.name, kernel.head_size), kernel.blocks) for kernel in kernels}
    rows = [attention_tuning._named(kernel) | {"median_ms": 1.0 + i} for i, kernel in enumerate(kernels) if kernel.name == "dq"]
    best = attention_tuning.best(rows)
    first = next(row for row in rows if row["head_size"] == 128)
    assert best["dq"]["128"] == {field: first[field] for field in tiling.Blocks._fields}
    assert best["forward"]["64"] == own["forward", 64]._asdict()


def test_nothing_is_timed_without_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attention_tuning"])
    with pytest.raises(SystemExit, match="blocks are timed on a GPU"):
        attention_tuning.main()


def test_the_table_has_every_contestant_and_what_is_left_out():
    row = {"head_size": 64, "mask": "full", "length": 4096}
    ours = {"mosaic": {"ms": 1.0, "tflops": 390.4, "of cudnn": 0.86}, "cudnn": {"ms": 0.86, "tflops": 447.0}}
    rows = [row | {"pass": "backward", "contestants": {"cudnn": ours["cudnn"]}}, row | {"pass": "forward", "contestants": ours}]
    *_, forward, backward = gpu_table.table(rows).splitlines()
    assert forward == "| 64 | full | 4096 | forward | 447 | 390 | 0.86 |"
    assert backward == "| 64 | full | 4096 | backward | 447 | – | – |"


def test_rows_of_another_commit_are_not_resumed(tmp_path, capsys):
    out = tmp_path / "rows.json"
    out.write_text(json.dumps({"environment": {"commit": "of another time"}, "rows": [{"ms": 1}]}))
    assert cards.resumed(str(out)) == [] and "measured anew" in capsys.readouterr().out
    assert cards.rows(str(out)) == [{"ms": 1}]


def test_spread_gives_every_result_once():
    """By two processes, in the order in which they are done."""
    assert sorted(cards.spread(abs, range(-7, 0), jobs=2)) == list(range(1, 8))


@pytest.mark.parametrize("name", gpu_attention.MASKS)
def test_the_density_counts_every_pair(name):
    mask, at = gpu_attention.MASKS[name](512), np.arange(512)
    allowed = np.broadcast_to(mask.allowed(at[:, None], at[None]), (512, 512))
    assert gpu_attention._density(mask, 512) == pytest.approx(allowed.mean())
