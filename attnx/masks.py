"""Masks by name: `attnx.masks.Causal() & attnx.masks.Window(256, 0)`."""

from attnx.softmax.mask import Mask as Mask
from attnx.softmax.mask import from_fn as from_fn
from attnx.softmax.mask_plot import plot as plot
from attnx.softmax.masks import Causal as Causal
from attnx.softmax.masks import Full as Full
from attnx.softmax.masks import Lengths as Lengths
from attnx.softmax.masks import Offset as Offset
from attnx.softmax.masks import Power as Power
from attnx.softmax.masks import Prefix as Prefix
from attnx.softmax.masks import Segments as Segments
from attnx.softmax.masks import Strided as Strided
from attnx.softmax.masks import Window as Window
from attnx.softmax.neighborhood import Neighborhood as Neighborhood
