"""Layers for flax.nnx: one projection module, interchangeable mixers."""

from attnx.nn.attention import Attention as Attention
from attnx.nn.eviction import EvictionMixer as EvictionMixer
from attnx.nn.interop import attention_fn as attention_fn
from attnx.nn.linear import Hedgehog as Hedgehog
from attnx.nn.linear import LinearMixer as LinearMixer
from attnx.nn.linear import LogDecay as LogDecay
from attnx.nn.lrpe import LRPE as LRPE
from attnx.nn.mixers import Mixer as Mixer
from attnx.nn.mixers import NeighborhoodMixer as NeighborhoodMixer
from attnx.nn.mixers import SoftmaxMixer as SoftmaxMixer
from attnx.nn.moh import HeadRouter as HeadRouter
from attnx.nn.moh import MoHMixer as MoHMixer
from attnx.nn.moh import QueryRouter as QueryRouter
from attnx.nn.norms import SRMSNorm as SRMSNorm
from attnx.nn.rotary import Rotary as Rotary
from attnx.nn.routing import RoutingMixer as RoutingMixer
from attnx.nn.routing import SplitMixer as SplitMixer
from attnx.nn.select import BoundaryPredictor as BoundaryPredictor
from attnx.nn.select import DHSAMixer as DHSAMixer
from attnx.nn.select import MoBAMixer as MoBAMixer
from attnx.nn.select import VMoBAMixer as VMoBAMixer
from attnx.nn.superlinear import SuperlinearMixer as SuperlinearMixer
from attnx.nn.taylor import TaylorMixer as TaylorMixer
from attnx.nn.window import WindowMixer as WindowMixer
