"""Log-probabilities of given continuations, many at once.

What is scored is picked on the device: of the logits, which are V times as many
as the tokens, none comes to the host, and only those are computed at all that a
continuation asks for. Requests that read the same tokens, such as two answers
of one token to one question, share one pass through the model.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import errors
from effllm_jax import model
from effllm_jax import structure
from effllm_jax import unembedding

Array = jax.Array

# By default a TPU rounds the float32 that it multiplies to bfloat16, a GPU to
# TF32; transformers, whose answers these are compared with, does neither.
_exact = functools.partial(jax.default_matmul_precision, 'highest')
# Scored tokens of one call; the shortest sequence that there is a compile for.
_POINTS, _NARROWEST = 128, 32


def score(
  params: structure.Params,
  masks: structure.Groups,
  cfg: structure.ModelConfig,
  requests: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  compute: model.Compute,
  batch_tokens: int,
  tasks: Sequence[str] = (),
  say: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:
  """How likely each continuation is after its context.

  Sequences are sorted by length and padded to one of a few widths (2^n and
  3 * 2^n), so that what is compiled depends on the widths and not on the
  requests. One that is longer than the model's context loses its first tokens.

  Args:
    params, masks, cfg: the model.
    requests: token ids of a context and of its continuation; neither is empty.
    compute: how the arithmetic is done.
    batch_tokens: tokens of one batch, padding included.
    tasks: which one each request belongs to, for an error; may be none.
    say: told how many sequences have been read, of how many.

  Returns:
    For each request the sum of the log-probabilities of its continuation, in
    nats, and whether every token of it is the most likely one.

  Raises:
    errors.InputError: a continuation is longer than the context, or the model
      answers with something that is not finite.
    ValueError: a context or a continuation is empty.
  """
  users = {}
  for i, (context, continuation) in enumerate(requests):
    if not (context and continuation):
      raise ValueError(f'request {i} has an empty context or continuation')
    if len(continuation) > cfg.context:
      raise errors.InputError(
        f'an answer{f" of {tasks[i]}" if tasks else ""} has '
        f'{len(continuation):,} tokens, the context of the model is '
        f'{cfg.context:,}; leave this task out'
      )
    # The last token is predicted, and never read.
    tokens = (*context, *continuation)[-cfg.context - 1 : -1]
    users.setdefault(tokens, []).append(i)
  nats, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
  done = 0
  for batch, tokens_BT in _batches(users, cfg.context, batch_tokens):
    # Of each target: row, position, token, request.
    points = np.asarray(
      [
        (row, len(tokens) - len(requests[i][1]) + t, target, i)
        for row, tokens in enumerate(batch)
        for i in users[tokens]
        for t, target in enumerate(requests[i][1])
      ],
      np.int32,
    )
    final_BTD = _hidden(params, masks, tokens_BT, cfg, compute)
    for j in range(0, len(points), _POINTS):
      chunk = points[j : j + _POINTS]
      filled = np.pad(chunk, ((0, _POINTS - len(chunk)), (0, 0)))
      found_P, top_P = _score(params, final_BTD, filled, compute)
      np.add.at(nats, chunk[:, 3], np.asarray(found_P)[: len(chunk)])
      np.logical_and.at(greedy, chunk[:, 3], np.asarray(top_P)[: len(chunk)])
    done += len(batch)
    say(done, len(users))
  if not np.isfinite(nats).all():
    raise errors.InputError(
      'the model gives probabilities that are not finite; take another event'
    )
  return [(float(x), bool(y)) for x, y in zip(nats, greedy, strict=True)]


def _batches(
  sequences: Iterable[tuple[int, ...]], context: int, batch_tokens: int
) -> Iterator[tuple[list[tuple[int, ...]], np.ndarray]]:
  """Sequences of a batch, and the same padded to one width, int32 [B, T].

  The longest come first: only the last batch can have rows to spare, and a
  machine that is too small says so at once.
  """
  rows = sorted(sequences, key=len, reverse=True)
  start = 0
  while start < len(rows):
    width = padded(len(rows[start]), context)
    count = max(1, batch_tokens // width)
    batch = rows[start : start + count]
    tokens_BT = np.zeros((count, width), np.int32)
    for row, tokens in enumerate(batch):
      tokens_BT[row, : len(tokens)] = tokens
    yield batch, tokens_BT
    start += count


def padded(length: int, context: int) -> int:
  """The width that a sequence is padded to: 32, 48, 64, 96, ..., context."""
  width = _NARROWEST
  while width < length:
    # From 2^n to 3 * 2^(n-1), and from there to 2^(n+1).
    width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
  return min(width, context)


@functools.partial(jax.jit, static_argnames=('cfg', 'compute'))
def _hidden(params, masks, tokens_BT, cfg, compute):
  with _exact():
    return model.hidden(params, masks, tokens_BT, cfg, compute)[0]


@functools.partial(jax.jit, static_argnames=('compute',))
def _score(params, final_BTD, points, compute):
  """Log-probability [P], and whether it is the largest, of points [P, 4]."""
  row_P, position_P, target_P, _ = points.T
  rows_PD = final_BTD[row_P, position_P]
  with _exact():
    logits_PV = unembedding.unembed(rows_PD[None], params, compute.mesh)
  logp_PV = jax.nn.log_softmax(logits_PV[0], axis=-1)
  found_P = jnp.take_along_axis(logp_PV, target_P[:, None], axis=-1)[:, 0]
  return found_P, logp_PV.argmax(-1) == target_P
