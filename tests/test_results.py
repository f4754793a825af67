"""The results that the repository keeps, and how they come there."""

import dataclasses
import json
import pathlib

import pytest

from models import results, runs, speed
from models.__main__ import EXPERIMENTS, LANGUAGE_MODELS
from models.lm import LMConfig
from models.train import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
WHERE = {"command": "python -m models train f", "device": "a CPU", "jax": "0"}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Results and pages of another repository, empty at first."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "DOCS", tmp_path)
    (tmp_path / "figures").mkdir()
    return tmp_path


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `record` reads of an experiment."""

    folder: pathlib.Path
    training: TrainConfig

    def task(self):
        return dataclasses.make_dataclass("Task", ["tokens"])(600)


@pytest.fixture
def finished(tmp_path):
    """A run of two steps that took a minute each."""
    experiment = Experiment(tmp_path / "run", TrainConfig(steps=2, seed=3))
    runs.claim(experiment)
    lines = [json.dumps({"step": i, "tokens_per_second": 10}) for i in (1, 2)]
    (experiment.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return experiment


def test_page_is_what_the_results_say():
    """After a change: python -m models results."""
    assert (ROOT / "docs" / "results.md").read_text() == results.page()


def test_every_experiment_has_its_row():
    """But for `lm`, which is there for the demo."""
    names = [name for section in results.SECTIONS for name in section.targets]
    assert len(names) == len(set(names))
    assert {*names, "lm"} == EXPERIMENTS.keys()
    assert LANGUAGE_MODELS.keys() >= set(speed.DEFAULT)
    for name in names:
        assert EXPERIMENTS[name].folder == pathlib.Path("runs") / name


def test_kept_results_are_of_these_experiments():
    for result in results.read("*-seed*.json"):
        seed = result["config"]["training"]["seed"]
        assert result["path"].name == f"{result['experiment']}-seed{seed}.json"
        assert result["commit"] not in ("", "unknown")
        assert "dirty" not in result["commit"]


def test_recorded_run_says_how_it_came_about(elsewhere, finished):
    results.record("moba", finished, {"nats per byte": 1.25}, commit="abc")
    [result] = results.read("*.json")
    assert result["path"].name == "moba-seed3.json"
    assert result["minutes"] == 2
    assert (result["seed"], result["commit"]) == (3, "abc")
    assert result["measures"] == {"nats per byte": 1.25}
    assert result["config"]["training"]["steps"] == 2
    assert result["command"].startswith("python -m models")
    assert {"device", "jax", "python"} <= result.keys()


def test_unfinished_run_is_not_recorded(elsewhere, finished):
    longer = dataclasses.replace(finished, training=TrainConfig(steps=4))
    with pytest.raises(runs.RunError, match="only 2 of 4 steps are done"):
        results.record("moba", longer, {"nats per byte": 1.25}, commit="abc")
    assert not results.read("*.json")


def test_page_shows_what_was_reached_and_what_was_missed(elsewhere):
    common = {**WHERE, "seed": 0, "minutes": 1.26, "commit": "abc", "config": {}}
    for name, value in {"digits-vit": 0.9761, "digits-nat": 0.9722}.items():
        measures = {"accuracy": value, "cross-entropy": 0.1}
        results.keep(
            f"{name}-seed0", {"experiment": name, "measures": measures, **common}
        )
    page = results.page()
    links = "](../models/results/digits-{}-seed0.json) | accuracy at least 0.975 | "
    assert (
        links.format("vit") + "0.976 | cross-entropy 0.100 | 0 | 1.3 | a CPU, jax 0"
        in page
    )
    assert links.format("nat") + "0.972, missed |" in page
    not_run = "| mnist-vit | accuracy at least 0.97 | not run yet | "
    assert not_run in page
    assert "Not run yet: `python -m models speed" in page


def test_some_bounds_are_what_another_reached(elsewhere):
    common = {**WHERE, "seed": 0, "minutes": 1, "commit": "abc", "config": {}}

    def keep(name, value):
        result = {"experiment": name, "measures": {"nats per byte": value}, **common}
        results.keep(f"{name}-seed0", result)

    keep("tnl", 1.02)
    row = "nats per byte at most 1.03 of transformer's | {} |"
    assert row.format("1.020, missed") in results.page()
    keep("transformer", 1.0)
    keep("based", 1.04)
    page = results.page()
    assert row.format("1.020") in page
    assert row.format("1.040, missed") in page


def test_speed_is_measured_and_shown(elsewhere):
    config = LMConfig(("softmax", "window"), num_layers=2, d_model=16, num_heads=2)
    config = dataclasses.replace(config, mlp_dim=0, window=4)
    times = dict(speed.measure(config, (8, 16), 2, tokens=2, repeats=1))
    assert times.keys() == {8, 16}
    assert all(0 < time < 1e4 for time in times.values())
    result = {"experiment": "hybrid", **WHERE, "commit": "abc", "batch_size": 2}
    result["milliseconds"] = {"1024": 0.5, "131072": 0.6}
    results.keep("speed-hybrid", result)
    result["milliseconds"] = {"1024": 0.25}
    results.keep("speed-tnl", {**result, "experiment": "tnl"})
    page, figure = results.write()
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "| experiment | sequences | 1,024 | 131,072 | where | command |" in text
    assert "speed-hybrid.json) | 2 | 0.50 | 0.60 | a CPU, jax 0, abc |" in text
    assert "speed-tnl.json) | 2 | 0.25 |  | a CPU" in text
