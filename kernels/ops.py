"""Masked matmul, SwiGLU and attention: cost follows what is alive.

A *keep* is a bool mask, True = alive, over an axis of channels; one of length
c over an axis of length c * u says of each u neighbours at a time whether they
live (a head and its channels). What is computed is the product over the live
channels; outputs of dead ones, and the gradients of dead entries, are exactly
zero. Only the *extent* of a mask, 1 + its last live index, saves time: order
survivors to the front.

Masks are data: they may differ from layer to layer inside a `lax.scan`, and one
compile serves all. The gradients are products of the same implementation, with
float32 accumulation; that of a weight has the dtype of the weight, so float32
master weights get a float32 gradient from bfloat16 activations.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from kernels import autotune
from kernels import bucket
from kernels import forms

Array = jax.Array

# Modules of this package, each imported when it is first used.
IMPLEMENTATIONS = ('xla', 'xla_loop', 'bucket', 'pallas_tpu', 'pallas_hopper')
# Those that one platform alone can run.
PLATFORMS = {'pallas_tpu': 'tpu', 'pallas_hopper': 'gpu'}
# Chosen only where it was measured: BENCHMARKS.md, "Kernels". Elsewhere the
# reference, until somebody has.
_BY_PLATFORM = {'cpu': 'bucket'}


def resolve(implementation: str | None) -> str:
  """The name of an implementation; None: the choice for this platform.

  Raises:
    ValueError: unknown name.
  """
  if implementation is None:
    return _BY_PLATFORM.get(jax.default_backend(), 'xla')
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation {implementation!r} is not one of '
      f'{", ".join(IMPLEMENTATIONS)}'
    )
  return implementation


def masked_matmul(
  x: Array,
  w: Array,
  keep_in: Array | None = None,
  keep_out: Array | None = None,
  *,
  implementation: str | None = None,
) -> Array:
  """x @ w over the live channels.

  Args:
    x: [..., I], floating point; the arithmetic is done in its dtype.
    w: [I, O], any floating dtype; finite.
    keep_in: bool [I] or a divisor of I; None: all alive.
    keep_out: bool [O] or a divisor of O; None: all alive.
    implementation: one of `IMPLEMENTATIONS`; None: see `resolve`.

  Returns:
    [..., O] in the dtype of x; exactly zero where `keep_out` is False.

  Raises:
    ValueError: shapes or masks that do not fit, or what the implementation
      cannot take.
  """
  _check_keep('keep_in', keep_in, x.shape[-1])
  _check_keep('keep_out', keep_out, w.shape[1])
  y = _matmul(
    resolve(implementation), x.reshape(-1, x.shape[-1]), w, keep_in, keep_out
  )
  return y.reshape(*x.shape[:-1], w.shape[1])


def masked_swiglu(
  x: Array,
  w_gate: Array,
  w_up: Array,
  w_down: Array,
  keep: Array,
  *,
  implementation: str | None = None,
  hidden: bool = False,
) -> Array | tuple[Array, Array]:
  """(silu(x @ w_gate) * (x @ w_up)) @ w_down over the live channels.

  The whole feed-forward block of Llama, so that nothing between its products
  need be as wide as the arrays.

  Args:
    x: [..., D], floating point; the products are computed in its dtype, the
      activation in float32.
    w_gate, w_up: [D, F], any floating dtype; finite.
    w_down: [F, D], likewise.
    keep: bool [F] or a divisor of F.
    implementation: one of `IMPLEMENTATIONS`; None: see `resolve`.
    hidden: also return what `w_down` reads.

  Returns:
    [..., D] in the dtype of x; with `hidden` that and [..., F], exactly zero
    where `keep` is False.

  Raises:
    ValueError: as `masked_matmul`.
  """
  _check_keep('keep', keep, w_gate.shape[1])
  y, h = _swiglu(
    resolve(implementation),
    hidden,
    x.reshape(-1, x.shape[-1]),
    w_gate,
    w_up,
    w_down,
    keep,
  )
  y = y.reshape(x.shape)
  return (y, h.reshape(*x.shape[:-1], -1)) if hidden else y


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
  name = resolve(implementation)
  if keep.shape != wk.shape[1:2]:
    raise ValueError(
      f'keep has shape {list(keep.shape)} for {wk.shape[1]} key/value heads'
    )
  if name == 'bucket':
    y, heads = _attention(hidden, keep, angles, x, wq, wk, wv, wo)
  else:
    y, heads = _attention_block(name, keep, angles, x, wq, wk, wv, wo)
  return (y, heads) if hidden else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(name, x, w, keep_in, keep_out):
  return _matmul_forward(name, x, w, keep_in, keep_out)[0]


def _matmul_forward(name, x, w, keep_in, keep_out):
  x = _mask(x, keep_in)
  y = _forward(name, x, w, keep_in, keep_out)
  return _mask(y, keep_out), (x, w, keep_in, keep_out)


def _matmul_backward(name, saved, dy):
  x, w, keep_in, keep_out = saved
  dy = _mask(dy, keep_out)
  dx = _mask(_to_input(name, dy, w, keep_in, keep_out), keep_in)
  dw = _to_weight(name, x, dy, w.dtype, keep_in, keep_out)
  return dx, dw, None, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu(name, hidden, x, w_gate, w_up, w_down, keep):
  return _swiglu_forward(name, hidden, x, w_gate, w_up, w_down, keep)[0]


def _swiglu_forward(name, hidden, x, w_gate, w_up, w_down, keep):
  weights = w_gate, w_up, w_down

  def block(name, keep, x, w_gate, w_up, w_down):
    gate = _forward(name, x, w_gate, None, keep)
    up = _forward(name, x, w_up, None, keep)
    h, _, _ = _activation(gate, up, keep)
    h = h.astype(x.dtype)
    y = _forward(name, h, w_down, keep, None)
    return y, gate, up, h if hidden else None

  y, gate, up, h = _over_channels(
    name, block, keep, w_up.shape[1],
    (None, 1, 1, 0), (None, 1, 1, 1),
    x, *weights,
  )  # fmt: skip
  return (y, h), (x, *weights, keep, gate, up)


def _swiglu_backward(name, hidden, saved, cotangents):
  dy, dh = cotangents
  x, w_gate, w_up, w_down, keep, gate, up = saved

  def block(name, keep, x, w_gate, w_up, w_down, gate, up, dy, dh):
    through_down = _to_input(name, dy, w_down, keep, None)
    dh = through_down if dh is None else through_down + dh
    dh = dh.astype(jnp.float32)
    h, by_gate, by_up = _activation(gate, up, keep)
    # What lies beyond an extent may be NaN: the mask comes last.
    dgate, dup = (
      _mask((dh * slope).astype(x.dtype), keep) for slope in (by_gate, by_up)
    )
    dx = _to_input(name, dgate, w_gate, None, keep)
    dx += _to_input(name, dup, w_up, None, keep)
    return (
      dx,
      _to_weight(name, x, dgate, w_gate.dtype, None, keep),
      _to_weight(name, x, dup, w_up.dtype, None, keep),
      _to_weight(name, h.astype(x.dtype), dy, w_down.dtype, keep, None),
    )

  grads = _over_channels(
    name, block, keep, w_up.shape[1],
    (None, 1, 1, 0, 1, 1, None, 1), (None, 1, 1, 0),
    x, w_gate, w_up, w_down, gate, up, dy, dh,
  )  # fmt: skip
  return *grads, None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _activation(gate, up, keep):
  """silu(gate) * up in float32, zero where dead; its slopes by gate and up."""
  gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  by_gate = up * (sigmoid + silu * (1 - sigmoid))
  return _mask(silu * up, keep), by_gate, silu


def _over_channels(name, block, keep, size, axes_in, axes_out, *args):
  """block(name, keep, *args); a bucket holds all of it."""
  if name != 'bucket':
    return block(name, keep, *args)
  step = bucket.step(size, size // keep.size)
  return _in_buckets(block, keep, size, step, axes_in, axes_out, *args)


def _over_heads(block, keep, axes_in, axes_out, *args):
  """block(name, keep, *args) on the heads up to the extent: a dozen numbers."""
  step = -(-keep.size // 12)
  return _in_buckets(block, keep, keep.size, step, axes_in, axes_out, *args)


def _in_buckets(block, keep, size, step, axes_in, axes_out, *args):
  """block(name, keep, *args), whose channels are one axis of most arrays.

  A bucket holds the whole block: in its branch all arrays are cut to one
  width, also what passes from product to product.

  Args:
    block: see above; returns a tuple.
    keep: bool, `size` or a divisor of it.
    size: of the axis of channels.
    step: between two widths; a multiple of what a mask bit stands for.
    axes_in: which axis of each argument has the channels; None: none has.
    axes_out: the same for the results.
    *args: arrays, or None.
  """
  unit = size // keep.size
  widths = bucket.widths(size, step)

  def cut(x, axis, width):
    if x is None or axis is None:
      return x
    return jax.lax.slice_in_dim(x, 0, width, axis=axis)

  def pad(x, axis, width):
    if x is None or axis is None:
      return x
    ends = [(0, (size - width) * (i == axis)) for i in range(x.ndim)]
    return jnp.pad(x, ends)

  def branch(width, *args):
    def run(width):
      some = [cut(x, a, width) for x, a in zip(args, axes_in, strict=True)]
      return block('xla', keep[: width // unit], *some)

    # Nothing alive: the shapes of the least width, all of it zero.
    out = (
      run(width)
      if width
      else jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: run(unit)),
      )
    )
    return tuple(
      pad(x, a, width or unit) for x, a in zip(out, axes_out, strict=True)
    )

  return jax.lax.switch(
    bucket.choose(widths, _extent(keep, size)),
    [functools.partial(branch, width) for width in widths],
    *args,
  )


def _forward(name, x, w, keep_in, keep_out):
  """x w, [t, out]; unspecified beyond the extents."""
  extents = forms.Extents(
    m=x.shape[0],
    n=_extent(keep_out, w.shape[1]),
    k=_extent(keep_in, w.shape[0]),
  )
  return _product(name, x, w.astype(x.dtype), 'nn', extents, x.dtype)


def _to_input(name, dy, w, keep_in, keep_out):
  """dy w^T, [t, in]; unspecified beyond the extents."""
  extents = forms.Extents(
    m=dy.shape[0],
    n=_extent(keep_in, w.shape[0]),
    k=_extent(keep_out, w.shape[1]),
  )
  return _product(name, dy, w.astype(dy.dtype), 'nt', extents, dy.dtype)


def _to_weight(name, x, dy, dtype, keep_in, keep_out):
  """x^T dy, [in, out]; exactly zero in dead rows and columns."""
  extents = forms.Extents(
    m=_extent(keep_in, x.shape[1]),
    n=_extent(keep_out, dy.shape[1]),
    k=x.shape[0],
  )
  dw = _product(name, x, dy, 'tn', extents, dtype)
  if _module(name).FILLS:
    # Dead rows and columns come of zeros, or are beyond the extents.
    return dw
  return _mask(_mask(dw, keep_out).T, keep_in).T


def _module(name):
  return importlib.import_module(f'kernels.{name}')


def _product(name, a, b, form, extents, dtype):
  size = forms.sizes(a, b, form)
  blocks = autotune.choice(name, form, *size, a.dtype)
  return _module(name).product(a, b, form, extents, dtype, blocks)


def _mask(x, keep):
  """Zeros, also in place of NaN, where the last axis of x is dead."""
  if keep is None:
    return x
  return jnp.where(jnp.repeat(keep, x.shape[-1] // keep.size), x, 0)


def _extent(keep, size):
  """1 + the last live channel, int32; the size where nothing is masked."""
  if keep is None:
    return size
  last = jnp.max(jnp.where(keep, jnp.arange(1, keep.size + 1), 0))
  return (last * (size // keep.size)).astype(jnp.int32)


def _check_keep(name, keep, size):
  if keep is None:
    return
  if keep.dtype != bool or keep.ndim != 1 or size % keep.size:
    raise ValueError(
      f'{name} is {keep.dtype}{list(keep.shape)}; it takes bool of a length '
      f'that divides {size}'
    )


def _attention_block(name, keep, angles, x, wq, wk, wv, wo):
  """See `masked_attention`: its two results, by the products of one name."""
  matmul = functools.partial(masked_matmul, implementation=name)
  q, k, v = (
    matmul(x, w.reshape(w.shape[0], -1), None, keep).reshape(
      *x.shape[:2], *w.shape[1:]
    )
    for w in (wq, wk, wv)
  )
  attend = _attend if name == 'xla' else _attend_live
  heads = attend(q, k, v, keep, angles)
  flat = heads.reshape(*x.shape[:2], -1)
  return matmul(flat, wo.reshape(-1, wo.shape[-1]), keep), heads


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
