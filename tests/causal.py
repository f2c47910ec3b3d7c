"""Causal attention in float64, which that of a kernel is held against."""

import jax
import jax.numpy as jnp
import numpy as np


def draw(T, K, G, H, B=1, dtype=np.float32):
  """Queries, keys, values and the gradient of the result."""
  rng = np.random.default_rng(T)
  shapes = (B, T, K * G, H), (B, T, K, H), (B, T, K, H), (B, T, K * G, H)
  return [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]


def both_ways(causal, traces=None):
  """(q, k, v, dout, live) -> out, dq, dk, dv; live is traced.

  Args:
    causal: (q, k, v, live) -> out.
    traces: list to which each trace adds the shape of q.
  """

  @jax.jit
  def run(q, k, v, dout, live):
    if traces is not None:
      traces.append(q.shape)
    out, pull = jax.vjp(lambda *arrays: causal(*arrays, live), q, k, v)
    return out, *pull(dout)

  return run


def exact(q, k, v, dout, live):
  """out, dq, dk, dv in float64, by whole squares; dead heads are zero."""
  T, heads, H = q.shape[1:]
  G = heads // k.shape[2]

  def fn(q, k, v):
    k, v = (x.repeat(G, 2) for x in (k, v))
    scores = jnp.einsum('bqhx,bkhx->bhqk', q, k) / H**0.5
    scores = jnp.where(np.tri(T, dtype=bool), scores, -jnp.inf)
    out = jnp.einsum('bhqk,bkhx->bqhx', jax.nn.softmax(scores), v)
    return jnp.where((np.arange(heads) < live * G)[:, None], out, 0)

  with jax.enable_x64(True):
    arrays = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, dout)]
    out, pull = jax.vjp(fn, *arrays[:3])
    return [np.asarray(x) for x in (out, *pull(arrays[3]))]


def distance(found, wants):
  """Of each array from float64, as a share of its norm."""
  return [
    np.linalg.norm(np.asarray(x, 'd') - want) / np.linalg.norm(want)
    for x, want in zip(found, wants, strict=True)
  ]


def check_as_near_as_xla(found, q, k, v, dout):
  """Asserts that bfloat16 loses no more than in XLA's attention; all alive."""

  def xla(q, k, v, live):
    del live
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)

  live = k.shape[2]
  wants = exact(q, k, v, dout, live)
  theirs = distance(both_ways(xla)(q, k, v, dout, live), wants)
  for ours, xlas in zip(distance(found, wants), theirs, strict=True):
    assert ours < min(1.2 * xlas, 0.01)


def lowered(causal, platform, T, dtype=jnp.bfloat16, heads=(32, 1, 64)):
  """Forward and back for a machine that this is not, as text."""
  K, G, H = heads
  shapes = (1, T, K * G, H), (1, T, K, H), (1, T, K, H), (1, T, K * G, H)
  arrays = [jax.ShapeDtypeStruct(x, dtype) for x in shapes]
  live = jax.ShapeDtypeStruct((), jnp.int32)
  traced = both_ways(causal).trace(*arrays, live)
  return traced.lower(lowering_platforms=(platform,)).as_text()
