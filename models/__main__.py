"""Trains, measures and shows the models."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from models import anchors, data, runs, text
from models import demo as demonstration
from models.plot import plot
from models.train import load, train

EXPERIMENTS = {"lm": text.TextExperiment()}
if TYPE_CHECKING:
    Experiment = text.TextExperiment
else:
    Experiment = Annotated[
        tyro.extras.subcommand_type_from_defaults(EXPERIMENTS), tyro.conf.arg(name="")
    ]
Name = tyro.conf.Positional[Literal["lm"]]


def main() -> None:
    """Runs the command that the arguments name."""
    commands: dict[str, Callable[..., None]] = {
        "train": train_model,
        "eval": evaluate,
        "generate": generate,
        "plot": draw,
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


def train_model(experiment: Experiment) -> None:
    """Train a model, or go on from its last checkpoint."""
    folder = runs.claim(experiment)
    train(experiment.task(), experiment.training, folder)
    print(plot(folder, anchors.ANCHORS))


def evaluate(name: Name, folder: pathlib.Path | None = None) -> None:
    """Measure a trained model on the whole validation text.

    Args:
      name: which experiment.
      folder: of the run, where it is not the experiment's own.
    """
    experiment, model = _trained(name, folder)
    _, validation = data.split(data.king_james())
    loss = text.nats_per_byte(model, validation, experiment.validation_length)
    print(f"{loss:.4f} nats per byte")


def generate(
    name: Name,
    folder: pathlib.Path | None = None,
    prompt: str = "And ",
    num_bytes: int = 500,
    temperature: float = 0.7,
    seed: int = 0,
) -> None:
    """Write text with a trained model, from its recurrent state.

    Args:
      name: which experiment.
      folder: of the run, where it is not the experiment's own.
      prompt: what to go on from, not empty.
      num_bytes: how much to write.
      temperature: below 1 prefers what is likely; 0 takes the likeliest byte.
      seed: of the sample.
    """
    if not prompt:
        raise runs.RunError("prompt: expected at least one character.")
    _, model = _trained(name, folder)
    print(text.sample(model, prompt, num_bytes, temperature=temperature, seed=seed))


def draw(name: Name, folder: pathlib.Path | None = None) -> None:
    """Draw the loss curve of a run.

    Args:
      name: which experiment.
      folder: of the run, where it is not the experiment's own.
    """
    folder = folder or EXPERIMENTS[name].folder
    runs.read(folder, EXPERIMENTS[name])
    print(plot(folder, anchors.ANCHORS))


def measure_anchors() -> None:
    """Measure what n-gram models and compressors make of the same text."""
    for name, loss in anchors.measure(*data.split(data.king_james())).items():
        print(f"{loss:.4f} nats per byte  {name}")


def demo() -> None:
    """Train the language model and show all that came of it."""
    demonstration.show(EXPERIMENTS["lm"])


def _trained(name: str, folder: pathlib.Path | None) -> tuple[Any, Any]:
    default = EXPERIMENTS[name]
    experiment = runs.read(folder or default.folder, default)
    return experiment, load(experiment.task(), experiment.training, experiment.folder)


if __name__ == "__main__":
    main()
