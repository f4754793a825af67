"""Trains, measures and shows the models.

An experiment is a frozen dataclass with `folder`, `training`, `task()` and
`evaluate(model)`. To add one, add it to `EXPERIMENTS` under a name.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import tyro

from benchmarks.measure import provenance
from models import anchors, chunks, data, needle, recall, results, runs, text, vision
from models import demo as demonstration
from models import speed as generation
from models.mesh import make_mesh
from models.plot import plot
from models.pointer import presets as pointer_presets
from models.pointer.picture import draw_answers
from models.presets import PRESETS
from models.train import load, train

LANGUAGE_MODELS = {"lm": text.TextExperiment(), **PRESETS}
POINTER_NETWORKS = pointer_presets.PRESETS
EXPERIMENTS: dict[str, Any] = {
    **LANGUAGE_MODELS,
    **vision.EXPERIMENTS,
    **recall.EXPERIMENTS,
    **needle.EXPERIMENTS,
    **POINTER_NETWORKS,
}
if TYPE_CHECKING:
    Experiment = Any
    Name = LanguageModel = PointerName = str
    LanguageModels = tuple[str, ...]
else:
    Experiment = Annotated[
        tyro.extras.subcommand_type_from_defaults(EXPERIMENTS), tyro.conf.arg(name="")
    ]
    Name = tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]]
    LanguageModel = tyro.conf.Positional[Literal[tuple(LANGUAGE_MODELS)]]
    PointerName = tyro.conf.Positional[Literal[tuple(POINTER_NETWORKS)]]
    LanguageModels = tyro.conf.Positional[tuple[Literal[tuple(LANGUAGE_MODELS)], ...]]


def main() -> None:
    """Runs the command that the arguments name."""
    commands: dict[str, Callable[..., None]] = {
        "train": train_model,
        "eval": evaluate,
        "generate": generate,
        "plot": draw,
        "answers": answers,
        "results": write_results,
        "speed": measure_speed,
        "chunks": measure_chunks,
        "anchors": measure_anchors,
        "demo": demo,
    }
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m models", description=__doc__, config=config
        )
    except runs.RunError as error:
        sys.exit(str(error))


def train_model(experiment: Experiment, mesh: str | None = None) -> None:
    """Train a model, or go on from its last checkpoint.

    Args:
      experiment: what to train.
      mesh: devices, such as data=4,context=2, that share batches and sequences.
    """
    devices = None if mesh is None else make_mesh(mesh)
    folder = runs.claim(experiment)
    task = experiment.task()
    train(task, experiment.training, folder, devices)
    print(plot(folder, task.marks, task.unit))


def evaluate(
    name: Name,
    folder: pathlib.Path | None = None,
    record: bool = False,
    commit: str = "",
) -> None:
    """Measure a trained model on all data held out.

    Args:
      name: which experiment.
      folder: of the run, where it is not the experiment's own.
      record: keep the result of the finished run in models/results.
      commit: to record, where git could not say it when training began.
    """
    experiment, model = _trained(name, folder)
    measures = experiment.evaluate(model)
    for measure, value in measures.items():
        print(f"{value:.4f} {measure}")
    if record:
        results.record(name, experiment, measures, commit)


def generate(
    name: LanguageModel,
    folder: pathlib.Path | None = None,
    prompt: str = "And ",
    num_bytes: int = 500,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Write text with a trained model, from its caches.

    Args:
      name: which experiment.
      folder: of the run, where it is not the experiment's own.
      prompt: what to go on from, not empty.
      num_bytes: how much to write.
      temperature: below 1 prefers what is likely; 0 takes the likeliest byte.
      top_k: write only so many of the likeliest bytes; all by default.
      top_p: of those, only the fewest likeliest that together are so probable.
      seed: of the sample.
    """
    if not prompt:
        raise runs.RunError("prompt: expected at least one character.")
    if top_k is not None and top_k < 1:
        raise runs.RunError(f"top_k: expected at least 1, got {top_k}.")
    if not 0 < top_p <= 1:
        raise runs.RunError(f"top_p: expected above 0 and at most 1, got {top_p}.")
    _, model = _trained(name, folder)
    written = text.sample(
        model,
        prompt,
        num_bytes,
        temperature=temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
    )
    print(written)


def draw(name: Name, folder: pathlib.Path | None = None) -> None:
    """Draw the loss curve of a run.

    Args:
      name: which experiment.
      folder: of the run, where it is not the experiment's own.
    """
    default = EXPERIMENTS[name]
    experiment = runs.read(folder or default.folder, default)
    task = experiment.task()
    print(plot(experiment.folder, task.marks, task.unit))


def answers(name: PointerName, folder: pathlib.Path | None = None) -> None:
    """Draw what a trained pointer network answers, over what is right.

    Args:
      name: which experiment.
      folder: of the run, where it is not the experiment's own.
    """
    print(draw_answers(*_trained(name, folder)))


def write_results() -> None:
    """Write docs/results.md and its figure from models/results."""
    for path in results.write():
        print(path)


def measure_speed(
    names: LanguageModels = generation.DEFAULT,
    batch_size: int = 8,
    contexts: tuple[int, ...] = generation.CONTEXTS,
    commit: str = "",
) -> None:
    """Time generation after few tokens and after many; keep it in models/results.

    Args:
      names: which experiments' models.
      batch_size: sequences generated at once.
      contexts: tokens before those that are generated.
      commit: by default git is asked.
    """
    for name in names:
        config = LANGUAGE_MODELS[name].model
        times = {}
        for context, time in generation.measure(config, contexts, batch_size):
            print(f"{time:8.3f} ms a step after {context} tokens: {name}", flush=True)
            times[str(context)] = round(time, 4)
        result = {
            "experiment": name,
            "command": runs.command(),
            **provenance(commit),
            "batch_size": batch_size,
            "milliseconds": times,
        }
        results.keep(f"speed-{name}", result)


def measure_chunks(seeds: tuple[int, ...] = (0, 1, 2, 3, 4), commit: str = "") -> None:
    """Measure what DHSA's chunks keep of dense attention; keep it in models/results.

    Args:
      seeds: of the texts.
      commit: by default git is asked.
    """
    found = [chunks.measure(seed) for seed in seeds]
    shares = jax.tree.map(lambda *each: [round(x, 5) for x in each], *found)
    for way, budgets in shares.items():
        for budget, each in budgets.items():
            print(f"{sum(each) / len(each):.4f} of the mass on {budget} keys: {way}")
    result = {
        "command": runs.command(),
        **provenance(commit),
        "seeds": seeds,
        "shares": shares,
    }
    results.keep("chunks", result)


def measure_anchors() -> None:
    """Measure what n-gram models and compressors make of the same text."""
    for name, loss in anchors.measure(*data.split(data.king_james())).items():
        print(f"{loss:.4f} nats per byte  {name}")


def demo() -> None:
    """Train the language model and show all that came of it."""
    demonstration.show(LANGUAGE_MODELS["lm"])


def _trained(name: str, folder: pathlib.Path | None) -> tuple[Any, Any]:
    default = EXPERIMENTS[name]
    experiment = runs.read(folder or default.folder, default)
    return experiment, load(experiment.task(), experiment.training, experiment.folder)


if __name__ == "__main__":
    main()
