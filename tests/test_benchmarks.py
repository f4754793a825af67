"""The GPU's harness, its page and its figures, by tiny cases without a GPU."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import gpu, gpu_cases, measure, plot, report

WHERE = {
    "platform": "gpu",
    "device": "a GPU",
    "python": "3",
    "jax": "0",
    "attnx": "0",
    "commit": "abc",
}


@pytest.fixture
def tiny():
    """A small case, as the GPU's cases are made, that has a yardstick."""
    return gpu_cases.blocks(50, 1, 512, 2, 16)._replace(
        small=lambda: gpu_cases.blocks(50, 1, 256, 1, 16),
        yardsticks={"copy": lambda query, key, value: -key},
    )


def test_listed_cases_have_distinct_names_and_small_sizes():
    cases = list(gpu_cases.cases())
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    for case in cases:
        small = case.small()
        assert small.op == case.op
        assert small.candidates.keys() == case.candidates.keys()


def test_rows_hold_times_or_the_reason_why_not(tiny):
    def broken(*arrays):
        raise RuntimeError("out of luck\nat length")

    def wrong(query, key, value):
        return jnp.zeros_like(query)

    candidates = {"broken": broken, "wrong": wrong}
    small = tiny.small()
    small = small._replace(candidates={**small.candidates, **candidates})
    case = tiny._replace(
        candidates={**tiny.candidates, **candidates}, small=lambda: small
    )
    rows = list(gpu.measure(case, ["xla", "broken", "wrong", "copy"]))
    assert [(row["candidate"], row["mode"]) for row in rows] == [
        (name, mode)
        for mode in measure.MODES
        for name in ("xla", "broken", "wrong", "copy")
    ]
    for row in rows:
        assert row["candidate"] in gpu.line(row)
        if row["candidate"] in ("xla", "copy"):
            assert row["milliseconds"] >= row["fastest"] > 0
            assert row["timer"] == "host"
        elif row["candidate"] == "broken":
            assert row["error"] == "RuntimeError: out of luck"
        else:
            assert "relative error 1.0e+00" in row["error"]


def test_candidates_must_agree_at_the_timed_size(tiny):
    def off(query, key, value):
        return 1.1 * tiny.candidates["xla"](query, key, value)

    small = tiny.small()
    small = small._replace(
        candidates={**small.candidates, "off": small.candidates["xla"]}
    )
    case = tiny._replace(
        candidates={"xla": tiny.candidates["xla"], "off": off},
        small=lambda: small,
        modes=("forward",),
    )
    *_, row = gpu.measure(case, ["xla", "off"])
    assert row["error"] == "ValueError: relative error 1.0e-01 beside xla: not timed"


def test_saved_rows_replace_those_of_their_case(tmp_path):
    path = tmp_path / "results" / "gpu.json"
    row = {"op": "f", "case": "a", "candidate": "xla", "mode": "forward"}
    other = {**row, "case": "b"}
    measure.save(path, WHERE, [row])
    measure.save(path, WHERE, [other])
    measure.save(path, {**WHERE, "commit": "def"}, [{**row, "runs": 1}])
    runs = json.loads(path.read_text())
    assert [(run["commit"], run["rows"]) for run in runs] == [
        ("abc", [other]),
        ("def", [{**row, "runs": 1}]),
    ]
    measure.save(path, {**WHERE, "device": "another"}, [row])
    assert json.loads(path.read_text())[:2] == runs


def test_page_and_figures_show_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "FIGURES", tmp_path)
    monkeypatch.setattr(report, "DOCS", tmp_path)
    results = tmp_path / "results"
    results.mkdir()
    assert [path.name for path in plot.draw(results)] == ["masks.png"]
    row = {"op": "block_sparse_attention", "case": "blocks 5% B1", "mode": "forward"}
    time = {"milliseconds": 0.5, "megabytes": 1.0, "timer": "cupti"}
    rows = [
        {**row, **time, "candidate": "pallas"},
        {**row, **time, "candidate": "dense cudnn", "milliseconds": 5.0},
        {**row, "candidate": "xla", "error": "ValueError: a | b"},
    ]
    measure.save(results / "gpu.json", WHERE, rows)
    drawn = list(plot.draw(results))
    names = ["masks.png", "time-gpu.png", "sparsity-gpu.png"]
    assert [path.name for path in drawn] == names
    page = report.write(results, drawn).read_text()
    assert "(figures/sparsity-gpu.png)" in page
    assert "| forward | attnx pallas | 0.500 | 1.00x | 1 |" in page
    assert "| forward | dense cudnn | 5.000 | 10.00x | 1 |" in page
    assert "| forward | attnx xla | ValueError: a   b | | |" in page
