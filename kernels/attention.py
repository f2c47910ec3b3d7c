"""The attention block of Llama and Qwen over the live heads."""

import functools

import jax
import jax.numpy as jnp

from effllm_jax.kernels import autotune
from effllm_jax.kernels import dispatch
from effllm_jax.kernels import forms
from effllm_jax.kernels import matmul

Array = jax.Array


def masked_attention(
  x: Array,
  wq: Array,
  wk: Array,
  wv: Array,
  wo: Array,
  keep: Array,
  cos_sin: Array,
  *,
  bq: Array | None = None,
  bk: Array | None = None,
  bv: Array | None = None,
  q_norm: Array | None = None,
  k_norm: Array | None = None,
  norm_eps: float = 1e-6,
  implementation: str | None = None,
  hidden: bool = False,
) -> Array | tuple[Array, Array]:
  """The attention block of Llama, Qwen2 or Qwen3 over the live heads.

  Causal softmax attention with rotary embeddings. A key/value head that is dead
  takes its query heads along. The attention itself is the library's, a block of
  rows at a time, on all heads in `xla`, and in `bucket` and `xla_loop` on those
  up to the extent, one branch for each of about a dozen numbers of heads. The
  Pallas implementations have kernels that need no branch: libtpu compiles 32
  heads at 2,048 tokens in 5 seconds, a dozen branches in 7 minutes; and on a
  GPU a branch is chosen by a copy to the host. None keeps a probability for the
  backward pass.

  Args:
    x: [B, T, D], floating point; the arithmetic is done in its dtype, up to
      float32.
    wq: [D, K, G, H], any floating dtype; finite.
    wk, wv: [D, K, H], likewise.
    wo: [K, G, H, D], likewise.
    keep: bool [K].
    cos_sin: float32 [2, T, H/2], cosines and sines, which have no gradient, of
      the angle by which the rotary embedding turns channel i with channel i +
      H/2, by position. Not the angles: XLA would take the cosine again for
      every head of every layer, 3 % of a training step on a CPU.
    bq: [K, G, H], added to the queries; None: nothing.
    bk, bv: [K, H], likewise to keys and values.
    q_norm, k_norm: [H], scales of an RMSNorm of the queries and keys of each
      head, before the rotation; None: no such norm.
    norm_eps: added to the mean square of those norms.
    implementation: one of `IMPLEMENTATIONS`; None: see `resolve`.
    hidden: also return what `wo` reads.

  Returns:
    [B, T, D] in the dtype of x; with `hidden` that and [B, T, K, G, H], exactly
    zero where `keep` is False.

  Raises:
    ValueError: as `masked_matmul`.
  """
  name = dispatch.resolve(implementation)
  dispatch.check_floating(x, wq, wk, wv, wo)
  dispatch.check_keep('keep', keep, wk.shape[1])
  if keep.shape != wk.shape[1:2]:
    raise ValueError(
      f'keep has shape {list(keep.shape)} for {wk.shape[1]} key/value heads'
    )
  cos_sin = jax.lax.stop_gradient(cos_sin)
  weights = wq, wk, wv, wo, bq, bk, bv, q_norm, k_norm
  if name == 'bucket':
    y, heads = _attention(hidden, norm_eps, keep, cos_sin, x, *weights)
  else:
    y, heads = _attention_block(name, norm_eps, keep, cos_sin, x, *weights)
  return (y, heads) if hidden else y


def _attention_block(
  name, eps, keep, cos_sin, x, wq, wk, wv, wo, bq, bk, bv, q_norm, k_norm
):
  """See `masked_attention`: its two results, by the products of one name."""
  product = functools.partial(matmul.masked_matmul, implementation=name)
  q, k, v = (
    _plus(
      product(x, w.reshape(w.shape[0], -1), None, keep).reshape(
        *x.shape[:2], *w.shape[1:]
      ),
      # Here the dead are among the heads, and a NaN in their bias is not read.
      b if b is None else dispatch.mask(b.T, keep).T,
    )
    for w, b in ((wq, bq), (wk, bk), (wv, bv))
  )
  if name in dispatch.PLATFORMS:
    attend = functools.partial(_attend_by, f'{name}_attention')
  else:
    attend = _attend if name == 'xla' else _attend_live
  heads = dispatch.named(attend(eps, keep, cos_sin, q, k, v, q_norm, k_norm))
  w = wo.reshape(-1, wo.shape[-1])
  return product(heads.reshape(*x.shape[:2], len(w)), w, keep), heads


# Which axis of each weight has the heads: wq wk wv wo bq bk bv q_norm k_norm.
_AXES = (1, 1, 1, 0, 0, 0, 0, None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(hidden, eps, keep, cos_sin, x, *weights):
  """`_attention_block` in buckets; without `hidden` only the first result."""
  return _attention_forward(hidden, eps, keep, cos_sin, x, *weights)[0]


def _attention_forward(hidden, eps, keep, cos_sin, x, *weights):
  def block(name, keep, x, wq, wk, wv, wo, bq, bk, bv, q_norm, k_norm):
    # A dead head in the bucket may have any finite weight: what it comes to can
    # be infinite, and a gradient of zero times that is none.
    q, k, v = (
      _alive(keep, _plus(_einsum(f'btd,d{head}->bt{head}', x, w), b))
      for head, w, b in (('kgh', wq, bq), ('kh', wk, bk), ('kh', wv, bv))
    )
    heads = _attend(eps, keep, cos_sin, q, k, v, q_norm, k_norm)
    return _einsum('btkgh,kghd->btd', heads, wo), heads, q, k, v

  y, heads, *qkv = map(
    dispatch.named,
    _over_heads(block, keep, (None, *_AXES), (None, 2, 2, 2, 2), x, *weights),
  )
  saved = keep, cos_sin, x, *weights, heads, *qkv
  return (y, heads if hidden else None), saved


def _attention_backward(hidden, eps, saved, cotangents):
  keep, cos_sin, *arrays = saved

  def block(
    name, keep, x, wq, wk, wv, wo, bq, bk, bv, q_norm, k_norm, heads, q, k, v,
    dy, dheads,
  ):  # fmt: skip
    _, pull = jax.vjp(
      functools.partial(_attend, eps, keep, cos_sin), q, k, v, q_norm, k_norm
    )
    through_wo = _einsum('btd,kghd->btkgh', dy, wo)
    dq, dk, dv, *dnorms = pull(
      through_wo if dheads is None else through_wo + dheads
    )
    return (
      _einsum('btkgh,dkgh->btd', dq, wq)
      + _einsum('btkh,dkh->btd', dk, wk)
      + _einsum('btkh,dkh->btd', dv, wv),
      _einsum('btd,btkgh->dkgh', x, dq, wq.dtype),
      _einsum('btd,btkh->dkh', x, dk, wk.dtype),
      _einsum('btd,btkh->dkh', x, dv, wv.dtype),
      _einsum('btkgh,btd->kghd', heads, dy, wo.dtype),
      *(
        b if b is None else dz.sum((0, 1), jnp.float32).astype(b.dtype)
        for b, dz in ((bq, dq), (bk, dk), (bv, dv))
      ),
      *dnorms,
    )

  grads = _over_heads(
    block, keep,
    (None, *_AXES, 2, 2, 2, 2, None, 2), (None, *_AXES),
    *arrays, *cotangents,
  )  # fmt: skip
  return None, None, *grads


_attention.defvjp(_attention_forward, _attention_backward)


def _einsum(spec, x, w, dtype=None):
  """In the dtype of x, accumulated in float32."""
  return forms.einsum(spec, x, w.astype(x.dtype), dtype or x.dtype)


def _plus(x, bias):
  """Adds [K, ..., H] to [B, T, K, ..., H], and its gradient, in float32."""
  if bias is None:
    return x
  return (x.astype(jnp.float32) + bias).astype(x.dtype)


def _attend(eps, keep, cos_sin, q, k, v, q_norm, k_norm, causal=None):
  """Rotary causal attention of [B, T, K, G, H] on k, v [B, T, K, H]."""
  B, T, K, G, H = q.shape
  out = (causal or _causal)(
    _rotate(_rms_norm(q, q_norm, eps), cos_sin).reshape(B, T, K * G, H),
    _rotate(_rms_norm(k, k_norm, eps), cos_sin),
    v,
  )
  return _alive(keep, out.reshape(q.shape))


def _attend_by(module, eps, keep, cos_sin, q, *arrays):
  """`_attend` by the kernels of a module."""
  T, H = q.shape[1], q.shape[-1]
  causal = functools.partial(
    forms.module(module).causal,
    live=dispatch.extent(keep, keep.size),
    blocks=[
      autotune.choice(module, form, T, T, H, q.dtype)
      for form in forms.ATTENTION
    ],
  )
  return _attend(eps, keep, cos_sin, q, *arrays, causal)


def _alive(keep, x):
  """Zeros, also in place of NaN, in dead heads of [B, T, K, ..., H]."""
  return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 3)), x, 0)


# Fewer rows in a block gain 3 % of a step at 256 tokens; eight blocks take as
# long as four, and longer to compile (HYPOTHESES.md, "What a step on a CPU
# costs").
_MOST_BLOCKS, _LEAST_ROWS = 4, 256
# Of one head in one sequence, what a block holds of the square at a time: 16 MB
# of float32; of up to 4,096 tokens no block has more. A CPU takes 8,192 tokens
# 2.7 times as fast; what memory it saves is in BENCHMARKS.md.
MOST_SCORES = 2**22


@jax.custom_vjp
def _causal(q, k, v):
  """Causal attention of [B, T, K * G, H] on k, v [B, T, K, H], by row blocks.

  A block reads no key after its last row: four read 5/8 of the square. Its
  probabilities are computed again in the backward pass, whatever a policy of
  `jax.checkpoint` around it keeps: memory never has those of two layers. Beyond
  `MOST_SCORES` it goes through its rows a few at a time, so that memory grows
  with T and not with its square.
  """
  blocks = [
    _attend_rows(start, stop, q, k, v)
    for start, stop in _row_blocks(q.shape[1])
  ]
  return jnp.concatenate(blocks, 1)


def _causal_forward(q, k, v):
  return _causal(q, k, v), (q, k, v)


def _causal_backward(saved, dout):
  grads = (
    jax.vjp(functools.partial(_attend_rows, start, stop), *saved)[1](
      dout[:, start:stop]
    )
    for start, stop in _row_blocks(dout.shape[1])
  )
  return tuple(sum(parts[1:], parts[0]) for parts in zip(*grads, strict=True))


_causal.defvjp(_causal_forward, _causal_backward)


def _row_blocks(T):
  """First row, and the one after the last, of each block; one at least."""
  rows = max(_LEAST_ROWS, -(-T // _MOST_BLOCKS))
  return [(start, min(start + rows, T)) for start in range(0, max(T, 1), rows)]


def _attend_rows(start, stop, q, k, v):
  """Attention of some rows of a causal square."""
  q, k, v = q[:, start:stop], k[:, :stop], v[:, :stop]

  def attend(rows, q, k, v):
    before = jnp.arange(stop) <= rows[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=before[None, None])

  rows = jnp.arange(start, stop)
  most = max(MOST_SCORES // max(stop, 1), 1)
  if len(rows) <= most:
    return attend(rows, q, k, v)
  # As many parts as there must be, and all of one size.
  parts = -(-len(rows) // most)
  size = -(-len(rows) // parts)
  # What fills up the last part sees what its neighbours see, and goes again.
  fill = parts * size - len(rows)
  B, _, heads, H = q.shape
  q = jnp.pad(q, ((0, 0), (0, fill), (0, 0), (0, 0)))
  # A loop adds up the gradients of what its parts share in the dtype of that.
  # Rounded to bfloat16 after each of 64 parts, as at 32,768 tokens, they would
  # be 1.6 times as far off as those of a whole block.
  exact = jnp.promote_types(k.dtype, jnp.float32)
  shared = k.astype(exact), v.astype(exact)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def part(rows, q):
    return attend(rows, q, *(x.astype(q.dtype) for x in shared))

  out = jax.lax.map(
    lambda args: part(*args),
    (
      jnp.pad(rows, (0, fill), mode='edge').reshape(parts, size),
      jnp.moveaxis(q.reshape(B, parts, size, heads, H), 1, 0),
    ),
  )
  return jnp.moveaxis(out, 0, 1).reshape(q.shape)[:, : len(rows)]


def _rms_norm(x, scale, eps):
  """RMSNorm over the last axis, in float32; x where there is no scale."""
  if scale is None:
    return x
  x32 = x.astype(jnp.float32)
  mean_square = jnp.square(x32).mean(-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


def _rotate(x, cos_sin):
  """Turns channel i of [B, T, ..., H] with channel i + H/2, in float32."""
  _, T, half = cos_sin.shape
  cos, sin = cos_sin.reshape(2, T, *(1,) * (x.ndim - 3), half)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(
    x.dtype
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_live(eps, keep, cos_sin, *arrays):
  """`_attend` on the heads up to the extent."""
  return _attend_live_forward(eps, keep, cos_sin, *arrays)[0]


def _attend_live_forward(eps, keep, cos_sin, *arrays):
  def block(name, keep, *arrays):
    return (_attend(eps, keep, cos_sin, *arrays),)

  (out,) = _over_heads(block, keep, (2, 2, 2, None, None), (2,), *arrays)
  return out, (keep, cos_sin, *arrays)


def _attend_live_backward(eps, saved, dout):
  keep, cos_sin, *arrays = saved

  def block(name, keep, *arrays):
    *arrays, dout = arrays
    attend = functools.partial(_attend, eps, keep, cos_sin)
    return jax.vjp(attend, *arrays)[1](dout)

  axes = (2, 2, 2, None, None)
  grads = _over_heads(block, keep, (*axes, 2), axes, *arrays, dout)
  return None, None, *grads


_attend_live.defvjp(_attend_live_forward, _attend_live_backward)


def _over_heads(block, keep, axes_in, axes_out, *args):
  """block(name, keep, *args) on the heads up to the extent: a dozen numbers."""
  step = -(-keep.size // 12)
  return dispatch.in_buckets(
    block, keep, keep.size, step, axes_in, axes_out, *args
  )
