"""What a run's folder says about it: its settings, and how it was begun.

The settings are there so that runs cannot be mixed up; the command, the machine and the
versions, so that a result can say where it comes from.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import sys
from typing import Any, TypeVar

from benchmarks.measure import provenance

Experiment = TypeVar("Experiment")


class RunError(Exception):
    """A run cannot go on. The message says why and what to do, and is all to show."""


def claim(experiment: Any) -> pathlib.Path:
    """Makes an experiment's `folder` its run, or finds that it is already.

    Raises:
      RunError: the folder holds the run of other settings.
    """
    folder, config = experiment.folder, settings(experiment)
    path = folder / "experiment.json"
    if path.exists():
        others = json.loads(path.read_text())
        if others != config:
            changed = sorted(_differences(config, others))
            raise RunError(
                f"{folder}: holds a run with other settings ({', '.join(changed)}). "
                "Name another folder, or delete this one."
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=2) + "\n")
        origin = json.dumps({"command": command(), **provenance()}, indent=2)
        (folder / "origin.json").write_text(origin + "\n")
    return folder


def read(folder: pathlib.Path, like: Experiment) -> Experiment:
    """Reads the experiment that a folder is the run of; `like` is one of its kind.

    Raises:
      RunError: the folder is not that of a run.
    """
    path = folder / "experiment.json"
    if not path.exists():
        raise RunError(f"{folder}: no run here; train first.")
    return dataclasses.replace(
        _updated(like, json.loads(path.read_text())), folder=folder
    )


def origin(folder: pathlib.Path) -> dict[str, str]:
    """Reads how a run was begun: `command`, `device`, versions, `commit`."""
    return json.loads((folder / "origin.json").read_text())


def settings(experiment: Any) -> dict[str, Any]:
    """All but where the run is, as JSON gives it back."""
    fields = dataclasses.asdict(experiment)
    del fields["folder"]
    return json.loads(json.dumps(fields))


def command() -> str:
    """The command line of this process, as one types it."""
    return shlex.join(["python", "-m", "models", *sys.argv[1:]])


def _updated(like: Any, settings: dict[str, Any]) -> Any:
    values = {}
    for name, value in settings.items():
        old = getattr(like, name)
        if dataclasses.is_dataclass(old):
            value = _updated(old, value)
        values[name] = tuple(value) if isinstance(old, tuple) else value
    return dataclasses.replace(like, **values)


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    names = set()
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names |= _differences(a, b)
        elif a != b:
            names.add(name)
    return names
