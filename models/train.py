"""One trainer: AdamW, a bar, metrics as JSON lines, and runs that resume exactly.

The device never waits for Python. Steps go to it `steps_per_call` at a time, as one
compiled loop; while it runs, the next batches are drawn and queued, and only then are
the losses of the call before read and written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from attnx._checks import expect
from models import mesh as meshes
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
      steps_per_call: steps that the device does at one call from Python; a divisor of
        the three numbers of steps above. More where a step takes a millisecond or less.
      seed: of the parameters and the order of the data.

    Raises:
      ValueError: `steps_per_call` does not divide one of the others.
    """

    steps: int = 800
    learning_rate: float = 2.5e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    save_every: int = 100
    validate_every: int = 100
    steps_per_call: int = 1
    seed: int = 0

    def __post_init__(self):
        count = self.steps_per_call
        expect(count >= 1, "steps_per_call", "at least 1", count)
        for name in ("steps", "save_every", "validate_every"):
            whole = getattr(self, name)
            wanted = f"a divisor of {name}={whole}"
            expect(whole % count == 0, "steps_per_call", wanted, count)


@dataclasses.dataclass(frozen=True)
class Task(Generic[Model]):
    """What the trainer needs to know of what it trains.

    Attributes:
      model: builds it from keys.
      batch: `step -> batch`, a pytree of arrays or numbers, the same for the same step
        whatever came before. Random numbers for the loss can be made from a step in it.
      loss: `(model, batch) -> scalar`.
      validate: `model -> loss` on a fixed sample of data held out.
      tokens: in a batch.
      unit: of the loss.
      marks: losses of others to compare it with, by name.
    """

    model: Callable[[nnx.Rngs], Model]
    batch: Callable[[int], Any]
    loss: Callable[[Model, Any], jax.Array]
    validate: Callable[[Model], float]
    tokens: int
    unit: str = "loss"
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Interrupted(RunError):
    """The run was asked to stop, and has saved a checkpoint."""


class TrainState(NamedTuple):
    """All that changes while training; with the step, all that a checkpoint holds.

    Attributes:
      params: what the optimizer changes.
      variables: what the model changes when it is called, such as centroids.
      optimizer: its state.
    """

    params: optax.Params
    variables: nnx.State
    optimizer: optax.OptState


def train(
    task: Task[Model],
    config: TrainConfig,
    folder: pathlib.Path,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Trains a model, or goes on from the folder's last checkpoint.

    However often a run is stopped and resumed, its parameters come out the same, bit
    for bit, as those of a run that was not.

    Args:
      task: the model, its loss and its data.
      config: how to train.
      folder: of the run. It gets `checkpoints/` and `metrics.jsonl`, one line a step.
      mesh: of `models.mesh.make_mesh`, to train on many devices; another than before is
        as good, and gives the same up to rounding.

    Returns:
      The trained model, on one device and in evaluation mode.

    Raises:
      Interrupted: Ctrl-C or SIGTERM came; a checkpoint of the last step is there.
      DamagedCheckpoint: the last checkpoint cannot be read.
    """
    graph, state, constants = _begin(task, config)
    whole, optimizer, start = graph, _optimizer(config), 0
    stays: Any = None
    if mesh is not None:
        model = nnx.merge(graph, state.params, state.variables, constants)
        meshes.attend_in_pieces(model, mesh)
        graph = nnx.graphdef(model)
        stays = meshes.of_state(mesh, state)
        state = jax.device_put(state, stays)
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoints.latest is not None:
        state, start = checkpoints.restore(state), checkpoints.latest

    def step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        def loss(params):
            # A copy: what belongs to the trace outside cannot be changed here.
            model = nnx.merge(graph, params, state.variables, constants, copy=True)
            value = task.loss(model, batch)
            return value, nnx.split(model, *_KINDS)[2]

        (value, variables), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        changes, optimizer_state = optimizer.update(
            grads, state.optimizer, state.params
        )
        params = optax.apply_updates(state.params, changes)
        return TrainState(params, variables, optimizer_state), value

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(stays, None))
    def update(state: TrainState, batches: Any) -> tuple[TrainState, jax.Array]:
        return jax.lax.scan(step, state, batches)

    def trained() -> Model:
        parts = state.params, state.variables
        if mesh is not None:
            parts = jax.device_put(parts, jax.devices()[0])
        return _trained(whole, *parts, constants)

    metrics = _Metrics(folder / "metrics.jsonl", start, config.steps, task.tokens)
    with _stop_requests() as stop_requested, metrics:
        for first in range(start, config.steps, config.steps_per_call):
            done = first + config.steps_per_call
            batches = [task.batch(i) for i in range(first, done)]
            stacked = jax.tree.map(_stack, *batches)
            if mesh is not None:
                stacked = jax.device_put(stacked, meshes.of_batches(mesh, stacked))
            state, losses = update(state, stacked)
            last, validation = done == config.steps, None
            if last or done % config.validate_every == 0:
                validation = task.validate(trained())
            metrics.add(losses, validation)
            stop = stop_requested()
            if last or stop or done % config.save_every == 0:
                metrics.write()  # A checkpoint has the lines of all its steps.
                path = checkpoints.save(done, state)
            if stop and not last:
                raise Interrupted(
                    f"stopped after step {done} of {config.steps}; the same command "
                    f"goes on from {path}."
                )
    return trained()


def load(task: Task[Model], config: TrainConfig, folder: pathlib.Path) -> Model:
    """Reads the model of a run from its last checkpoint, in evaluation mode.

    Raises:
      RunError: the folder has no checkpoint.
      DamagedCheckpoint: its last checkpoint cannot be read.
    """
    graph, state, constants = _begin(task, config)
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoints.latest is None:
        raise RunError(f"{folder}: no checkpoint here; train first.")
    state = checkpoints.restore(state)
    return _trained(graph, state.params, state.variables, constants)


def read_metrics(folder: pathlib.Path) -> list[dict[str, float]]:
    """Reads the lines of a run: `step`, `loss`, `tokens_per_second`, `validation`."""
    with open(folder / "metrics.jsonl") as lines:
        return [json.loads(line) for line in lines]


# The parts of a model: what is trained, what changes besides, and what stays.
_KINDS = (nnx.Param, nnx.Variable, ...)


def _begin(task: Task, config: TrainConfig):
    """Builds the model: its structure, what changes in training, and what does not."""
    model = task.model(nnx.Rngs(config.seed))
    graph, params, variables, constants = nnx.split(model, *_KINDS)
    optimizer = _optimizer(config).init(params)
    return graph, TrainState(params, variables, optimizer), constants


def _trained(graph: nnx.GraphDef, *parts: Any) -> Any:
    model = nnx.merge(graph, *parts)
    model.eval()
    return model


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
    """The bar on the screen and the lines in the file, one call behind the device."""

    def __init__(self, path: pathlib.Path, start: int, steps: int, tokens: int):
        # Steps after the checkpoint will be done again: their lines go.
        kept = path.read_text().splitlines()[:start] if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))
        self._file = open(path, "a")  # noqa: SIM115 (closed by __exit__)
        self._bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=0.5
        )
        self._step = start
        self._tokens = tokens
        self._clock = time.perf_counter()
        self._pending = None
        self._loss = self._validation = None

    def add(self, losses: jax.Array, validation: float | None) -> None:
        """Takes the losses of a call, and writes those of the call before.

        Args:
          losses: `[steps]`, which the device may not have computed yet.
          validation: the loss on data held out, after the last of the steps.
        """
        self.write()
        self._pending = losses, validation

    def write(self) -> None:
        """Waits for the losses that were added last, and writes them."""
        if self._pending is None:
            return
        losses, validation = self._pending
        self._pending = None
        losses = np.asarray(losses)
        now = time.perf_counter()
        rate = self._tokens * len(losses) / (now - self._clock)
        self._clock = now
        for i, loss in enumerate(losses.tolist(), start=1):
            self._step += 1
            line = {
                "step": self._step,
                "loss": loss,
                "tokens_per_second": round(rate),
            }
            if validation is not None and i == len(losses):
                line["validation"] = self._validation = validation
            print(json.dumps(line), file=self._file)
            # Shown smoothed: single batches jump about.
            self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        self._file.flush()
        shown = {"loss": f"{self._loss:.3f}", "tokens/s": f"{rate:,.0f}"}
        if self._validation is not None:
            shown["validation"] = f"{self._validation:.3f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(len(losses))

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()
        self._bar.close()
        self._file.close()


def _stack(*leaves: Any) -> np.ndarray | jax.Array:
    """The batches of a call as one; arrays of the device stay on it."""
    on_device = any(isinstance(x, jax.Array) for x in leaves)
    return jnp.stack(leaves) if on_device else np.stack(leaves)


@contextlib.contextmanager
def _stop_requests() -> Generator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a request; a second acts at once."""
    requested = False

    def request(number, frame):
        nonlocal requested
        requested = True
        signal.signal(number, before[number])
        tqdm.write("Stopping after these steps (again to stop at once).")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request) for number in signals}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
