"""What `make demo` runs: a language model trained on a real text, and all about it."""

from __future__ import annotations

import jax
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from benchmarks import accuracy
from models import data, runs, text
from models.anchors import ANCHORS
from models.plot import plot
from models.train import train


def show(experiment: text.TextExperiment) -> None:
    """Trains, or goes on, or finds it done; then measures, writes, draws and checks."""
    console = Console()
    training = experiment.training
    folder = runs.claim(experiment)
    console.print(
        f"A language model whose layers mix tokens by linear attention learns the King "
        f"James Bible, byte by byte: {training.steps} steps of "
        f"{experiment.batch_size * experiment.length} bytes on "
        f"{jax.devices()[0].device_kind}. Ctrl-C stops it; the same command goes on."
    )
    model = train(experiment.task(), training, folder)

    _, validation = data.split(data.king_james())
    loss = text.nats_per_byte(model, validation, experiment.validation_length)
    console.print(_losses(loss))
    written = text.sample(model, "In the beginning ", 400, temperature=0.7, seed=0)
    console.print(Panel(written, title="Written from the recurrent state"))
    console.print(f"Loss curve: {plot(folder, ANCHORS)}")
    console.print(f"Checkpoint: {folder / 'checkpoints' / str(training.steps)}")
    console.print(accuracy.table(accuracy.measure()))


def _losses(loss: float) -> Table:
    """The model's loss among the anchors, best first."""
    table = Table(title="The last tenth of the text, held out", min_width=44)
    table.add_column("")
    table.add_column("nats per byte", justify="right")
    for name, value in sorted(
        {**ANCHORS, "this model": loss}.items(), key=lambda x: x[1]
    ):
        style = "bold" if name == "this model" else None
        table.add_row(name, f"{value:.3f}", style=style)
    return table
