"""A model at one moment, to take apart: prune it, shrink it, name what is left.

On one device, outside of any training: what `pruning` does in a run, with a
target of your own, and nothing is written.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import budgets
from effllm_jax import errors
from effllm_jax import model as model_lib
from effllm_jax import rules as rules_lib
from effllm_jax import saliency
from effllm_jax import selection
from effllm_jax import shrink as shrink_lib
from effllm_jax import small_run
from effllm_jax import state as state_lib
from effllm_jax import structure
from effllm_jax import tables


@dataclasses.dataclass(frozen=True)
class Model:
  """A model at one moment.

  Attributes:
    name: what it is and of when.
    cfg: the architecture of its arrays.
    source_cfg: the architecture that it started from.
    prune: masks, scores and origin, see `state.PruneState`.
    load: reads the parameters.
  """

  name: str
  cfg: structure.ModelConfig
  source_cfg: structure.ModelConfig = dataclasses.field(repr=False)
  prune: state_lib.PruneState = dataclasses.field(repr=False)
  load: Callable[[], structure.Params] = dataclasses.field(repr=False)

  @functools.cached_property
  def params(self) -> structure.Params:
    """The parameters, read when they are first asked for."""
    return self.load()

  @property
  def live_params(self) -> int:
    """How many parameters belong to live groups."""
    return selection.live_params(self.prune.masks, self.cfg)


def small_model(text: str = 'To prune is to choose what to keep. ') -> Model:
  """A model of two layers that is small enough to print; no run is needed.

  Its weights are random, its tokens are bytes, and its scores come from the
  gradient of its loss on `text`, as in a training step (`taylor1`).

  Raises:
    errors.InputError: the text has no second byte to predict.
  """
  window = text.encode()
  if len(window) < 2:
    raise errors.InputError(
      f'text {text!r} has fewer than two bytes, and the loss is of the next '
      'one; take a longer text'
    )
  cfg = structure.ModelConfig(
    V=256, D=16, N=2, K=4, G=2, H=4, F=12, context=128,
    rope_theta=1e4, norm_eps=1e-5, tied=True,
  )  # fmt: skip
  params = small_run.random_params(cfg, deviation=0.3)
  prune = state_lib.fresh_prune_state(cfg)
  window_BT = np.frombuffer(window, np.uint8)[None].astype(np.int32)
  scores = _taylor1(params, prune.masks, window_BT, cfg=cfg)
  return Model(
    name='two layers of random weights',
    cfg=cfg,
    source_cfg=cfg,
    prune=prune.replace(scores=scores, count=jnp.ones((), jnp.int32)),
    load=lambda: params,
  )


def prune(model: Model, target: int, policy: str = 'ragged') -> Model:
  """Flips mask bits until `target` parameters are alive; no array changes.

  Args:
    model: with scores.
    target: at most so many live parameters. One group of each type stays.
    policy: 'ragged' takes the cheapest group anywhere; 'uniform' takes one of
      every layer at a time, of a model whose layers have one width.

  Raises:
    errors.InputError: the target is not below what is alive, or out of reach,
      or nothing has been scored.
  """
  rules = _rules(policy)
  if not int(model.prune.count):
    raise errors.InputError(
      f'{model.name} has no scores to prune by; take a run that prunes'
    )
  if not 0 < target < model.live_params:
    raise errors.InputError(
      f'target {target:,} is not between 0 and the {model.live_params:,} live '
      'parameters; choose another one'
    )
  widths = selection.live_widths(model.prune.masks)
  if policy == 'uniform' and any(np.ptp(widths[t]) for t in ('heads', 'ffn')):
    raise errors.InputError(
      f'{model.name} has layers of different widths; take policy ragged'
    )
  masks = selection.select(
    model.prune.scores,
    model.prune.masks,
    target,
    0,  # As in the middle of a run: at its end the size of a step counts too.
    rules,
    budgets.params(model.cfg),
  )
  pruned = dataclasses.replace(
    model,
    name=f'{model.name}, pruned',
    prune=model.prune.replace(masks=masks),
    load=lambda: model.params,
  )
  if pruned.live_params > target:
    raise errors.InputError(
      f'target {target:,} is out of reach: with one group of each type left '
      f'{pruned.live_params:,} parameters are alive; choose a larger one'
    )
  return pruned


def shrink(model: Model) -> Model:
  """Gathers what is alive into smaller arrays, the highest scores first."""
  exact = structure.Groups(1, 1, 1)
  cfg = shrink_lib.shrunk_config(model.prune.masks, model.cfg, exact)
  params, prune = _shrunk(model.params, model.prune, cfg=cfg)
  return dataclasses.replace(
    model,
    name=f'{model.name}, shrunk',
    cfg=cfg,
    prune=prune,
    load=lambda: params,
  )


def logit_difference(a: Model, b: Model, tokens_BT: np.ndarray) -> float:
  """Largest absolute difference between the logits of two models.

  Raises:
    errors.InputError: the tokens are no ids [B, T] of their vocabulary.
  """
  tokens_BT = np.asarray(tokens_BT)
  vocab = min(a.cfg.V, b.cfg.V)
  if (
    tokens_BT.ndim != 2
    or not tokens_BT.size
    or not np.issubdtype(tokens_BT.dtype, np.integer)
    or tokens_BT.min() < 0
    or tokens_BT.max() >= vocab
  ):
    raise errors.InputError(
      'there must be rows of token ids, and all of them within 0 and '
      f'{vocab - 1}; take those of notebook.tokens'
    )
  left, right = (
    _logits(x.params, x.prune.masks, tokens_BT, cfg=x.cfg) for x in (a, b)
  )
  return float(jnp.abs(left - right).max())


def lineage(model: Model) -> structure.Groups:
  """Which group of the source sits in each slot; -1 where the slot is dead.

  Returns:
    int arrays: heads [N, K], ffn [N, F], stem [D].
  """
  return jax.tree.map(
    lambda alive, origin: np.where(alive, origin, -1),
    model.prune.masks,
    model.prune.origin,
  )


def alive_in_source(model: Model) -> structure.Groups:
  """Which groups of the source are alive, bool, in the shapes of the source."""

  def spread(sits, width):
    alive = np.zeros((*sits.shape[:-1], width), bool)
    rows = np.nonzero(sits >= 0)
    alive[(*rows[:-1], sits[rows])] = True
    return alive

  widths = structure.Groups(**model.source_cfg.widths())
  return jax.tree.map(spread, lineage(model), widths)


def survivors(model: Model, most: int = 12) -> tables.Table:
  """The lineage as a table: the first `most` slots of each axis."""

  def said(sits):
    live = sits[sits >= 0]
    more = f' and {len(live) - most:,} more' if len(live) > most else ''
    return ' '.join(map(str, live[:most])) + more or 'none'

  sits = lineage(model)
  return tables.Table(
    title='Source index of what sits in the slots, in their order',
    columns=('', 'heads', 'ffn channels', 'stem channels'),
    rows=(
      ('all layers', '', '', said(sits.stem)),
      *(
        (f'layer {n}', said(sits.heads[n]), said(sits.ffn[n]), '')
        for n in range(model.cfg.N)
      ),
    ),
  )


def sizes(**models: Model) -> tables.Table:
  """What is alive and what the arrays hold, a column per model."""

  def row(name, of):
    return (name, *(of(x) for x in models.values()))

  def live(t):
    return lambda x: ' '.join(
      map(str, np.atleast_1d(np.asarray(getattr(x.prune.masks, t)).sum(-1)))
    )

  return tables.Table(
    title='Sizes',
    columns=('', *models),
    rows=(
      row('live parameters', lambda x: f'{x.live_params:,}'),
      row('parameters in arrays', lambda x: f'{x.cfg.num_params():,}'),
      row('live heads, by layer', live('heads')),
      row('live ffn channels, by layer', live('ffn')),
      row('live stem channels', live('stem')),
      row('shape of wq [N,D,K,G,H]', lambda x: str(x.params.layers.wq.shape)),
      row('shape of w_up [N,D,F]', lambda x: str(x.params.layers.w_up.shape)),
      row('shape of embed [V,D]', lambda x: str(x.params.embed.shape)),
    ),
  )


def prices(model: Model) -> structure.Groups:
  """Score of every group by parameter that its removal saves; 0 for dead.

  Returns:
    float32 numpy arrays: heads [N, K], ffn [N, F], stem [D].
  """
  found = selection.prices(
    model.prune.scores,
    model.prune.masks,
    _rules('ragged'),
    budgets.params(model.cfg),
  )
  return jax.tree.map(np.asarray, found)


def bits(groups: structure.Groups) -> str:
  """Masks as text: a block is a live group, a dot a dead one."""
  rows = [
    (f'{t}, layer {n}' if np.ndim(mask) == 2 else t, row)
    for t in structure.TYPES
    for mask in [np.asarray(getattr(groups, t))]
    for n, row in enumerate(np.atleast_2d(mask))
  ]
  width = max(len(name) for name, _ in rows)
  return '\n'.join(
    f'{name.ljust(width)}  {"".join("█" if x else "·" for x in row)}'
    for name, row in rows
  )


def _rules(policy) -> rules_lib.Rules:
  if policy not in rules_lib.POLICIES:
    raise errors.InputError(
      f'policy {policy!r} is not one of {", ".join(rules_lib.POLICIES)}; '
      'choose one of them'
    )
  return rules_lib.Rules(policy, (1, 1, 1), (1, 1, 1), price_embedding=False)


@functools.partial(jax.jit, static_argnames='cfg')
def _logits(params, masks, tokens_BT, *, cfg):
  return model_lib.forward(params, masks, tokens_BT, cfg)[0]


@functools.partial(jax.jit, static_argnames='cfg')
def _shrunk(params, prune, *, cfg):
  kept = shrink_lib.kept_indices(prune.masks, prune.scores, cfg)
  letters = structure.axes_of(params), state_lib.PRUNE_AXES
  return shrink_lib.take(letters, (params, prune), kept)


@functools.partial(jax.jit, static_argnames='cfg')
def _taylor1(params, masks, window_BT, *, cfg):
  grads = jax.grad(model_lib.loss)(params, masks, window_BT, cfg)
  return saliency.taylor1(params, grads)
