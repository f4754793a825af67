"""Plans the memory of GPU cases on any machine: `python -m benchmarks.memory --case X`.

Needs what `benchmarks.compile` needs: the CUDA compiler's wheels and no GPU. cuDNN has
no plan without one; what it took is in `results/gpu.json`.
"""

from __future__ import annotations

import argparse
import re

import jax

from benchmarks import gpu_cases
from benchmarks.compile import plan_for_h100
from benchmarks.measure import MODES


def main() -> None:
    """Prints arguments, temporaries, results and their sum, in megabytes."""
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--case", default="", help="regular expression")
    given = parser.parse_args()
    for case in gpu_cases.cases():
        if "pallas" not in case.candidates or not re.search(given.case, case.name):
            continue
        arrays = jax.eval_shape(case.arrays)
        for mode in case.modes:
            fn = MODES[mode](case.candidates["pallas"])
            plan = plan_for_h100(fn, *arrays)
            parts = "  ".join(f"{size / 1e6:7.0f}" for size in (*plan, sum(plan)))
            print(f"{case.name:42} {mode:17} {parts} MB", flush=True)


if __name__ == "__main__":
    main()
