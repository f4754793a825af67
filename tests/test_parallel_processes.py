"""Two processes that talk over a network run the same program to the same numbers."""

import pathlib
import socket
import subprocess
import sys

import numpy as np
import processes
from helpers import relative_rms


def test_two_processes_are_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    files = [tmp_path / f"{index}.npz" for index in range(2)]
    runs = [
        subprocess.Popen(
            [sys.executable, processes.__file__, address, "2", str(index), str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=pathlib.Path(__file__).parents[1],
        )
        for index, file in enumerate(files)
    ]
    try:
        want = processes.results()
        for run in runs:
            said, _ = run.communicate(timeout=300)
            assert run.returncode == 0, said
    finally:
        for run in runs:
            run.kill()
    for file in files:
        with np.load(file) as saved:
            for name, x in zip(saved, want, strict=True):
                assert relative_rms(saved[name], x) <= 1e-6
