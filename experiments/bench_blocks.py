"""The blocks of a layer that `bench_kernels` times: SwiGLU and attention.

As a training step has them: float32 weights, activations of the dtype that is
asked for; the result alone, and with the gradients by all arrays. Unlike single
products they show what passes between products, what an implementation does of
a whole block (`bucket`), and the attention itself.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import kernels
from experiments import bench_products

# Several products, each rounded to the dtype, follow one another.
TOLERANCE = {x: 3 * y for x, y in bench_products.TOLERANCE.items()}


def cases(
  stem: int,
  ffn: int,
  heads: Sequence[int],
  texts: int,
  tokens: int,
) -> list[bench_products.Case]:
  """Both blocks, alone and with their gradient.

  Args:
    stem: width of the stem.
    ffn: feed-forward width.
    heads: key/value heads, query heads to each, channels of a head; empty: no
      attention.
    texts: of a micro-batch.
    tokens: of a text.
  """
  found = _both_ways(
    'swiglu',
    kernels.masked_swiglu,
    sizes=(texts * tokens, ffn, stem),
    masked='n',
    x=(texts * tokens, stem),
    weights=[((stem, ffn), 1)] * 2 + [((ffn, stem), 0)],
    flops=lambda width: 6 * texts * tokens * stem * width,
  )
  if not heads:
    return found
  K, G, H = heads
  # Two products with half of a square of scores, and four projections.
  each = texts * tokens * H * (2 * G * tokens + 2 * stem * (2 * G + 2))
  return found + _both_ways(
    'attention',
    functools.partial(_attention, cos_sin=_turns(tokens, H)),
    sizes=(f'{texts}x{tokens}', f'{K}x{G}x{H}', stem),
    masked='heads',
    x=(texts, tokens, stem),
    weights=[
      ((stem, K, G, H), 1), ((stem, K, H), 1), ((stem, K, H), 1),
      ((K, G, H, stem), 0),
    ],
    flops=lambda width: each * width,
  )  # fmt: skip


def _attention(x, wq, wk, wv, wo, keep, *, cos_sin, implementation):
  return kernels.masked_attention(
    x, wq, wk, wv, wo, keep, cos_sin, implementation=implementation
  )


def _turns(tokens, H):
  """Cosines and sines of rotary angles, float32 [2, tokens, H/2]."""
  angles = np.outer(np.arange(tokens), 1e4 ** (-np.arange(H // 2) * 2 / H))
  return jnp.asarray([np.cos(angles), np.sin(angles)], jnp.float32)


def _both_ways(
  name: str,
  op: Callable[..., jax.Array],
  sizes: Sequence[object],
  masked: str,
  x: tuple[int, ...],
  weights: Sequence[tuple[tuple[int, ...], int]],
  flops: Callable[[int], float],
) -> list[bench_products.Case]:
  """An op of (x, *weights, keep) alone, and with its gradient.

  Args:
    name: of the op.
    op: see above.
    sizes: see `bench_products.Case`.
    masked: what is masked.
    x: shape of the input, and of the result.
    weights: shape of each, and which axis of it is masked.
    flops: (width) -> operations of the op alone.
  """
  (first, axis), *_ = weights
  size = first[axis]
  arrays = [bench_products.Operand(x, None)]
  for shape, axis in weights:
    # Of the last one, all but the result; of the others the stem.
    summed = shape[0] if axis else math.prod(shape[:-1])
    arrays.append(
      bench_products.Operand(shape, axis, summed**-0.5, dtype='float32')
    )

  def alone(implementation, keep, *arrays):
    return op(*arrays, keep, implementation=implementation)

  def with_gradient(implementation, keep, *arrays):
    *arrays, dy = arrays
    run = functools.partial(alone, implementation, keep)
    y, pull = jax.vjp(run, *arrays)
    return y, *pull(dy)

  def case(what, run, times, operands):
    def dense(*cut):
      width = cut[1].shape[arrays[1].axis]
      return run('xla', np.ones(width, bool), *cut)

    def masked_run(implementation, *some):
      *some, extent = some
      return run(implementation, jnp.arange(size) < extent, *some)

    return bench_products.Case(
      name=name,
      what=what,
      sizes=sizes,
      masked=masked,
      size=size,
      operands=operands,
      dense=dense,
      run=masked_run,
      flops=lambda width: times * flops(width),
      tolerance=TOLERANCE,
    )

  return [
    case('alone', alone, 1, arrays),
    # Of every product two more.
    case(
      'with gradient', with_gradient, 3,
      [*arrays, bench_products.Operand(x, None)],
    ),
  ]  # fmt: skip
