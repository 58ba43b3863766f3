"""The benchmark of decoding in small: who takes part, what is counted, what resumes."""

import json
import sys

import numpy as np

from benchmarks import gpu_decode
from benchmarks.gpu_decode import Case


def test_the_benchmark_writes_after_each_case_and_resumes(tmp_path, monkeypatch, quick_compile):
    out = tmp_path / "decode.json"
    arguments = ["gpu_decode", "--quick", "--tokens=4096", "--only=D=64", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu_decode.main()
    rows = json.loads(out.read_text())["rows"]
    bandwidth = {"read", "read rows", "copy"}
    assert [set(row["contestants"]) - bandwidth for row in rows] == [{"paged reference", "paged portable"}, {"xla"}]
    for row in rows:
        assert max(x["of read"] for name, x in row["contestants"].items() if name.startswith("read")) == 1
    assert {"cudnn", "torch flash"} <= set(rows[1]["left out"])

    def measured_again(*_):
        raise AssertionError("a case that is in the file was measured again")

    monkeypatch.setattr(gpu_decode, "measure", measured_again)
    gpu_decode.main()
    assert json.loads(out.read_text())["rows"] == rows
    assert "| D=64 B=64 G=8 S=128 in a row | " in out.with_suffix(".md").read_text()


def test_only_keys_within_the_lengths_are_counted():
    case = Case(128, 4, 1024, kv_heads=2, block_size=16)
    assert case.bytes() == 4 * 1024 * 2 * 128 * 2 * 2
    ragged = Case(128, 4, 1024, kv_heads=2, block_size=16, ragged=True)
    np.testing.assert_array_equal(ragged.lengths(), [1024, 896, 768, 640])
    assert ragged.bytes() == case.bytes() * (1024 + 896 + 768 + 640) // 4096
