"""Language models by name, for an H100: at most 10 million parameters each."""

from __future__ import annotations

import dataclasses
import pathlib

from models.lm import LMConfig
from models.text import TextExperiment
from models.train import TrainConfig

_SIZES = LMConfig(
    num_layers=6, d_model=384, num_heads=6, mlp_dim=896, dropout=0.1, dtype="bfloat16"
)
# 39 million bytes, 10 times the training text: hence the dropout. That is 3e15 products
# and sums at most, or 50 seconds at 60 TFLOP/s.
_TRAINING = TrainConfig(
    steps=1200,
    learning_rate=1e-3,
    warmup_steps=100,
    save_every=400,
    validate_every=200,
    steps_per_call=10,
)


def _preset(name: str, *pattern: str, **sizes) -> TextExperiment:
    """A decoder of the common sizes, but for those that are given."""
    sizes = {"activation": "silu", **sizes}
    return TextExperiment(
        folder=pathlib.Path("runs") / name,
        model=dataclasses.replace(_SIZES, pattern=pattern, **sizes),
        training=_TRAINING,
        batch_size=32,
        length=1024,
    )


# Longer, for routers to settle.
_ROUTED = dataclasses.replace(_TRAINING, steps=1600)
_HEADS = {"num_heads": 12, "shared_heads": 5, "active_heads": 9}
_GATED = {"mlp_dim": 768}
PRESETS = {
    # All as Llama: rotary positions, SwiGLU.
    "transformer": _preset("transformer", "softmax"),
    # TransNormerLLM: arXiv:2307.14995.
    "tnl": _preset(
        "tnl", "lightning_lrpe", *["lightning"] * 5, activation="identity", **_GATED
    ),
    # Based: arXiv:2402.18668.
    "based": _preset("based", "convolution", "taylor", "window", mlp_dim=864),
    "window": _preset("window", "window", window=128),
    "power": _preset("power", "power", block_size=32),
    "moba": _preset("moba", "moba", block_size=128, top_k=3),
    # Routing Transformer (arXiv:2003.05997): half of the last layer's heads.
    "routing": _preset("routing", *["window"] * 5, "routing", window=128),
    "gated-linear": _preset("gated-linear", "gated_linear", **_GATED),
    # One layer of softmax to two of linear attention, or of a window.
    "hybrid": _preset("hybrid", "lightning", "lightning", "softmax", **_GATED),
    "hybrid-window": _preset("hybrid-window", "window", "window", "softmax"),
    # Mixture-of-Head (arXiv:2410.11842): nine of twelve heads active, beside all.
    "moh": dataclasses.replace(_preset("moh", "moh", **_HEADS), training=_ROUTED),
    "moh-dense": dataclasses.replace(
        _preset("moh-dense", "softmax", num_heads=12), training=_ROUTED
    ),
    # A trained transformer that goes on with four of six heads active.
    "moh-continued": dataclasses.replace(
        _preset("moh-continued", "moh_query", shared_heads=2, active_heads=4),
        start_from="runs/transformer",
        training=dataclasses.replace(_TRAINING, steps=1000, learning_rate=3e-4),
    ),
}
