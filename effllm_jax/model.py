"""A decoder as free functions over a parameter tree and a mask tree.

The block is that of Llama, of Qwen2 (`qkv_bias`) or of Qwen3 (`qk_norm`).

Masks act on activations: after the embedding, on head outputs, on feed-forward
activations and on every write to the stem. So a dead group contributes exactly
nothing, its gradient is exactly zero, and flipping a mask bit never changes a
shape. RMSNorm divides by the number of *live* stem channels; with that the
masked model and the shrunk model are the same function.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from effllm_jax import kernels
from effllm_jax import sharding
from effllm_jax import structure
from effllm_jax import unembedding

Array = jax.Array

# By the last of which `sharding.gathered` rounds what it sends.
_GATHERED = ('sharding_constraint', 'reshape', 'custom_vjp_call')
# What is kept for the backward pass. Gathered weights, and what is but another
# form of them, would be whole copies of all layers: 5.2 instead of 1.1 MB a
# layer of 4.2 MB on a mesh of 8.
_POLICIES = {
  'none': lambda primitive, *_, **__: primitive.name not in _GATHERED,
  'dots': lambda primitive, *_, **fields: (
    # By name alone jax 0.10 would run a kernel again, for nothing.
    fields.get('name') == kernels.KEPT or primitive.name == 'pallas_call'
  ),
  'full': jax.checkpoint_policies.nothing_saveable,
}
REMAT = tuple(_POLICIES)


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the arithmetic is done; says nothing about the architecture.

  Attributes:
    dtype: of activations and of the weights as the matmuls read them. Master
      parameters, norms, softmax and the loss stay float32.
    remat: what of a layer is computed again in the backward pass instead of
      being kept, one of `REMAT`: 'none', only probabilities of attention;
      'dots', all but products with weights and attention; or 'full', all of
      it, for a third more arithmetic. Weights that were gathered from other
      devices are never kept.
    kernels: one of `kernels.IMPLEMENTATIONS`: how products skip what is dead.
    mesh: devices that batch and weights are spread over; None: one device.
  """

  dtype: str = 'float32'
  remat: str = 'full'
  kernels: str = 'xla'
  mesh: sharding.Mesh | None = None


@struct.dataclass
class Taps:
  """Inputs of every matrix product, for layer-wise statistics.

  Shapes: attn_in [N,B,T,D] (read by wq, wk, wv), heads [N,B,T,K,G,H] (wo),
  ffn_in [N,B,T,D] (w_gate, w_up), ffn [N,B,T,F] (w_down), final [B,T,D]
  (the output matrix). Dead entries are exactly zero.
  """

  attn_in: Any
  heads: Any
  ffn_in: Any
  ffn: Any
  final: Any


def init(key: Array, cfg: structure.ModelConfig) -> structure.Params:
  """Random float32 parameters: deviation 0.02; norm scales 1, biases 0."""
  leaves, treedef = jax.tree.flatten(structure.axes(cfg))
  keys = treedef.unflatten(list(jax.random.split(key, len(leaves))))

  def leaf(letters, key):
    shape = cfg.shape(letters)
    if structure.is_matrix(letters):
      return 0.02 * jax.random.normal(key, shape)
    # A bias ends as a head does, and has its axis.
    return jnp.zeros(shape) if 'K' in letters else jnp.ones(shape)

  return jax.tree.map(leaf, structure.axes(cfg), keys)


def forward(
  params: structure.Params,
  masks: structure.Groups,
  tokens_BT: Array,
  cfg: structure.ModelConfig,
  compute: Compute = Compute(),
  taps: bool = False,
) -> tuple[Array, Taps | None]:
  """Runs the decoder on packed sequences, causally, positions from 0.

  Args:
    params: float32 master parameters; shapes as in `structure.axes`.
    masks: bool, True = alive.
    tokens_BT: int32 token ids, which are not checked: jax reads one that is too
      large as the last one. As a label it makes a loss that is no number.
    cfg: the architecture.
    compute: dtype and rematerialisation.
    taps: also return the inputs of every matrix product.

  Returns:
    logits_BTV in float32, and `Taps` or None.
  """
  final_BTD, tapped = hidden(params, masks, tokens_BT, cfg, compute, taps)
  return unembedding.unembed(final_BTD, params, compute.mesh), tapped


def hidden(
  params: structure.Params,
  masks: structure.Groups,
  tokens_BT: Array,
  cfg: structure.ModelConfig,
  compute: Compute = Compute(),
  taps: bool = False,
) -> tuple[Array, Taps | None]:
  """`forward` up to the output matrix, whose input it gives, [B, T, D]."""
  layer = block(masks, tokens_BT.shape[1], cfg, compute, taps)
  gathers = compute.mesh is not None and compute.mesh.shape['fsdp'] > 1
  if compute.remat != 'none' or gathers:
    # Inside a scan nothing can be merged across iterations anyway, so the
    # barriers that prevent it would only cost time.
    layer = jax.checkpoint(
      layer, prevent_cse=False, policy=_POLICIES[compute.remat]
    )
  x_BTD = embed(params, masks, tokens_BT, compute)
  x_BTD, tapped = jax.lax.scan(
    layer, x_BTD, (params.layers, masks.heads, masks.ffn)
  )
  final_BTD = final_norm(x_BTD, params, masks, cfg)
  return final_BTD, Taps(*tapped, final=final_BTD) if taps else None


@jax.named_scope('embed')
def embed(
  params: structure.Params,
  masks: structure.Groups,
  tokens_BT: Array,
  compute: Compute,
) -> Array:
  """The stem before the first layer, [B, T, D] in the compute dtype."""
  dtype = jnp.dtype(compute.dtype)
  # A trace cannot index weights of numpy, which `sources.load` gives.
  table_VD = jnp.asarray(params.embed)
  table_VD = sharding.constrain(table_VD, 'VD', compute.mesh)
  x_BTD = table_VD[tokens_BT].astype(dtype) * masks.stem.astype(dtype)
  return sharding.constrain(x_BTD, 'BTD', compute.mesh)


def final_norm(
  x_BTD: Array,
  params: structure.Params,
  masks: structure.Groups,
  cfg: structure.ModelConfig,
) -> Array:
  """The input of the output matrix, [B, T, D], from the stem."""
  return rms_norm(x_BTD, params.final_norm, masks.stem, cfg.norm_eps)


def block(
  masks: structure.Groups,
  length: int,
  cfg: structure.ModelConfig,
  compute: Compute,
  taps: bool,
) -> Callable[..., tuple[Array, tuple[Array, ...] | None]]:
  """One decoder layer as the body of a `lax.scan` over the layers.

  Args:
    masks: of the whole model; the layer's own come with its weights.
    length: tokens of a sequence.
    cfg: the architecture.
    compute: dtype; rematerialisation is the caller's.
    taps: also return the inputs of the layer's matrix products.

  Returns:
    layer(x_BTD, (weights, heads_K, ffn_F)) -> x_BTD, and the fields of `Taps`
    without N and `final`, or None.
  """
  dtype = jnp.dtype(compute.dtype)
  stem_D = masks.stem.astype(dtype)
  norm = functools.partial(rms_norm, stem_D=masks.stem, eps=cfg.norm_eps)
  cos_sin_2TH = _cos_sin(length, cfg)

  attention, swiglu = (
    functools.partial(op, implementation=compute.kernels, hidden=taps)
    for op in (kernels.masked_attention, kernels.masked_swiglu)
  )
  attention = functools.partial(attention, norm_eps=cfg.norm_eps)
  if compute.kernels != 'xla':
    # Whose cost is data: each device runs them on its part of the batch.
    attention, swiglu = (
      sharding.over_batch(op, compute.mesh) for op in (attention, swiglu)
    )
  # What a profile calls them.
  attention = jax.named_scope('attention')(attention)
  swiglu = jax.named_scope('ffn')(swiglu)

  # The stem is not masked inside the products: what they read of it is zero
  # where it is dead, and its width is the same in every layer, so that a shrink
  # takes off all that an extent could.
  def layer(x_BTD, scanned):
    w, heads_K, ffn_F = scanned
    w = sharding.gathered(w, dtype, compute.mesh)
    attn_in_BTD = norm(x_BTD, w.attn_norm)
    out_BTD = attention(
      attn_in_BTD, w.wq, w.wk, w.wv, w.wo, heads_K, cos_sin_2TH,
      bq=w.bq, bk=w.bk, bv=w.bv, q_norm=w.q_norm, k_norm=w.k_norm,
    )  # fmt: skip
    if taps:
      out_BTD, heads_BTKGH = out_BTD
    x_BTD += out_BTD * stem_D

    ffn_in_BTD = norm(x_BTD, w.ffn_norm)
    out_BTD = swiglu(ffn_in_BTD, w.w_gate, w.w_up, w.w_down, ffn_F)
    if taps:
      out_BTD, ffn_BTF = out_BTD
    x_BTD = sharding.constrain(x_BTD + out_BTD * stem_D, 'BTD', compute.mesh)
    tapped = (attn_in_BTD, heads_BTKGH, ffn_in_BTD, ffn_BTF) if taps else None
    return x_BTD, tapped

  return layer


def token_losses(
  params: structure.Params,
  masks: structure.Groups,
  window_BT: Array,
  cfg: structure.ModelConfig,
  compute: Compute = Compute(),
) -> Array:
  """Cross-entropy of each next token, nats, [B, T-1] for windows of T."""
  final_BTD, _ = hidden(params, masks, window_BT[:, :-1], cfg, compute)
  return unembedding.per_token(
    optax.softmax_cross_entropy_with_integer_labels,
    final_BTD,
    params,
    compute.mesh,
    window_BT[:, 1:],
  )


def loss(
  params: structure.Params,
  masks: structure.Groups,
  window_BT: Array,
  cfg: structure.ModelConfig,
  compute: Compute = Compute(),
) -> Array:
  """Mean next-token cross-entropy over a batch of windows, nats per token."""
  return token_losses(params, masks, window_BT, cfg, compute).mean()


def rms_norm(x_BTD: Array, scale_D: Array, stem_D: Array, eps: float) -> Array:
  """RMSNorm in float32 over the live channels.

  Args:
    x_BTD: the stem, in which dead channels are zero.
    scale_D: of the norm.
    stem_D: bool, which channels are alive; the mean square is over these.
    eps: added to it.
  """
  x32_BTD = x_BTD.astype(jnp.float32)
  # At least 1, so that a model without a stem is a model that outputs zeros.
  live = jnp.maximum(stem_D.sum(), 1).astype(jnp.float32)
  mean_square = jnp.square(x32_BTD).sum(-1, keepdims=True) / live
  normed_BTD = x32_BTD * jax.lax.rsqrt(mean_square + eps)
  # Rounded last, so that the gradient of the scale is summed in float32.
  return (normed_BTD * scale_D).astype(x_BTD.dtype)


def _cos_sin(length, cfg):
  """Of the rotary angles, position times frequency; [2, T, H/2], float32."""
  frequencies = jnp.asarray(cfg.rotary_frequencies(), jnp.float32)
  angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
  return jnp.stack([jnp.cos(angles), jnp.sin(angles)])
