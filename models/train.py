"""One trainer: AdamW, a bar, metrics as JSON lines, and runs that resume exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import time
from collections.abc import Callable, Generator
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import optax
from flax import nnx
from tqdm import tqdm

from models.checkpoint import Checkpoints
from models.runs import RunError

Model = TypeVar("Model", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      steps: updates of the parameters.
      learning_rate: of AdamW, at its peak.
      warmup_steps: over which it rises from 0; then it falls along a cosine to 0.
      weight_decay: of matrices, per unit of learning rate.
      max_grad_norm: gradients are scaled down to this global norm.
      save_every: steps from checkpoint to checkpoint.
      validate_every: steps from one validation to the next.
      seed: of the parameters and the order of the data.
    """

    steps: int = 800
    learning_rate: float = 2.5e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    save_every: int = 100
    validate_every: int = 100
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Task(Generic[Model]):
    """What the trainer needs to know of what it trains.

    Attributes:
      model: builds it from keys.
      batch: `step -> batch`, the same for the same step whatever came before.
      loss: `(model, batch) -> scalar`.
      validate: `model -> loss` on a fixed sample of data held out.
      tokens: in a batch.
    """

    model: Callable[[nnx.Rngs], Model]
    batch: Callable[[int], Any]
    loss: Callable[[Model, Any], jax.Array]
    validate: Callable[[Model], float]
    tokens: int


class Interrupted(RunError):
    """The run was asked to stop, and has saved a checkpoint."""


class TrainState(NamedTuple):
    """All that changes while training; with the step, all that a checkpoint holds."""

    params: optax.Params
    optimizer: optax.OptState


def train(task: Task[Model], config: TrainConfig, folder: pathlib.Path) -> Model:
    """Trains a model, or goes on from the folder's last checkpoint.

    However often a run is stopped and resumed, its parameters come out the same, bit
    for bit, as those of a run that was not.

    Args:
      task: the model, its loss and its data.
      config: how to train.
      folder: of the run. It gets `checkpoints/` and `metrics.jsonl`, one line a step.

    Returns:
      The trained model.

    Raises:
      Interrupted: Ctrl-C or SIGTERM came; a checkpoint of the last step is there.
      DamagedCheckpoint: the last checkpoint cannot be read.
    """
    graph, params, constants = _split(task, config)
    optimizer = _optimizer(config)
    state, start = TrainState(params, optimizer.init(params)), 0
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoints.latest is not None:
        state, start = checkpoints.restore(state), checkpoints.latest

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        def loss(params):
            return task.loss(nnx.merge(graph, params, constants), batch)

        value, grads = jax.value_and_grad(loss)(state.params)
        changes, optimizer_state = optimizer.update(
            grads, state.optimizer, state.params
        )
        return TrainState(
            optax.apply_updates(state.params, changes), optimizer_state
        ), value

    metrics = _Metrics(folder / "metrics.jsonl", start, config.steps, task.tokens)
    with _stop_requests() as stop_requested, metrics:
        for step in range(start, config.steps):
            state, loss = update(state, task.batch(step))
            done, validation = step + 1, None
            last = done == config.steps
            if last or done % config.validate_every == 0:
                model = nnx.merge(graph, state.params, constants)
                validation = task.validate(model)
            metrics.write(done, float(loss), validation)
            if last or stop_requested() or done % config.save_every == 0:
                path = checkpoints.save(done, state)
            if stop_requested() and not last:
                raise Interrupted(
                    f"stopped after step {done} of {config.steps}; the same command "
                    f"goes on from {path}."
                )
    return nnx.merge(graph, state.params, constants)


def load(task: Task[Model], config: TrainConfig, folder: pathlib.Path) -> Model:
    """Reads the model of a run from its last checkpoint.

    Raises:
      RunError: the folder has no checkpoint.
      DamagedCheckpoint: its last checkpoint cannot be read.
    """
    graph, params, constants = _split(task, config)
    state = TrainState(params, _optimizer(config).init(params))
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoints.latest is None:
        raise RunError(f"{folder}: no checkpoint here; train first.")
    state = checkpoints.restore(state)
    return nnx.merge(graph, state.params, constants)


def read_metrics(folder: pathlib.Path) -> list[dict[str, float]]:
    """Reads the lines of a run: `step`, `loss`, `tokens_per_second`, `validation`."""
    with open(folder / "metrics.jsonl") as lines:
        return [json.loads(line) for line in lines]


def _split(task: Task, config: TrainConfig):
    """Builds the model: its structure, what is trained, and what is not."""
    model = task.model(nnx.Rngs(config.seed))
    return nnx.split(model, nnx.Param, ...)


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps
    )
    is_matrix = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule, b2=0.95, weight_decay=config.weight_decay, mask=is_matrix
        ),
    )


class _Metrics:
    """The bar on the screen and the lines in the file."""

    def __init__(self, path: pathlib.Path, start: int, steps: int, tokens: int):
        # Steps after the checkpoint will be done again: their lines go.
        kept = path.read_text().splitlines()[:start] if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))
        self._file = open(path, "a")  # noqa: SIM115 (closed by __exit__)
        self._bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=0.5
        )
        self._tokens = tokens
        self._clock = time.perf_counter()
        self._loss = self._validation = None

    def write(self, step: int, loss: float, validation: float | None) -> None:
        now = time.perf_counter()
        rate = self._tokens / (now - self._clock)
        self._clock = now
        line = {"step": step, "loss": loss, "tokens_per_second": round(rate)}
        if validation is not None:
            line["validation"] = self._validation = validation
        print(json.dumps(line), file=self._file, flush=True)
        self._show(loss, rate)

    def _show(self, loss: float, rate: float) -> None:
        # Shown smoothed: single batches jump about.
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        shown = {"loss": f"{self._loss:.3f}", "tokens/s": f"{rate:,.0f}"}
        if self._validation is not None:
            shown["validation"] = f"{self._validation:.3f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()


@contextlib.contextmanager
def _stop_requests() -> Generator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a request; a second acts at once."""
    requested = False

    def request(number, frame):
        nonlocal requested
        requested = True
        signal.signal(number, before[number])
        tqdm.write("Stopping after this step (again to stop at once).")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request) for number in signals}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
