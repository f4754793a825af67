"""Checkpoints that a run resumes from exactly, and what a damaged one says."""

from __future__ import annotations

import pathlib
import zlib
from typing import Any

import jax
import numpy as np
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
            saved = {"state": state, "checksum": _checksum(state)}
            self._manager.save(step, args=ocp.args.StandardSave(saved))
        return self.folder / str(step)

    def restore(self, like: Any) -> Any:
        """Reads the last checkpoint, bit for bit as it was saved.

        Args:
          like: a pytree of arrays of the shapes and dtypes that were saved.

        Raises:
          DamagedCheckpoint: files are missing, unreadable or changed, or hold
            something else.
        """
        step = self.latest
        wanted = {"state": like, "checksum": np.zeros((), np.uint32)}
        try:
            saved = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
            if _checksum(saved["state"]) != saved["checksum"]:
                raise ValueError("the checksum is another")
        # Damage surfaces as whatever the layer that met it raises: JSON, zarr, a key.
        except Exception as error:
            before = [other for other in self._manager.all_steps() if other != step]
            instead = (
                f"step {max(before)}, the checkpoint before" if before else "the start"
            )
            raise DamagedCheckpoint(
                f"{self.folder / str(step)}: this checkpoint is damaged "
                f"({type(error).__name__}). Delete that folder to go on from {instead}."
            ) from error
        return saved["state"]


def _checksum(state: Any) -> np.ndarray:
    """Of every byte: the format has none of its own for the arrays."""
    checksum = 0
    for array in jax.tree.leaves(state):
        checksum = zlib.crc32(np.asarray(array).tobytes(), checksum)
    return np.array(checksum, np.uint32)
