"""What a model is made of: dimensions, parameters, groups, axis letters.

Dimension key, used as field names, as axis letters and as shape suffixes:

    B  sequences in a batch        V  vocabulary
    T  tokens in a sequence        D  stem (residual stream) width
    N  layers                      K  key/value heads of a layer
    F  feed-forward width          G  query heads per key/value head
                                   H  width of one head

Three of the letters can be pruned: D (type `stem`), K (type `heads`) and F
(type `ffn`). One table, `axes`, says which axes every parameter has. Everything
that must know which slices belong together (initialisation, shape checks,
saliency, costs, shrinking) reads that table and nothing else.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax

Array = jax.Array

# The pruning types in the order in which results are listed.
TYPES = ('heads', 'ffn', 'stem')
# Axis letter -> pruning type. Every other letter keeps its size.
PRUNABLE = {'K': 'heads', 'F': 'ffn', 'D': 'stem'}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture: a Llama decoder whose arrays have these sizes.

  After a shrink the widths D, K and F are smaller; everything else stays. A
  dead group keeps its slot, and is masked, until the next shrink.

  Attributes:
    V: vocabulary size.
    D: stem width.
    N: number of layers.
    K: key/value heads per layer.
    G: query heads per key/value head; 1 is multi-head attention.
    H: head width; even, since the rotary embedding pairs channels.
    F: feed-forward width.
    context: longest sequence the source model was trained on, in tokens.
    rope_theta: base of the rotary embedding.
    norm_eps: added to the mean square in RMSNorm.
    tied: whether the output matrix is the transposed embedding.
  """

  V: int
  D: int
  N: int
  K: int
  G: int
  H: int
  F: int
  context: int
  rope_theta: float
  norm_eps: float
  tied: bool

  def widths(self) -> dict[str, int]:
    """Widths of the arrays by pruning type."""
    return {'heads': self.K, 'ffn': self.F, 'stem': self.D}

  def num_params(self) -> int:
    """Number of parameters in arrays of this size."""
    per_layer = self.K * self.head_rows() + 3 * self.F
    return self.D * (self.N * per_layer + self.stem_rows())

  def head_rows(self) -> int:
    """Rows of length D in one head: q and o (G each), k and v, times H."""
    return (2 * self.G + 2) * self.H

  def stem_rows(self) -> int:
    """Rows of length D outside heads and ffn: embeddings and norm scales."""
    return (1 if self.tied else 2) * self.V + 2 * self.N + 1


@struct.dataclass
class Layers:
  """Parameters of all layers, stacked on a leading axis N for `lax.scan`."""

  attn_norm: Any
  wq: Any
  wk: Any
  wv: Any
  wo: Any
  ffn_norm: Any
  w_gate: Any
  w_up: Any
  w_down: Any


@struct.dataclass
class Params:
  """All parameters; also the type of gradients and of the axis table.

  `unembed` is None when the embedding is tied. The parameters *are* the
  architecture: a shrink is a tree of smaller arrays of this same type.
  """

  embed: Any
  layers: Layers
  final_norm: Any
  unembed: Any = None


@struct.dataclass
class Groups:
  """One leaf per pruning type: masks (True = alive), scores, costs, indices.

  Shapes: heads [N, K], ffn [N, F], stem [D].
  """

  heads: Any
  ffn: Any
  stem: Any


GROUP_AXES = Groups(heads='NK', ffn='NF', stem='D')


def axes(tied: bool) -> Params:
  """The axis letters of every parameter, as a tree of strings."""
  return Params(
    embed='VD',
    layers=Layers(
      attn_norm='ND',
      wq='NDKGH',
      wk='NDKH',
      wv='NDKH',
      wo='NKGHD',
      ffn_norm='ND',
      w_gate='NDF',
      w_up='NDF',
      w_down='NFD',
    ),
    final_norm='D',
    unembed=None if tied else 'DV',
  )


def map_axes(fn: Callable[..., Any], tree: Params, *rest: Params) -> Params:
  """Maps `fn(letters, leaf, *leaves)` over parameter-shaped trees."""
  table = axes(tied=tree.unembed is None)
  return jax.tree.map(fn, table, tree, *rest)


def shapes(cfg: ModelConfig) -> Params:
  """The shape of every parameter, as `jax.ShapeDtypeStruct`, float32."""
  return jax.tree.map(
    lambda letters: jax.ShapeDtypeStruct(
      tuple(getattr(cfg, x) for x in letters), jax.numpy.float32
    ),
    axes(cfg.tied),
  )


def group_shapes(cfg: ModelConfig) -> Groups:
  """The shape of every leaf of a `Groups` tree."""
  return jax.tree.map(
    lambda letters: tuple(getattr(cfg, x) for x in letters), GROUP_AXES
  )


def all_alive(cfg: ModelConfig) -> Groups:
  """Masks of a model of which nothing has been pruned."""
  return jax.tree.map(
    lambda letters: jax.numpy.ones(
      tuple(getattr(cfg, x) for x in letters), bool
    ),
    GROUP_AXES,
  )


def check_shapes(params: Params, cfg: ModelConfig) -> None:
  """Raises ValueError, with the key path, where a shape contradicts `cfg`."""

  def check(path, letters, leaf):
    want = tuple(getattr(cfg, x) for x in letters)
    if tuple(leaf.shape) != want:
      raise ValueError(
        f'params{jax.tree_util.keystr(path)} has shape {tuple(leaf.shape)}, '
        f'the architecture says {want} ({letters})'
      )

  if (params.unembed is None) != cfg.tied:
    raise ValueError(
      f'tied={cfg.tied} but unembed is '
      f'{"absent" if params.unembed is None else "present"}'
    )
  jax.tree_util.tree_map_with_path(check, axes(cfg.tied), params)
