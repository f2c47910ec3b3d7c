"""Weights, gradients, curvature -> one score per group; the running average.

Removing weight w changes the loss by about -g w + 1/2 h w^2, with g the
gradient of the mean loss and h the diagonal of its Hessian. The kinds of score
(sums run over the weights that belong to a group; nats per token unless a kind
says else):

    kind               score of a group           source
    taylor1            sum |g w|                  Molchanov et al. 2017, 2019
    taylor1_momentum   sum |m w|                  as taylor1; m: see below
    taylor1_group      |sum g w|                  after Ma et al. 2023
    taylor2            sum |-g w + 1/2 h w^2|     Ma et al. 2023
    taylor2_micro      the same                   Ma et al. 2023
    obd                sum 1/2 h w^2              LeCun et al. 1990
    fisher             1/2 n (sum g w)^2          Theis et al. 2018
    magnitude          sum |w|                    Li et al. 2017
    activation         mean |a|                   Muralidharan et al. 2024
    random             uniform                    control

g is the very gradient that the optimizer uses, so that scoring needs neither a
second forward nor a second backward pass. With small batches |g w| is mostly
the noise of g, and an average of absolute values keeps that noise.
`taylor1_momentum` averages signed gradients first: it takes Adam's
bias-corrected first moment m for g, the mean over about 1 / (1 - b1) batches,
in which each was clipped, so that its unit is nats per token times the mean
clip factor. `taylor1_group` lets the terms of a group cancel, in each batch; an
average of the signed sums over the batches is worse than one of their absolute
values (Spearman correlation with the true change of the loss 0.40 against 0.91
for heads): of a finished model the mean gradient is about 0, and what counts is
its spread.

h is the diagonal of the empirical Fisher matrix of a token, E[g_t^2]. Of a
gradient that is a mean over n tokens E[g^2] is about 1/n of that, so both
estimates are multiplied by n: `taylor2` and `obd` use Adam's bias-corrected
second moment, for free, and undo the clip by the factor of the newest batch;
`taylor2_micro` uses the mean square of the gradients of the micro-batches of
one update, at the price of one more parameter-sized sum. `obd` leaves the
first-order term out: where training has ended it is 0 on average, and what one
small batch shows of it is noise, which outweighs the other term by far.

`fisher` is what `obd` is to one weight for a group as a whole: the curvature in
the direction in which all its members fall together, terms between weights and
between tokens included. Of a mask on what the group computes that curvature is
E[(dL/dm)^2], and dL/dm is the sum of g w over the weights that compute it: `wo`
of a head, `w_down` of a feed-forward channel, and the embedding (as the input,
where it is tied), `wo` and `w_down` of a stem channel. One square per micro-
batch of n tokens: small ones say more, single tokens less (a channel goes for
all tokens at once). SmolLM2 cut at one stroke from 134.5M to 105M by the scores
of 48 sequences, ragged, has held-out bits per byte of 1.472; of 1.492 with sums
over all members of a group, 1.517 with `obd`, 1.542 with the squares of single
tokens.

Which parameters are members of which group is read from `structure.axes`. The
paper (arXiv 2502.06663) names the ingredients; these formulas and their
normalisation are our reading of it. Magnitude, activation and random are
controls for an ablation. They are no changes of a loss; activation and random
are multiplied by the number of live members, so that the price of a group, its
score per parameter, compares types by mean |a| and not by their size, before a
shrink as after it (the stem's, where its price leaves out the embedding, comes
out larger by a quarter to a third). Layers they do not compare: under `ragged`,
`activation` takes the first layers of SmolLM2, whose activations are small, and
leaves 3.05 bits per byte where `fisher` leaves 1.472.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from effllm_jax import model
from effllm_jax import structure

Array = jax.Array

# The kinds that estimate a change of the loss: only they compare types.
NATS = (
  'taylor1', 'taylor1_momentum', 'taylor1_group', 'taylor2', 'taylor2_micro',
  'obd', 'fisher',
)  # fmt: skip
KINDS = (*NATS, 'magnitude', 'activation', 'random')


def group_scores(
  term: Callable[..., Array],
  params: structure.Params,
  *rest: structure.Params,
  members: Callable[[str], bool] = lambda letters: True,
  masks: structure.Groups | None = None,
) -> structure.Groups:
  """Sums `term(w, ...)` over the members of every group, in float32.

  Args:
    term: elementwise, of a float32 weight and what `rest` holds for it.
    params: the weights.
    *rest: parameter-shaped trees: the gradient of the mean loss in nats per
      token, before clipping; the curvature.
    members: which parameters count, by their axis letters without N.
    masks: what is alive, which alone is summed. May be None where the term is
      0 for a gradient of 0, as every dead weight has. Otherwise dead weights
      would count until a shrink, which would then change the scores.

  Returns:
    heads [N, K], ffn [N, F], stem [D]; exactly 0 of a dead group.
  """
  table = structure.axes_of(params)
  live_D, *live_layers = (
    (None, None, None)
    if masks is None
    else (masks.stem, masks.heads, masks.ffn)
  )

  # One layer at a time: the terms of a layer live in cache-sized buffers (14 MB
  # instead of 425 MB for SmolLM2-135M, and 1.5x faster than summing the stacked
  # arrays, 2-core CPU).
  def layer(stem_D, scanned):
    trees, (live_K, live_F) = scanned
    sums = _sums(
      term,
      members,
      {'D': live_D, 'K': live_K, 'F': live_F},
      jax.tree.map(lambda letters: letters.removeprefix('N'), table.layers),
      *trees,
    )
    return stem_D + sums['D'], (sums['K'], sums['F'])

  outside = [tree.replace(layers=None) for tree in (table, params, *rest)]
  stem_D, (heads_NK, ffn_NF) = jax.lax.scan(
    layer,
    _sums(term, members, {'D': live_D}, *outside)['D'],
    (tuple(tree.layers for tree in (params, *rest)), tuple(live_layers)),
  )
  return structure.Groups(heads=heads_NK, ffn=ffn_NF, stem=stem_D)


def _sums(term, members, live, table, *trees) -> dict[str, Array]:
  """Sums of the terms over all but one axis, by the letter that is kept.

  Those of dead groups are left out, of letters for which `live` has a mask.
  """
  sums = {}

  def add(letters, *leaves):
    if not members(letters):
      return
    value = term(*(x.astype(jnp.float32) for x in leaves))
    for axis, letter in enumerate(letters):
      if live.get(letter) is not None:
        others = [i for i in range(len(letters)) if i != axis]
        value *= jnp.expand_dims(live[letter], others)
    for letter in structure.PRUNABLE:
      if letter in letters:
        others = [i for i, x in enumerate(letters) if x != letter]
        sums[letter] = sums.get(letter, 0.0) + value.sum(others)

  jax.tree.map(add, table, *trees)
  return sums


def taylor1(
  params: structure.Params,
  grads: structure.Params,
  masks: structure.Groups | None = None,
) -> structure.Groups:
  """Sum of |g w|; g is a gradient or, with masks, its momentum."""
  term = lambda w, g: jnp.abs(g * w)
  return group_scores(term, params, grads, masks=masks)


def taylor1_group(
  params: structure.Params, grads: structure.Params
) -> structure.Groups:
  """|Sum of g w|: the first-order change of the loss."""
  sums = group_scores(lambda w, g: g * w, params, grads)
  return jax.tree.map(jnp.abs, sums)


def taylor2(
  params: structure.Params,
  grads: structure.Params,
  squares: structure.Params,
  scale: Array | float,
  masks: structure.Groups | None = None,
) -> structure.Groups:
  """Sum of |-g w + 1/2 h w^2|, h = scale * squares the Fisher of a token.

  The scale is a scalar of its own so that no scaled copy of the squares is
  ever held.
  """
  return group_scores(
    lambda w, g, v: jnp.abs(-g * w + 0.5 * scale * v * w * w),
    params,
    grads,
    squares,
    masks=masks,
  )


def obd(
  params: structure.Params,
  squares: structure.Params,
  scale: Array | float,
  masks: structure.Groups,
) -> structure.Groups:
  """Sum of 1/2 h w^2, h = scale * squares the Fisher diagonal of a token."""
  term = lambda w, v: 0.5 * scale * v * w * w
  return group_scores(term, params, squares, masks=masks)


def fisher(
  params: structure.Params, grads: structure.Params, tokens: int
) -> structure.Groups:
  """1/2 tokens (sum of g w)^2 over the weights that compute a group's output.

  Args:
    params: the weights.
    grads: of the mean loss of one micro-batch.
    tokens: in that micro-batch.
  """
  # What writes to the stem: the embedding, wo and w_down, of which the last two
  # also compute heads and channels. A norm scale has no other axis.
  writes = lambda letters: letters[-1] == 'D' and len(letters) > 1
  slopes = group_scores(lambda w, g: g * w, params, grads, members=writes)
  if params.unembed is None:
    # The gradient of a tied embedding is the sum of both its uses, and as the
    # output matrix it only reads the stem. What it reads, the scale of the last
    # norm has just multiplied: both have one slope.
    read_D = params.final_norm * grads.final_norm
    slopes = slopes.replace(stem=slopes.stem - read_D)
  return jax.tree.map(lambda x: 0.5 * tokens * jnp.square(x), slopes)


def magnitude(
  params: structure.Params, masks: structure.Groups
) -> structure.Groups:
  """Sum of |w|."""
  return group_scores(jnp.abs, params, masks=masks)


def activation(
  taps: model.Taps, shapes: structure.Params, masks: structure.Groups
) -> structure.Groups:
  """Mean magnitude of what a group computes, times its number of live members.

  Of a head the mean over tokens of the root mean square of its G outputs of
  width H, of a feed-forward channel the mean |activation|, of a stem channel
  the mean over tokens and readers of |normed stream|.

  Args:
    taps: of a batch.
    shapes: arrays or shapes of the parameters.
    masks: what is alive of them.
  """
  heads_NBTKGH = taps.heads.astype(jnp.float32)
  rms_NBTK = jnp.sqrt(jnp.square(heads_NBTKGH).mean((-2, -1)))
  # Each layer reads the stem twice, the output matrix once.
  stem = lambda x: jnp.abs(x.astype(jnp.float32))
  readers_BTD = (
    stem(taps.attn_in).sum(0) + stem(taps.ffn_in).sum(0) + stem(taps.final)
  )
  means = structure.Groups(
    heads=rms_NBTK.mean((1, 2)),
    ffn=jnp.abs(taps.ffn.astype(jnp.float32)).mean((1, 2)),
    stem=readers_BTD.mean((0, 1)) / (2 * len(taps.ffn) + 1),
  )
  return jax.tree.map(jnp.multiply, means, _members(shapes, masks))


def random(
  key: Array, shapes: structure.Params, masks: structure.Groups
) -> structure.Groups:
  """Uniform in [0, 1), times the number of live members."""
  keys = jax.random.split(key, 3)
  layers = shapes.layers
  uniform = functools.partial(jax.random.uniform, dtype=jnp.float32)
  draws = structure.Groups(
    heads=uniform(keys[0], layers.wo.shape[:2]),
    ffn=uniform(keys[1], layers.w_down.shape[:2]),
    stem=uniform(keys[2], shapes.embed.shape[1:]),
  )
  return jax.tree.map(jnp.multiply, draws, _members(shapes, masks))


def _members(
  shapes: structure.Params, masks: structure.Groups
) -> structure.Groups:
  """Number of live weights in one live group of each type, float32 []."""
  live = {
    'D': masks.stem.sum(),
    'K': masks.heads.sum(-1),
    'F': masks.ffn.sum(-1),
  }
  sizes = dict.fromkeys(structure.PRUNABLE, 0.0)

  def add(letters, leaf):
    for letter in structure.PRUNABLE:
      if letter in letters:
        # Of one layer, or [N] where it differs by layer.
        size = jnp.float32(1)
        for axis, x in enumerate(letters):
          if x not in (letter, 'N'):
            size *= live.get(x, leaf.shape[axis])
        if letter == 'D' and 'N' in letters:
          size = jnp.broadcast_to(size, leaf.shape[0]).sum()
        sizes[letter] += size

  structure.map_axes(add, shapes)
  return structure.Groups(
    **{name: sizes[letter] for letter, name in structure.PRUNABLE.items()}
  )


def average(
  mean: structure.Groups, scores: structure.Groups, count: Array, decay: float
) -> structure.Groups:
  """Exponential moving average of scores, without the bias of its start.

  Equal to sum_i decay^(n-i) s_i / sum_i decay^(n-i) over the n = count + 1
  scores seen so far: the first score enters whole, decay 0 keeps the last one.
  The average runs on across prunes and shrinks (survivors keep their history).

  Args:
    mean: the average so far; ignored where `count` is 0.
    scores: the newest scores.
    count: int32, number of scores already in `mean`.
    decay: in [0, 1); 1 / (1 - decay) is about the number of batches averaged.
  """
  new = (1 - decay) / (1 - decay ** (count.astype(jnp.float32) + 1))
  return jax.tree.map(lambda m, s: m + new * (s - m), mean, scores)
