"""The figures of docs/, drawn from benchmarks/results."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator

import jax.numpy as jnp
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from attnx import masks
from benchmarks import plot_gpu

FIGURES = pathlib.Path(__file__).parents[1] / "docs" / "figures"
DOCUMENTS = jnp.repeat(jnp.arange(4), jnp.array([14, 22, 9, 19]))
GALLERY = {
    "Causal()": masks.Causal(),
    "Window(12, 4)": masks.Window(12, 4),
    "Causal() | Prefix(20)": masks.Causal() | masks.Prefix(20),
    "Causal() & Segments(ids)": masks.Causal() & masks.Segments(DOCUMENTS),
    "Causal() & Strided(8)": masks.Causal() & masks.Strided(8),
    "Causal() & (Window(12, 0) | sink)": masks.Causal()
    & (masks.Window(12, 0) | masks.from_fn(lambda batch, head, query, key: key < 4)),
    "Neighborhood((64,), 17)": masks.Neighborhood((64,), 17),
    "Neighborhood((64,), 17, stride=8)": masks.Neighborhood((64,), 17, stride=8),
    "Neighborhood((64,), 9, dilation=4)": masks.Neighborhood((64,), 9, dilation=4),
    "Neighborhood((8, 8), 5)": masks.Neighborhood((8, 8), 5),
}
# (family of cases, candidate): its label and style.
LINES = {
    ("causal", "jax.nn"): ("softmax, causal: jax.nn", "C7-s"),
    ("causal", "xla"): ("softmax, causal: attnx", "C0-o"),
    ("window 512", "xla"): ("softmax, window 512: attnx", "C2-o"),
    ("per-head decay", "associative_scan"): ("linear: associative_scan", "C1--^"),
    ("per-head decay", "chunked_einsum"): ("linear: chunked einsum", "C4--v"),
    ("per-head decay", "xla"): ("linear: attnx", "C3-o"),
}


def draw(results: pathlib.Path) -> Iterator[pathlib.Path]:
    """Draws the masks, and what there is for every platform with results."""
    plt.switch_backend("Agg")
    FIGURES.mkdir(parents=True, exist_ok=True)
    yield _masks()
    for path in sorted(results.glob("*.json")):
        runs = json.loads(path.read_text())
        # A row without a time says why there is none.
        rows = [row for run in runs for row in run["rows"] if "milliseconds" in row]
        device = " and ".join(sorted({run["device"] for run in runs}))
        drawings = {
            "cpu": {"time": _lengths},
            "gpu": {
                "time": plot_gpu.bars,
                "sparsity": plot_gpu.sparsity,
                "length": plot_gpu.length,
            },
        }.get(path.stem, {})
        for name, drawing in drawings.items():
            figure = drawing(rows, device)
            if figure is not None:
                target = FIGURES / f"{name}-{path.stem}.png"
                figure.savefig(target, dpi=150)
                plt.close(figure)
                yield target


def _lengths(rows: list[dict], device: str) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, mode in zip(axes, ("forward", "forward+backward"), strict=True):
        for (family, candidate), (label, style) in LINES.items():
            points = sorted(
                (int(length.group(1)), row["milliseconds"])
                for row in rows
                if row["mode"] == mode and row["candidate"] == candidate
                if (length := re.match(rf"{family} T(\d+)", row["case"]))
            )
            if points:
                ax.plot(*zip(*points, strict=True), style, label=label, ms=4)
        ax.set(xscale="log", yscale="log", xlabel="tokens", title=mode)
        ax.set_xticks([1024, 4096, 16384, 65536], ["1K", "4K", "16K", "64K"])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{device}: 4 heads of 64", fontsize=9)
    return figure


def _masks() -> pathlib.Path:
    figure, axes = plt.subplots(2, 5, figsize=(12, 5.2), layout="constrained")
    for ax, (name, mask) in zip(axes.flat, GALLERY.items(), strict=True):
        masks.plot(mask, 64, 64, block_size=(8, 8), ax=ax)
        ax.set_title(name, fontsize=8, family="monospace")
    target = FIGURES / "masks.png"
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
