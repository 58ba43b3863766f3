"""The attention benchmark and the block tuning in small: what takes part, what resumes, what is picked."""

import json
import sys

import pytest

from benchmarks import attention_tuning, gpu_attention
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
