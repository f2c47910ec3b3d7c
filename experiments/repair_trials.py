"""What repairs give back after one prune, on held-out text.

Nothing is trained: the scores come from `steps.train_step` at learning rate 0,
as in a run, and every repair starts from the same parameters.
"""

from collections.abc import Sequence
import dataclasses
import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.box
import rich.table

from effllm_jax import budgets
from effllm_jax import corpus
from effllm_jax import data
from effllm_jax import evaluate
from effllm_jax import heldout as heldout_lib
from effllm_jax import inputs
from effllm_jax import optimizers
from effllm_jax import plan as plan_lib
from effllm_jax import selection
from effllm_jax import sources
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure

# Name and tokens of what was not repaired, in a table.
MASKED = 'masked only', 0


class Found(NamedTuple):
  """A pruned model.

  Attributes:
    loss: of the held-out text, nats per token.
    error_left: share of the layers' squared error that a repair leaves.
    seconds: of the repair, without its compilation.
  """

  loss: float
  error_left: float = 1.0
  seconds: float = 0.0


class Trials:
  """A source, prunes of it, and repairs of what they leave.

  Args:
    config: says source, text, batch, kind of prices and floors. Widths are not
      rounded.
    cache: folder of sources and texts.
    heldout_tokens: held-out tokens of each domain.

  Raises:
    errors.InputError: no such source or text, or a config that cannot be run.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    cache: str | os.PathLike,
    heldout_tokens: int,
  ):
    self._config = config
    source = sources.load_whole(config.source, cache, '--config.source')
    self.cfg, self._alive = source.cfg, structure.all_alive(source.cfg)
    self._params = jax.tree.map(jnp.asarray, source.params)
    scored = inputs.eval_text(config)
    text = corpus.prepare(config.data.text, cache)
    self._encoding = text, source.tokenizer, source.separator_id
    self._heldout = heldout_lib.windows(
      scored or text,
      source.tokenizer,
      source.separator_id,
      seq_len=config.data.seq_len,
      tokens_per_domain=heldout_tokens,
    )
    plan = plan_lib.make(config, self.cfg)
    self._recipe = dataclasses.replace(plan.recipe, distill=0.0)
    self._rules = dataclasses.replace(
      plan.rules, policy='uniform', multiple_of=(1, 1, 1)
    )
    self._compiled = {}

  def batches(self, seed: int, count: int) -> list[np.ndarray]:
    """The first batches of an order of the text, each what an update takes."""
    data_config, accumulate = self._config.data, self._config.train.accumulate
    stream = data.train_iterator(
      *self._encoding,
      seq_len=data_config.seq_len,
      batch_size=data_config.batch_size * accumulate,
      seed=seed,
      weights=data_config.weights.to_dict(),
      workers=0,
      timeout=data_config.timeout,
    )
    return [next(stream) for _ in range(count)]

  def prune(
    self, batches: Sequence[np.ndarray], share: float
  ) -> structure.Groups:
    """Masks of one uniform prune, scored on batches, of a share of all."""
    target = int(self.cfg.num_params() * (1 - share))
    return selection.select(
      self._scores(batches), self._alive, target, target, self._rules,
      budgets.params(self.cfg),
    )  # fmt: skip

  def _scores(self, batches):
    recipe = self._recipe
    # At rate 0 the moments move and the parameters do not.
    tx = optimizers.optimizer(
      lambda _: 0.0, recipe.b1, recipe.b2, 0.0, recipe.clip
    )
    # A copy: the step donates what it gets.
    params = jax.tree.map(jnp.copy, self._params)
    state = state_lib.fresh_state(params, self.cfg, tx)
    accumulate = self._config.train.accumulate
    for windows in batches:
      windows = windows.reshape(accumulate, -1, windows.shape[-1])
      state, _ = steps.train_step(
        state, jnp.asarray(windows),
        cfg=self.cfg, tx=tx, recipe=recipe, score=True,
      )  # fmt: skip
    return state.prune.scores

  def unpruned(self) -> Found:
    """The source."""
    return Found(self._loss(self._params, self._alive))

  def masked(self, masks: structure.Groups) -> Found:
    """The source under masks."""
    return Found(self._loss(self._params, masks))

  def repaired(
    self, masks: structure.Groups, windows: np.ndarray, damping: float
  ) -> Found:
    """The source under masks, its survivors repaired on windows [n, T].

    Args:
      masks: of `prune`.
      windows: every sequence is a micro-batch, as a choice asks for two.
      damping: see `repair.repair`; 0: every matrix chooses its own.
    """
    # A copy: the step donates what it gets.
    params = jax.block_until_ready(jax.tree.map(jnp.copy, self._params))
    given = params, self._alive, masks, jnp.asarray(windows[:, None])
    key = windows.shape, damping
    if key not in self._compiled:
      self._compiled[key] = steps.repair_step.lower(
        *given, cfg=self.cfg, damping=damping
      ).compile()
    start = time.perf_counter()
    params, fits = jax.block_until_ready(self._compiled[key](*given))
    seconds = time.perf_counter() - start
    without, left = (
      sum(float(fit[kind]) for fit in fits.values())
      for kind in ('error_without', 'error_with')
    )
    return Found(self._loss(params, masks), left / without, seconds)

  def _loss(self, params, masks):
    return evaluate.bits_per_byte(
      params, masks, self._heldout, self.cfg, self._recipe.compute,
      self._config.data.batch_size,
    )['nats_per_token']  # fmt: skip


def table(
  before: Found, rows: dict[tuple[str, int], list[Found]]
) -> rich.table.Table:
  """Losses by seed, and shares of the damage that are left.

  Args:
    before: the source.
    rows: by the name of a repair and its tokens, what was found by seed;
      `MASKED` among them.
  """
  seeds = len(rows[MASKED])
  mean = lambda found: np.mean([f.loss for f in found])
  made = rich.table.Table(
    '', 'tokens', *(f'seed {i}' for i in range(seeds)), 'mean',
    'damage left', 'layer error left', 'seconds',
    title='Held-out loss, nats per token', box=rich.box.SIMPLE_HEAD,
  )  # fmt: skip
  made.add_row('before', '', *[f'{before.loss:.4f}'] * (seeds + 1), '', '', '')
  for (name, tokens), found in rows.items():
    damage = (mean(found) - before.loss) / (mean(rows[MASKED]) - before.loss)
    made.add_row(
      name,
      f'{tokens}' if tokens else '',
      *(f'{f.loss:.4f}' for f in found),
      f'{mean(found):.4f}',
      f'{damage:.2f}',
      f'{np.mean([f.error_left for f in found]):.2f}',
      f'{np.median([f.seconds for f in found]):.2f}' if tokens else '',
    )
  return made
