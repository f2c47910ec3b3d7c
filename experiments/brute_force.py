"""What removing a group really does to the loss, and how scores order groups.

A group is removed by its mask bit, alone, and the change of the held-out loss
is measured; nothing is estimated. The scores come from `steps.train_step` at
learning rate 0, as in a run: on training text, with Adam's moments warmed up,
averaged over the batches with the decay of `efficientllm_a`.

A uniform prune takes a block of groups at once, and chooses between types by
the sum of their scores: `block_changes` measures such blocks too.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.table
import scipy.stats
import tokenizers

from effllm_jax import data
from effllm_jax import dataset
from effllm_jax import heldout as heldout_lib
from effllm_jax import model
from effllm_jax import optimizers
from effllm_jax import saliency
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure

COMPUTE = model.Compute(remat='none')
# As in experiments/configs/efficientllm_a.py; smollm2_135m has a decay of 0.95.
DECAY, B1, B2, CLIP = 0.9, 0.9, 0.95, 1.0


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Text of one measurement: `accumulate` micro-batches make a batch."""

  seq_len: int
  accumulate: int
  micro_batch: int
  batches: int
  heldout_tokens: int


SMALL_SIZES = Sizes(128, 4, 4, 32, 16384)
SOURCE_SIZES = Sizes(128, 2, 2, 4, 512)
# Bytes and a separator.
SMALL = structure.ModelConfig(
  V=257, D=64, N=4, K=8, G=1, H=8, F=128, context=128,
  rope_theta=1e4, norm_eps=1e-5, tied=True,
)  # fmt: skip
SMALL_STEPS = 700


def train_batches(
  text: pathlib.Path,
  tokenizer: tokenizers.Tokenizer,
  separator_id: int,
  sizes: Sizes,
  seed: int,
) -> Iterator[jax.Array]:
  """Endless training batches, int32 [accumulate, micro_batch, seq_len + 1]."""
  batches = data.train_iterator(
    text, tokenizer, separator_id, seq_len=sizes.seq_len,
    batch_size=sizes.accumulate * sizes.micro_batch, seed=seed, weights={},
    workers=0, timeout=0.0,
  )  # fmt: skip
  shape = (sizes.accumulate, sizes.micro_batch, sizes.seq_len + 1)
  return (jnp.asarray(x).reshape(shape) for x in batches)


def heldout_windows(
  text: pathlib.Path,
  tokenizer: tokenizers.Tokenizer,
  separator_id: int,
  sizes: Sizes,
) -> tuple[np.ndarray, np.ndarray]:
  """Held-out windows [n, seq_len + 1] of all domains, and their weights."""
  domains = heldout_lib.windows(
    text, tokenizer, separator_id, seq_len=sizes.seq_len,
    # At least one: 0 would be all of them.
    tokens_per_domain=max(
      sizes.heldout_tokens // len(dataset.domains(text)), 1
    ),
  )  # fmt: skip
  held = domains.values()
  windows = np.concatenate([h.windows for h in held])
  return windows, np.concatenate([h.weight for h in held])


def recipe(kind: str) -> steps.Recipe:
  """A step that scores by `kind` and keeps the score of its batch only."""
  return steps.Recipe(
    compute=COMPUTE, saliency=kind, decay=0.0, b1=B1, b2=B2, clip=CLIP,
    distill=0.0, temperature=1.0, top_k=1, seed=0,
  )  # fmt: skip


def train_small(
  batches: Iterator[jax.Array],
  cfg: structure.ModelConfig,
  num_steps: int,
  seed: int,
) -> structure.Params:
  """A small model trained from scratch, the rate decayed to 1 % at the end."""
  rate = optimizers.learning_rate(
    'wsd', 6e-3, 6e-5, num_steps // 20, num_steps // 3, num_steps
  )
  tx = optimizers.optimizer(rate, B1, B2, 0.1, CLIP)
  state = state_lib.fresh_state(model.init(jax.random.key(seed), cfg), cfg, tx)
  for _ in range(num_steps):
    state, _ = steps.train_step(
      state, next(batches), cfg=cfg, tx=tx, recipe=recipe('taylor1'),
      score=False,
    )  # fmt: skip
  return state.params


def scores(
  params: structure.Params,
  batches: list[jax.Array],
  kind: str,
  cfg: structure.ModelConfig,
) -> dict[str, structure.Groups]:
  """Scores of all groups, as they come out of the training step.

  Args:
    params: left as they are.
    batches: as `train_batches` gives them.
    kind: one of `saliency.KINDS`.
    cfg: the architecture.

  Returns:
    `average` over the batches; `newest`, of the last batch alone.
  """
  tx = _frozen()
  # The step donates its state; a rate of 0 changes no bit of the parameters.
  state = state_lib.fresh_state(jax.tree.map(jnp.copy, params), cfg, tx)
  mean = jax.tree.map(jnp.copy, state.prune.scores)
  for i, windows in enumerate(batches):
    state, _ = steps.train_step(
      state, windows, cfg=cfg, tx=tx, recipe=recipe(kind), score=True
    )
    newest = state.prune.scores
    mean = saliency.average(mean, newest, jnp.int32(i), DECAY)
  return jax.tree.map(np.asarray, {'average': mean, 'newest': newest})


@functools.cache
def _frozen():
  """The optimizer of a run, at rate 0: its moments move, the weights do not."""
  return optimizers.optimizer(lambda _: 0.0, B1, B2, 0.0, CLIP)


def draw_groups(
  cfg: structure.ModelConfig, most: int, seed: int
) -> structure.Groups:
  """Flat indices of at most `most` groups of each type, ascending; 0: all."""
  rng = np.random.default_rng(seed)

  def draw(shape):
    indices = np.arange(math.prod(shape))
    if 0 < most < len(indices):
      indices = np.sort(rng.choice(indices, most, replace=False))
    return indices

  return structure.Groups(
    **{
      t: draw(getattr(structure.group_shapes(cfg), t)) for t in structure.TYPES
    }
  )


def true_changes(
  params: structure.Params,
  groups: structure.Groups,
  windows: np.ndarray,
  weight: np.ndarray,
  cfg: structure.ModelConfig,
) -> tuple[float, structure.Groups]:
  """What removing each group alone adds to the loss, by brute force.

  Args:
    params: the model; all of it is alive.
    groups: flat indices, from `draw_groups`.
    windows: int32 [n, T + 1].
    weight: [n, T], 1 where a token is scored.
    cfg: the architecture.

  Returns:
    The loss, nats per token, and per group what the even and the odd tokens
    contribute to the change of that loss, [number of groups, 2].
  """
  sizes = [getattr(groups, t).size for t in structure.TYPES]
  starts = _starts(cfg)
  numbers = np.concatenate(
    [starts[t] + getattr(groups, t) for t in structure.TYPES]
  )
  base, changes = _changes(params, numbers, windows, weight, cfg=cfg)
  parts = np.split(np.asarray(changes, np.float64), np.cumsum(sizes)[:-1])
  return float(base), structure.Groups(*parts)


def _starts(cfg) -> dict[str, int]:
  """Groups are numbered through: heads, then ffn, then stem."""
  starts, at = {}, 0
  for t in structure.TYPES:
    starts[t] = at
    at += math.prod(getattr(structure.group_shapes(cfg), t))
  return starts


@functools.partial(jax.jit, static_argnames=('cfg',))
def _token_losses(params, masks, windows_BT, *, cfg):
  return model.token_losses(params, masks, windows_BT, cfg, COMPUTE)


@functools.partial(jax.jit, static_argnames=('cfg',))
def _changes(params, numbers, windows_BT, weight_BT, *, cfg):
  alive, starts = structure.all_alive(cfg), _starts(cfg)
  own = structure.Groups(
    **{
      t: starts[t]
      + jnp.arange(getattr(alive, t).size).reshape(getattr(alive, t).shape)
      for t in structure.TYPES
    }
  )
  losses = lambda masks: _token_losses(params, masks, windows_BT, cfg=cfg)
  base_BT, share_BT = losses(alive), weight_BT / weight_BT.sum()

  def change(number):
    removed_BT = losses(jax.tree.map(lambda i: i != number, own))
    # Token by token: the difference of two sums would be mostly rounding.
    changes_BT = (removed_BT - base_BT) * share_BT
    return jnp.stack([changes_BT[:, i::2].sum() for i in (0, 1)])

  return (base_BT * share_BT).sum(), jax.lax.map(change, numbers)


def block_sizes(cfg: structure.ModelConfig) -> dict[str, int]:
  """One head of every layer, and as many parameters' worth of other groups.

  Returns:
    Groups that a block of each type takes: of heads and ffn in every layer. The
    embedding does not count, as in the shipped config, and one group is least.
  """
  fewer = lambda **widths: (
    cfg.num_params() - dataclasses.replace(cfg, **widths).num_params()
  )
  heads = fewer(K=cfg.K - 1)
  stem = fewer(D=cfg.D - 1) - (1 if cfg.tied else 2) * cfg.V
  most = {'heads': 1, 'ffn': heads / fewer(F=cfg.F - 1), 'stem': heads / stem}
  return {t: max(round(x), 1) for t, x in most.items()}


def block_changes(
  params: structure.Params,
  scores: structure.Groups,
  whole: np.ndarray,
  windows: np.ndarray,
  weight: np.ndarray,
  cfg: structure.ModelConfig,
) -> dict[str, dict[str, float]]:
  """What removing a block of each type adds to the loss, and what scores say.

  Args:
    params: the model; all of it is alive.
    scores: a block takes the lowest of every layer, or of the stem.
    whole: losses of the whole model by token, [n, T].
    windows: int32 [n, T + 1].
    weight: [n, T], 1 where a token is scored.
    cfg: the architecture.

  Returns:
    By type: `change`, measured; `error`, its standard error over the windows
    (nan: there is one); and `score`, the sum over the block, which is an
    estimate for `saliency.NATS` only; nats per token.
  """
  alive = structure.all_alive(cfg)
  share_BT = np.asarray(weight, np.float64) / weight.sum()
  change, error, total = {}, {}, {}
  for t, size in block_sizes(cfg).items():
    score = np.asarray(getattr(scores, t), np.float64)
    lowest = np.argsort(score, axis=-1, kind='stable')[..., :size]
    mask = np.ones(score.shape, bool)
    np.put_along_axis(mask, lowest, False, axis=-1)
    masks = alive.replace(**{t: jnp.asarray(mask)})
    removed_BT = np.asarray(_token_losses(params, masks, windows, cfg=cfg))
    added_B = ((removed_BT - whole) * share_BT).sum(1)
    change[t] = float(added_B.sum())
    # Of a ratio: a window counts by its tokens, and the last have fewer.
    rest_B, n = added_B - share_BT.sum(1) * change[t], len(added_B)
    error[t] = math.sqrt((rest_B**2).sum() * n / (n - 1)) if n > 1 else math.nan
    total[t] = float(score[~mask].sum())
  return {'change': change, 'error': error, 'score': total}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
  """Rank correlation; nan where one side is constant or has one value."""
  if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
    return math.nan
  return float(scipy.stats.spearmanr(a, b).statistic)


def measure(
  params: structure.Params,
  batches: list[jax.Array],
  heldout: tuple[np.ndarray, np.ndarray],
  cfg: structure.ModelConfig,
  groups: structure.Groups,
  kinds: tuple[str, ...] = saliency.KINDS,
) -> dict[str, Any]:
  """Truth, scores and their correlations, ready for JSON.

  Returns:
    `loss`; `truth` and `scores` by kind, lists by type in the order of
    `groups`; `correlation` by kind with the truth (`average`, `newest`: by type
    and, for kinds in nats, `all`) and of `newest` with `average`;
    `halves`: of the truth on even tokens with that on odd ones; `blocks` by
    kind, from `block_changes`.
  """
  windows, weight = heldout
  loss, changes = true_changes(params, groups, windows, weight, cfg)
  truth = {t: getattr(changes, t).sum(1) for t in structure.TYPES}
  even, odd = (
    {t: getattr(changes, t)[:, i] for t in structure.TYPES} for i in (0, 1)
  )
  found, correlation, blocks = {}, {}, {}
  alive = structure.all_alive(cfg)
  whole = np.asarray(_token_losses(params, alive, windows, cfg=cfg))

  def add(name, average, newest, across):
    found[name] = {t: average[t].tolist() for t in structure.TYPES}
    correlation[name] = {
      'average': _correlations(average, truth, across),
      'newest': _correlations(newest, truth, across),
      'newest_with_average': _correlations(newest, average, across),
    }

  for kind in kinds:
    trees = scores(params, batches, kind, cfg)
    blocks[kind] = block_changes(
      params, trees['average'], whole, windows, weight, cfg
    )
    of = {
      name: {
        t: getattr(tree, t).ravel()[getattr(groups, t)] for t in structure.TYPES
      }
      for name, tree in trees.items()
    }
    add(kind, of['average'], of['newest'], kind in saliency.NATS)
  return {
    'loss': loss,
    'groups': {t: getattr(groups, t).tolist() for t in structure.TYPES},
    'truth': {t: truth[t].tolist() for t in structure.TYPES},
    'scores': found,
    'correlation': correlation,
    'halves': _correlations(even, odd, True),
    'blocks': blocks,
  }


def _correlations(a, b, across: bool) -> dict[str, float]:
  by_type = {t: spearman(a[t], b[t]) for t in structure.TYPES}
  if across:
    by_type['all'] = spearman(
      *(np.concatenate([x[t] for t in structure.TYPES]) for x in (a, b))
    )
  return by_type


def table(result: dict[str, Any], batches: int) -> rich.table.Table:
  """One row per kind of score."""
  made = rich.table.Table(
    'score', *structure.TYPES, 'all', 'one batch', 'one ~ mean',
    title=f'Spearman correlation with the true change, {batches} batches',
    box=rich.box.SIMPLE_HEAD,
  )  # fmt: skip
  cell = lambda x: '' if x is None or math.isnan(x) else f'{x:.2f}'
  row = lambda by_type: [
    cell(by_type.get(t)) for t in (*structure.TYPES, 'all')
  ]
  short = lambda by_type: ' '.join(row(by_type)[:3]).replace('0.', '.')
  for kind, numbers in result['correlation'].items():
    made.add_row(
      kind,
      *row(numbers['average']),
      short(numbers['newest']),
      short(numbers['newest_with_average']),
    )
  made.add_section()
  made.add_row('truth, halves', *row(result['halves']))
  return made


def block_table(
  result: dict[str, Any], cfg: structure.ModelConfig
) -> rich.table.Table:
  """One row per kind of score: what its block of each type really costs."""
  sizes = block_sizes(cfg)
  made = rich.table.Table(
    'score', *structure.TYPES, *(f'{t}, score' for t in structure.TYPES),
    title='nats per token that a block adds: ' + ', '.join(
      f'{sizes[t]} {t}' + ('' if t == 'stem' else ' of every layer')
      for t in structure.TYPES
    ),
    box=rich.box.SIMPLE_HEAD,
  )  # fmt: skip
  for kind, numbers in result['blocks'].items():
    says = numbers['score'] if kind in saliency.NATS else {}
    made.add_row(
      kind,
      *(
        f'{numbers["change"][t]:.4f} ± {numbers["error"][t]:.4f}'
        for t in structure.TYPES
      ),
      *(f'{says[t]:.4f}' if says else '' for t in structure.TYPES),
    )
  return made


def unigram_entropy(batches: list[jax.Array]) -> float:
  """Nats per token of a model that knows frequencies only."""
  counts = np.bincount(np.concatenate([np.ravel(b) for b in batches]))
  return float(scipy.stats.entropy(counts))
