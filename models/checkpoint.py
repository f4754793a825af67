"""Checkpoints that a run resumes from exactly, and what a damaged one says."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from models.runs import RunError


class DamagedCheckpoint(RunError):
    """A checkpoint that cannot be read back."""


class Checkpoints:
    """The last two checkpoints of a run, by step.

    A checkpoint appears under its name only when it is complete, so a run killed while
    saving keeps the one before.

    Args:
      folder: holds one folder a checkpoint; made if missing.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False
            ),
        )

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> pathlib.Path:
        """Saves a pytree of arrays as the checkpoint of `step`; says where."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))
        return self.folder / str(step)

    def restore(self, like: Any) -> Any:
        """Reads the last checkpoint, bit for bit as it was saved.

        Args:
          like: a pytree of arrays, or of their shapes and dtypes, as was saved.

        Raises:
          DamagedCheckpoint: files are missing or unreadable, or hold something else.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x)),
            like,
        )
        step = self.latest
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        # Damage surfaces as whatever the layer that met it raises: JSON, zarr, a key.
        except Exception as error:
            others = sorted(set(self._manager.all_steps()) - {step})
            instead = (
                f"step {others[-1]}, the checkpoint before" if others else "the start"
            )
            raise DamagedCheckpoint(
                f"{self.folder / str(step)}: this checkpoint is damaged "
                f"({type(error).__name__}). Delete that folder to go on from {instead}."
            ) from error


def _sharding(x: Any) -> jax.sharding.Sharding:
    return getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.devices()[0]
    )
