"""Vision transformers: image patches under global or neighborhood attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import masks
from attnx._checks import expect
from attnx.nn import Attention, NeighborhoodMixer, SoftmaxMixer

# D, layers, size inside the channel mixer, heads: the names of
# github.com/google-research/big_vision, and "nano" between its two smallest.
SIZES = {
    "mu": (32, 1, 128, 2),
    "nano": (64, 4, 256, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer; `vit` and `nat` make one by the name of its size.

    Attributes:
      image_size: rows and columns of an image, in pixels; of one channel.
      patch_size: side of a patch, in pixels.
      num_classes: what the images are told apart into.
      d_model: D.
      num_layers: blocks of attention and a channel mixer.
      mlp_dim: the size inside the channel mixer.
      num_heads: N, which divides D.
      kernel_size: patches that a patch attends along each axis; None for all.
      dilations: between those patches, repeated over the depth.
      dtype: of the activations. Parameters, the residual stream and logits are float32.

    Raises:
      ValueError: patches do not tile the image.
    """

    image_size: tuple[int, int] = (28, 28)
    patch_size: int = 4
    num_classes: int = 10
    d_model: int = 64
    num_layers: int = 4
    mlp_dim: int = 256
    num_heads: int = 2
    kernel_size: int | None = None
    dilations: tuple[int, ...] = (1,)
    dtype: str = "float32"

    def __post_init__(self):
        tiled = all(size % self.patch_size == 0 for size in self.image_size)
        wanted = f"a divisor of the image's {self.image_size}"
        expect(tiled, "patch_size", wanted, self.patch_size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of patches."""
        return tuple(size // self.patch_size for size in self.image_size)


def vit(name: str, image_size: tuple[int, int], **options) -> ViTConfig:
    """Sizes of a Vision Transformer (ViT, arXiv:2010.11929).

    Args:
      name: one of `SIZES`, a slash, and the side of a patch in pixels.
      image_size: rows and columns, in pixels.
      **options: other fields of `ViTConfig`.

    Raises:
      ValueError: no such size, or patches that do not tile the image.

    Example:
      >>> config = vit("S/16", (224, 224))
      >>> config.d_model, config.grid
      (384, (14, 14))
    """
    size, _, patch = name.partition("/")
    wanted = f"one of {', '.join(SIZES)}, and a patch size, as in S/16"
    expect(size in SIZES and patch.isdecimal() and int(patch) > 0, "name", wanted, name)
    d_model, num_layers, mlp_dim, num_heads = SIZES[size]
    return ViTConfig(
        image_size=image_size,
        patch_size=int(patch),
        d_model=d_model,
        num_layers=num_layers,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        **options,
    )


def nat(
    name: str,
    image_size: tuple[int, int],
    *,
    kernel_size: int = 7,
    dilations: tuple[int, ...] = (1, 2),
    **options,
) -> ViTConfig:
    """The same under neighborhood attention, every other layer dilated.

    The isotropic model of DiNAT (arXiv:2209.15001); all dilations 1 is that of NAT
    (arXiv:2204.07143). Positions are learned for each patch in place of their biases.

    Args:
      name: as of `vit`.
      image_size: as of `vit`.
      kernel_size: patches that a patch attends along each axis.
      dilations: between those, a layer each, repeated over the depth.
      **options: other fields of `ViTConfig`.

    Raises:
      ValueError: as of `vit`.

    Example:
      >>> config = nat("S/16", (224, 224))
      >>> config.kernel_size, config.dilations
      (7, (1, 2))
    """
    return vit(
        name, image_size, kernel_size=kernel_size, dilations=dilations, **options
    )


class ViT(nnx.Module):
    """A classifier of images.

    Args:
      config: layers and sizes.
      rngs: keys for the parameters.

    Example:
      >>> model = ViT(vit("mu/2", (8, 8)), rngs=nnx.Rngs(0))
      >>> model(jnp.ones((5, 8, 8))).shape
      (5, 10)
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        size = (config.patch_size, config.patch_size)
        self.embed = nnx.Conv(
            1, config.d_model, size, strides=size, padding="VALID", rngs=rngs
        )
        # As large as the patches are: were they small at first, attention would take
        # long to tell one place from another.
        noise = jax.random.normal(rngs.params(), (*config.grid, config.d_model))
        self.position = nnx.Param(noise)
        self.blocks = nnx.List(
            [Block(config, layer, dtype, rngs) for layer in range(config.num_layers)]
        )
        self.norm = nnx.LayerNorm(config.d_model, rngs=rngs)
        self.head = nnx.Linear(
            config.d_model,
            config.num_classes,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Classifies images.

        Args:
          images: float `[B, rows, columns]`, about of mean 0 and variance 1.

        Returns:
          Logits, float32 `[B, num_classes]`.
        """
        x = self.embed(images[..., None]) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean((1, 2)))


class Block(nnx.Module):
    """Attention, then the channel mixer, each on a normalized residual stream."""

    def __init__(self, config: ViTConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.is_global = config.kernel_size is None
        if config.kernel_size is None:
            mixer = SoftmaxMixer(masks.Full())
        else:
            dilation = config.dilations[layer % len(config.dilations)]
            mixer = NeighborhoodMixer(config.kernel_size, dilation=dilation)
        self.attention_norm = nnx.LayerNorm(config.d_model, rngs=rngs)
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            mixer,
            dtype=dtype,
            kernel_init=nnx.initializers.xavier_uniform(),
            rngs=rngs,
        )
        self.mlp_norm = nnx.LayerNorm(config.d_model, rngs=rngs)
        self.expand = nnx.Linear(config.d_model, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(config.mlp_dim, config.d_model, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, rows, columns, D]`."""
        normed = self.attention_norm(x)
        if self.is_global:  # The order of the patches says nothing to it.
            normed = normed.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.attention(normed).reshape(x.shape)
        return x + self.out(jax.nn.gelu(self.expand(self.mlp_norm(x))))
