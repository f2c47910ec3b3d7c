"""The feed-forward block of Llama over the live channels."""

import functools
import math

import jax
import jax.numpy as jnp

from effllm_jax.kernels import bucket
from effllm_jax.kernels import dispatch

Array = jax.Array


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
    x: [..., D], floating point; the products are computed in its dtype, up to
      float32, the activation in float32.
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
  if not (
    x.shape[-1:] == w_gate.shape[:1]
    and w_gate.shape == w_up.shape == w_down.shape[::-1]
  ):
    shapes = ', '.join(f'{list(y.shape)}' for y in (x, w_gate, w_up, w_down))
    raise ValueError(
      f'x, w_gate, w_up, w_down are {shapes}; they take [..., D], [D, F], '
      '[D, F], [F, D]'
    )
  dispatch.check_floating(x, w_gate, w_up, w_down)
  dispatch.check_keep('keep', keep, w_gate.shape[1])
  y, h = _swiglu(
    dispatch.resolve(implementation),
    hidden,
    x.reshape(math.prod(x.shape[:-1]), x.shape[-1]),
    w_gate,
    w_up,
    w_down,
    keep,
  )
  y = y.reshape(x.shape)
  return (y, h.reshape(*x.shape[:-1], w_up.shape[1])) if hidden else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu(name, hidden, x, w_gate, w_up, w_down, keep):
  return _swiglu_forward(name, hidden, x, w_gate, w_up, w_down, keep)[0]


def _swiglu_forward(name, hidden, x, w_gate, w_up, w_down, keep):
  weights = w_gate, w_up, w_down

  def block(name, keep, x, w_gate, w_up, w_down):
    gate = dispatch.forward(name, x, w_gate, None, keep)
    up = dispatch.forward(name, x, w_up, None, keep)
    h, _, _ = _activation(gate, up, keep)
    h = h.astype(x.dtype)
    y = dispatch.forward(name, h, w_down, keep, None)
    return y, gate, up, h if hidden else None

  y, gate, up, h = _over_channels(
    name, block, keep, w_up.shape[1],
    (None, 1, 1, 0), (None, 1, 1, 1),
    x, *weights,
  )  # fmt: skip
  y, gate, up = map(dispatch.named, (y, gate, up))
  return (y, h), (x, *weights, keep, gate, up)


def _swiglu_backward(name, hidden, saved, cotangents):
  dy, dh = cotangents
  x, w_gate, w_up, w_down, keep, gate, up = saved

  def block(name, keep, x, w_gate, w_up, w_down, gate, up, dy, dh):
    through_down = dispatch.to_input(name, dy, w_down, keep, None)
    dh = through_down if dh is None else through_down + dh
    dh = dh.astype(jnp.float32)
    h, by_gate, by_up = _activation(gate, up, keep)
    # What lies beyond an extent may be NaN: the mask comes last.
    dgate, dup = (
      dispatch.mask((dh * slope).astype(x.dtype), keep)
      for slope in (by_gate, by_up)
    )
    dx = dispatch.to_input(name, dgate, w_gate, None, keep)
    dx += dispatch.to_input(name, dup, w_up, None, keep)
    return (
      dx,
      dispatch.to_weight(name, x, dgate, w_gate.dtype, None, keep),
      dispatch.to_weight(name, x, dup, w_up.dtype, None, keep),
      dispatch.to_weight(name, h.astype(x.dtype), dy, w_down.dtype, keep, None),
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
  return dispatch.mask(silu * up, keep), by_gate, silu


def _over_channels(name, block, keep, size, axes_in, axes_out, *args):
  """block(name, keep, *args); a bucket holds all of it."""
  if name != 'bucket':
    return block(name, keep, *args)
  step = bucket.step(size, size // keep.size)
  return dispatch.in_buckets(block, keep, size, step, axes_in, axes_out, *args)
