"""x @ w over the live channels, and its gradient."""

import functools
import math

import jax

from effllm_jax.kernels import dispatch

Array = jax.Array


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
    x: [..., I], floating point; the arithmetic is done in its dtype, up to
      float32.
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
  dispatch.check_floating(x, w)
  if w.ndim != 2 or x.shape[-1:] != w.shape[:1]:
    raise ValueError(
      f'x, w are {list(x.shape)}, {list(w.shape)}; they take [..., I], [I, O]'
    )
  dispatch.check_keep('keep_in', keep_in, x.shape[-1])
  dispatch.check_keep('keep_out', keep_out, w.shape[1])
  y = _matmul(
    dispatch.resolve(implementation),
    x.reshape(math.prod(x.shape[:-1]), x.shape[-1]),
    w,
    keep_in,
    keep_out,
  )
  return y.reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(name, x, w, keep_in, keep_out):
  return _matmul_forward(name, x, w, keep_in, keep_out)[0]


def _matmul_forward(name, x, w, keep_in, keep_out):
  x = dispatch.mask(x, keep_in)
  y = dispatch.forward(name, x, w, keep_in, keep_out)
  y = dispatch.named(dispatch.mask(y, keep_out))
  return y, (x, w, keep_in, keep_out)


def _matmul_backward(name, saved, dy):
  x, w, keep_in, keep_out = saved
  dy = dispatch.mask(dy, keep_out)
  dx = dispatch.mask(dispatch.to_input(name, dy, w, keep_in, keep_out), keep_in)
  dw = dispatch.to_weight(name, x, dy, w.dtype, keep_in, keep_out)
  return dx, dw, None, None


_matmul.defvjp(_matmul_forward, _matmul_backward)
