"""The attention block of Llama over the live heads."""

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels import matmul

Array = jax.Array


def masked_attention(
  x: Array,
  wq: Array,
  wk: Array,
  wv: Array,
  wo: Array,
  keep: Array,
  angles: Array,
  *,
  implementation: str | None = None,
  hidden: bool = False,
) -> Array | tuple[Array, Array]:
  """The attention block of Llama over the live key/value heads.

  Causal softmax attention with rotary embeddings. A head that is dead takes its
  query heads along. The attention itself needs no kernel of ours: every
  implementation but `xla` runs the library's on the heads up to the extent, one
  branch for each number of heads.

  Args:
    x: [B, T, D], floating point; the arithmetic is done in its dtype.
    wq: [D, K, G, H], any floating dtype; finite.
    wk, wv: [D, K, H], likewise.
    wo: [K, G, H, D], likewise.
    keep: bool [K].
    angles: float32 [T, H/2], of the rotary embedding of each position; channel
      i is rotated with channel i + H/2.
    implementation: one of `IMPLEMENTATIONS`; None: see `resolve`.
    hidden: also return what `wo` reads.

  Returns:
    [B, T, D] in the dtype of x; with `hidden` that and [B, T, K, G, H], exactly
    zero where `keep` is False.

  Raises:
    ValueError: as `masked_matmul`.
  """
  name = dispatch.resolve(implementation)
  if keep.shape != wk.shape[1:2]:
    raise ValueError(
      f'keep has shape {list(keep.shape)} for {wk.shape[1]} key/value heads'
    )
  if name == 'bucket':
    y, heads = _attention(hidden, keep, angles, x, wq, wk, wv, wo)
  else:
    y, heads = _attention_block(name, keep, angles, x, wq, wk, wv, wo)
  return (y, heads) if hidden else y


def _attention_block(name, keep, angles, x, wq, wk, wv, wo):
  """See `masked_attention`: its two results, by the products of one name."""
  product = functools.partial(matmul.masked_matmul, implementation=name)
  q, k, v = (
    product(x, w.reshape(w.shape[0], -1), None, keep).reshape(
      *x.shape[:2], *w.shape[1:]
    )
    for w in (wq, wk, wv)
  )
  attend = _attend if name == 'xla' else _attend_live
  heads = attend(q, k, v, keep, angles)
  flat = heads.reshape(*x.shape[:2], -1)
  return product(flat, wo.reshape(-1, wo.shape[-1]), keep), heads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(hidden, keep, angles, x, wq, wk, wv, wo):
  """`_attention_block` in buckets; without `hidden` only the first result."""
  return _attention_forward(hidden, keep, angles, x, wq, wk, wv, wo)[0]


def _attention_forward(hidden, keep, angles, x, wq, wk, wv, wo):
  def block(name, keep, x, wq, wk, wv, wo):
    q, k, v = (_einsum('btd,dk...->btk...', x, w) for w in (wq, wk, wv))
    heads = _attend(q, k, v, keep, angles)
    y = _einsum('btkgh,kghd->btd', heads, wo)
    return y, heads if hidden else None, q, k, v

  y, heads, q, k, v = _over_heads(
    block, keep,
    (None, 1, 1, 1, 0), (None, 2, 2, 2, 2),
    x, wq, wk, wv, wo,
  )  # fmt: skip
  return (y, heads), (keep, angles, x, wq, wk, wv, wo, q, k, v)


def _attention_backward(hidden, saved, cotangents):
  keep, angles, *arrays = saved

  def block(name, keep, x, wq, wk, wv, wo, q, k, v, dy, dheads):
    # Recomputes the probabilities: [T, T] for each head need not be kept, and
    # not be padded to the heads that are dead.
    heads, pull = jax.vjp(
      lambda q, k, v: _attend(q, k, v, keep, angles), q, k, v
    )
    through_wo = _einsum('btd,kghd->btkgh', dy, wo)
    dq, dk, dv = pull(through_wo if dheads is None else through_wo + dheads)
    return (
      _einsum('btkgh,dkgh->btd', dq, wq)
      + _einsum('btkh,dkh->btd', dk, wk)
      + _einsum('btkh,dkh->btd', dv, wv),
      _einsum('btd,btkgh->dkgh', x, dq, wq.dtype),
      _einsum('btd,btkh->dkh', x, dk, wk.dtype),
      _einsum('btd,btkh->dkh', x, dv, wv.dtype),
      _einsum('btkgh,btd->kghd', heads, dy, wo.dtype),
    )

  grads = _over_heads(
    block, keep,
    (None, 1, 1, 1, 0, 2, 2, 2, None, 2), (None, 1, 1, 1, 0),
    *arrays, *cotangents,
  )  # fmt: skip
  return None, None, *grads


_attention.defvjp(_attention_forward, _attention_backward)


def _einsum(spec, x, w, dtype=None):
  """In the dtype of x, accumulated in float32."""
  return jnp.einsum(
    spec, x, w.astype(x.dtype), preferred_element_type=jnp.float32
  ).astype(dtype or x.dtype)


def _attend(q, k, v, keep, angles):
  """Rotary causal attention of [B, T, K, G, H] to [B, T, K, H]."""
  B, T, K, G, H = q.shape
  out = jax.nn.dot_product_attention(
    _rotate(q, angles).reshape(B, T, K * G, H),
    _rotate(k, angles),
    v,
    is_causal=True,
  )
  return jnp.where(keep[:, None, None], out.reshape(q.shape), 0)


def _rotate(x, angles):
  """Turns channel i of [B, T, ..., H] with channel i + H/2, in float32."""
  angles = angles.reshape(len(angles), *(1,) * (x.ndim - 3), angles.shape[1])
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(
    x.dtype
  )


@jax.custom_vjp
def _attend_live(q, k, v, keep, angles):
  """`_attend` on the heads up to the extent."""
  return _attend_live_forward(q, k, v, keep, angles)[0]


def _attend_live_forward(q, k, v, keep, angles):
  def block(name, keep, q, k, v):
    return (_attend(q, k, v, keep, angles),)

  args = q, k, v
  (out,) = _over_heads(block, keep, (2, 2, 2), (2,), *args)
  return out, (*args, keep, angles)


def _attend_live_backward(saved, dout):
  *args, keep, angles = saved

  def block(name, keep, q, k, v, dout):
    return jax.vjp(lambda *x: _attend(*x, keep, angles), q, k, v)[1](dout)

  axes = (2,) * 4
  grads = _over_heads(block, keep, axes, axes[:3], *args, dout)
  return *grads, None, None


_attend_live.defvjp(_attend_live_forward, _attend_live_backward)


def _over_heads(block, keep, axes_in, axes_out, *args):
  """block(name, keep, *args) on the heads up to the extent: a dozen numbers."""
  step = -(-keep.size // 12)
  return dispatch.in_buckets(
    block, keep, keep.size, step, axes_in, axes_out, *args
  )
