"""The figures of a GPU's results."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import gpu_cases

MODES = ("forward", "forward+backward")
# Candidates from the top bar down: label and color. Copies are left out.
STYLES = {
    "pallas": ("attnx pallas", "C0"),
    "xla": ("attnx xla", "C9"),
    "cudnn": ("jax.nn, cuDNN", "C7"),
    "jax.nn": ("jax.nn, XLA", "C1"),
    "window": ("window of as many blocks", "C2"),
    "causal cudnn": ("causal softmax, cuDNN", "0.75"),
    "dense cudnn": ("dense softmax, cuDNN", "0.85"),
}
# The cases of time against length have a figure of their own.
LENGTH = r"per head decay B(\d+) T(\d+) N4 H128"
HEIGHT = 0.28


def bars(rows: list[dict], device: str) -> Figure | None:
    """Time of every case beside its peers."""
    rows = [
        row
        for row in rows
        if row["candidate"] in STYLES and not re.match(LENGTH, row["case"])
    ]
    # Rows stand in the order in which they were timed.
    order = {case.name: i for i, case in enumerate(gpu_cases.cases())}
    found = dict.fromkeys(row["case"] for row in rows)
    cases = sorted(found, key=lambda name: order.get(name, len(order)))
    if not cases:
        return None
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.5 + 0.4 * len(cases)), sharey=True, layout="constrained"
    )
    candidates = list(STYLES)
    for ax, mode in zip(axes, MODES, strict=True):
        labels = dict(STYLES)
        for place, case in enumerate(cases):
            shown = [r for r in rows if (r["case"], r["mode"]) == (case, mode)]
            shown.sort(key=lambda row: candidates.index(row["candidate"]))
            for i, row in enumerate(shown):
                name = row["candidate"]
                label, _ = labels.pop(name, (None, None))
                ax.barh(
                    place + (i - (len(shown) - 1) / 2) * HEIGHT,
                    row["milliseconds"],
                    HEIGHT,
                    label=label,
                    color=STYLES[name][1],
                )
        ax.set(xscale="log", xlabel="milliseconds", title=mode)
        ax.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(cases)), cases, fontsize=7)
    axes[0].set_ylim(len(cases) - 0.5, -0.5)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=7,
    )
    figure.suptitle(f"{device}, bfloat16", fontsize=9)
    return figure


def length(rows: list[dict], device: str) -> Figure | None:
    """Time per token of linear attention, at a fixed number of tokens in all."""
    found = [(re.match(LENGTH, row["case"]), row) for row in rows]
    points = [
        (row, int(match.group(2)), int(match.group(1)) * int(match.group(2)))
        for match, row in found
        if match
    ]
    if not points:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    lines = {
        "pallas": STYLES["pallas"],
        "causal cudnn": ("causal softmax, cuDNN", "C7"),
    }
    for ax, mode in zip(axes, MODES, strict=True):
        for candidate, (label, color) in lines.items():
            line = sorted(
                (tokens, 1e6 * row["milliseconds"] / count)
                for row, tokens, count in points
                if row["mode"] == mode and row["candidate"] == candidate
            )
            if line:
                ax.plot(*zip(*line, strict=True), "o-", color=color, label=label)
        ax.set(xscale="log", yscale="log", xlabel="tokens in a sequence", title=mode)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("nanoseconds a token")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{device}: 4 heads of 128, {points[0][2]:,} tokens", fontsize=9)
    return figure


def sparsity(rows: list[dict], device: str) -> Figure | None:
    """Speed-up over dense attention by cuDNN against the share of blocks visited."""
    percent = {row["case"]: re.match(r"blocks (\d+)%", row["case"]) for row in rows}
    times = {
        (row["candidate"], row["mode"], int(found.group(1))): row["milliseconds"]
        for row in rows
        if (found := percent[row["case"]])
    }
    dense = {key[1:]: time for key, time in times.items() if key[0] == "dense cudnn"}
    if not dense:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for ax, mode in zip(axes, MODES, strict=True):
        for candidate in ("pallas", "xla"):
            points = sorted(
                (each, dense[mode, each] / time)
                for (name, of, each), time in times.items()
                if name == candidate and of == mode and (mode, each) in dense
            )
            if points:
                label, color = STYLES[candidate]
                ax.plot(*zip(*points, strict=True), "o-", color=color, label=label)
        shares = sorted({each for _, each in dense})
        ideal = [100 / each for each in shares]
        ax.plot(shares, ideal, "k--", lw=1, label="work skipped, no cost")
        ax.set(xscale="log", yscale="log", xlabel="% of the blocks visited", title=mode)
        ax.set_xticks(shares, map(str, shares))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("times as fast as dense cuDNN")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{device}: random blocks of 128x128, bfloat16", fontsize=9)
    return figure
