"""The efficiency table: every row has a configuration, cells survive and resume, ratios and exponents are what they say."""

import json

import pytest

from benchmarks import lra_speed as bench
from configs.tables import lra_speed as table
from efficient_attn import models
from efficient_attn.mixers import MIXERS, build
from efficient_attn.tasks.text import Text

LINEAR = {
    ("transformer", n): {"mixer": "transformer", "length": n, "ms": 1e-3 * n**2, "bytes": n**2, "status": "ran"}
    for n in (1024, 4096)
}
LINEAR |= {
    ("performer", n): {"mixer": "performer", "length": n, "ms": 0.1 * n, "bytes": 64 * n, "status": "ran"} for n in (1024, 4096)
}
LINEAR[("performer", 8192)] = {"mixer": "performer", "length": 8192, "status": "not within 3 s"}


@pytest.mark.parametrize("row", table.rows())
def test_every_mixer_has_a_configuration(row):
    """Rows need no entry in the table: sizes are read off the constructor's arguments."""
    config = table.get_config(row, 1024)
    built = build(config.model.mixer.to_dict())
    assert built.causal == (not MIXERS[config.model.mixer.name].bidirectional)
    assert getattr(built, "num_heads", 2) == 2
    assert models.build(config.model.to_dict(), Text(max_bytes=1024)).depth == 1


def test_published_ratios_are_over_the_transformer():
    assert table.published("transformer", 1024) == (1.0, 1.0)
    assert table.published("performer", 4096) == pytest.approx((8.0 / 1.4, 1.06 / 9.48))
    assert table.published("luna", 4096) == (4.9, 0.16) and table.published("luna", 1024) is None
    assert table.published("mamba", 4096) is None and table.published("performer", 8192) is None
    assert set(table.STEPS_PER_SECOND) == set(table.GIGABYTES)


def test_exponents_and_ratios_of_the_table():
    rows = bench.summary(LINEAR)
    assert [row["mixer"] for row in rows] == ["transformer", "performer"]
    assert [row["time_exponent"] for row in rows] == pytest.approx([2, 1])
    assert [row["memory_exponent"] for row in rows] == pytest.approx([2, 1])
    assert bench.exponent({1024: 3.0}) is None
    header, _, transformer, performer = bench.markdown(rows, [1024, 4096]).split("\n")
    cells = dict(zip(header.split(" | "), performer.split(" | ")))
    assert cells["speed 4K"] == "40.96 (5.71)" and cells["memory 4K"] == "0.02 (0.11)"  # 16384 / 409.6 ms
    assert "8K: not within 3 s" in performer and transformer.startswith("| `transformer` | 1.00 (1.00)")


def test_cells_are_kept_and_only_missing_ones_run(tmp_path, monkeypatch, capsys):
    out, asked = tmp_path / "speed.json", []

    def fake(name, lengths, args):
        asked.append((name, tuple(lengths)))
        for length in lengths:
            is_late = name == "softmax" and length == 64
            yield {"mixer": name, "length": length, "status": "late"} if is_late else {
                "mixer": name, "length": length, "ms": 1.0 * length, "bytes": length, "status": "ran",
            }  # fmt: skip

    monkeypatch.setattr(bench, "run_mixer", fake)

    def main(*flags):
        monkeypatch.setattr("sys.argv", ["lra_speed", "--mixers", "identity", "softmax", f"--out={out}", *flags])
        bench.main()

    main("--lengths", "32", "64")
    assert asked == [("identity", (32, 64)), ("softmax", (32, 64))]
    main("--lengths", "32", "64", "128")
    assert asked[2:] == [("identity", (128,)), ("softmax", (64, 128))]
    main("--lengths", "32", "--again")
    assert asked[4:] == [("identity", (32,)), ("softmax", (32,))]
    figures = json.loads(out.read_text())
    assert len(figures["rows"]) == 6 and figures["settings"] == dict(batch=1, depth=1, width=64, heads=2)
    assert out.with_suffix(".png").stat().st_size > 1000 and "`identity`" in out.with_suffix(".md").read_text()
    with pytest.raises(SystemExit, match="give another --out"):
        main("--lengths", "32", "--width=128")
    with pytest.raises(SystemExit):
        main("--lengths", "0")
    assert "all must be positive" in capsys.readouterr().err


def test_a_process_measures_and_its_end_is_told():
    """Real processes: two cells; then one that fails at the second, and one that is late."""
    args = bench.parse(["--steps=2"])
    ran = list(bench.run_mixer("identity", [16, 32], args))
    assert [row["status"] for row in ran] == ["ran", "ran"] and all(row["ms"] > 0 and row["bytes"] > 0 for row in ran)
    args.gigabytes = 1e-9
    (row,) = bench.run_mixer("identity", [16], args)
    assert row["status"].endswith("GB of memory") and "ms" not in row
    args.budget = 0.05
    assert [row["status"] for row in bench.run_mixer("identity", [16, 32], args)] == ["not within 0.05 s", "not reached"]
    args.budget, args.heads = 60, 7
    first, second = bench.run_mixer("softmax", [16, 32], args)
    assert "width 64 is not divisible by num_heads=7" in first["status"] and second["status"] == "not reached"
