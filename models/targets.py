"""What each experiment should show: the sections of docs/results.md."""

from __future__ import annotations

import math
from typing import NamedTuple

from models.anchors import ANCHORS


class Target(NamedTuple):
    """A measure of an experiment to show, and the bound that it should keep, if any.

    With `of`, the bound is in units of what that experiment reached in the measure.
    """

    measure: str
    at_least: float = -math.inf
    at_most: float = math.inf
    of: str | None = None

    def __str__(self) -> str:
        of = f" of {self.of}'s" if self.of else ""
        if self.at_least > -math.inf:
            return f"{self.measure} at least {self.at_least}{of}"
        if self.at_most < math.inf:
            return f"{self.measure} at most {self.at_most}{of}"
        return "none"

    def reached(self, value: float, unit: float = 1.0) -> bool:
        return self.at_least * unit <= value <= self.at_most * unit


class Section(NamedTuple):
    """Experiments that are measured alike: of each, what it should reach."""

    title: str
    words: str
    targets: dict[str, Target]


_LOSS = Target("nats per byte", at_most=1.20)
_NEAR_LOSS = Target("nats per byte", at_most=1.03, of="transformer")
_NEAR_LAST = Target("nats of the last byte", at_most=1.03, of="transformer")
_ANY_LOSS = Target("nats per byte")
SECTIONS = (
    Section(
        "King James Bible",
        "Nats per byte of the last tenth of the text, the rest of which was learned "
        "from; at most ten million parameters. Marks: "
        + ", ".join(f"{name} {value}" for name, value in ANCHORS.items())
        + ". The last byte is that of a window of 1024: nothing follows it. Which "
        "tokens share a cluster of `routing` depends on the whole window; what `moba` "
        "chooses does not. `moh` activates nine of the twelve heads that `moh-dense` "
        "has. The trainer's sample is the first 16 KiB of that text, which `train` "
        "measures as it goes, last in `metrics.jsonl`.",
        {
            "transformer": _LOSS,
            "tnl": _NEAR_LOSS,
            "based": _NEAR_LOSS,
            "hybrid": _LOSS,
            "moh-dense": _LOSS,
            "moh": Target("nats per byte", at_most=1.01, of="moh-dense"),
            "moh-continued": _ANY_LOSS,
            "gated-linear": _ANY_LOSS,
            "hybrid-window": _ANY_LOSS,
            "window": _ANY_LOSS,
            "power": _ANY_LOSS,
            "moba": _NEAR_LOSS,
            "routing": _NEAR_LAST,
        },
    ),
    Section(
        "Handwritten digits",
        "Accuracy on a fifth of each class, drawn by scikit-learn's "
        "`train_test_split(test_size=0.2, stratify=labels, random_state=0)`: 360 of "
        "the 1797 digits of 8x8 pixels, 1000 of the 5000 of MNIST. On the same split "
        "logistic regression reaches 0.967 and 0.896, a support vector machine with a "
        "Gaussian kernel 0.994 and 0.954. The model is that of the last step: none is "
        "chosen by what it makes of these images.",
        {
            "digits-vit": Target("accuracy", at_least=0.975),
            "digits-nat": Target("accuracy", at_least=0.975),
            "mnist-vit": Target("accuracy", at_least=0.97),
            "mnist-nat": Target("accuracy", at_least=0.97),
        },
    ),
    Section(
        "Associative recall",
        "Accuracy of the values named by queries in 10240 sequences that hold 4 to 64 "
        "pairs of key and value in 64 to 512 tokens, out of a vocabulary of 8192: the "
        "task of Zoology (arXiv:2312.04927) and Based. Training draws the same "
        "lengths. All have two layers of a short convolution and the mixer, D = 64. "
        "Plain linear attention should fall short where pairs are many.",
        {
            "recall-softmax": Target("accuracy", at_least=0.99),
            "recall-based": Target("accuracy", at_least=0.95),
            "recall-linear": Target("accuracy, 64 pairs in 512", at_most=0.9),
        },
    ),
    Section(
        "Pointer networks",
        "1000 sets of points that training did not draw, answered by beam search, "
        "beside exact answers. Vinyals et al. (2015) reach 0.726 of hulls of 50 points "
        "and, trained on 5 to 50, 0.503 of those of 100; 0.807 and 0.226 of Delaunay "
        "triangulations of 5 and 10. Of tours: how much longer than the shortest the "
        "best of the beam is. Covered areas are of the outputs that are polygons. The "
        "encoder and decoder of LSTMs, as published, fall short of the paper on hulls "
        "and triangulations: after 30,000 steps of minutes in all their loss still "
        "falls, and the encoder of attention is past each mark with fewer.",
        {
            "hull": Target("sequence accuracy, 50 points", at_least=0.726),
            "hull-attention": Target("sequence accuracy, 50 points", at_least=0.726),
            "hull-range": Target("sequence accuracy, 100 points", at_least=0.503),
            "hull-range-attention": Target(
                "sequence accuracy, 100 points", at_least=0.503
            ),
            "delaunay-5": Target("sequence accuracy, 5 points", at_least=0.807),
            "delaunay-5-attention": Target(
                "sequence accuracy, 5 points", at_least=0.807
            ),
            "delaunay": Target("sequence accuracy, 10 points", at_least=0.226),
            "delaunay-attention": Target(
                "sequence accuracy, 10 points", at_least=0.226
            ),
            "tsp": Target("excess of the shortest, 10 points", at_most=0.01),
            "tsp-20": Target("excess of the shortest, 20 points", at_most=0.03),
            "tsp-attention": Target("excess of the shortest, 20 points", at_most=0.03),
        },
    ),
    Section(
        "Needles at a distance",
        "Accuracy of values that a token named up to 1024 tokens back, the mean over "
        "eight ranges of distance. A passkey is one value of sixteen (chance 0.063), "
        "for six layers that see blocks at powers of two (PowerAttention, "
        "arXiv:2503.03588), or a window of as many keys, 62 in the mean, which reach "
        "366 back. Needles are two, each of eight values (chance 0.125), for a layer "
        "of short memory below one of attention: Superlinear (arXiv:2601.18401), a "
        "window of as many keys, or dense.",
        {
            "passkey-power": Target("accuracy", at_least=0.9),
            "passkey-window": Target("accuracy, 896 to 1024 back", at_most=0.1),
            "needle-superlinear": Target("accuracy", at_least=0.9),
            "needle-window": Target("accuracy, 896 to 1024 back", at_most=0.2),
            "needle-dense": Target("accuracy", at_least=0.99),
        },
    ),
)
