r"""What the repair of the survivors gives back after one prune.

    python -m experiments.bench_repair \
      --config=experiments/configs/smollm2_135m.py \
      [--seeds=3] [--share=0.05] [--damping=0,1,10]

For each seed: scores from a few training batches, one uniform prune of --share
of the parameters, and the held-out loss before it, after it, and after it with
a repair on one and on all of these batches; with a damping of 0 every matrix
chooses its own. Nothing is trained. The config says source, text, batch, kind
of prices and floors; widths are not rounded. Seconds are the median of a
repair, without its compilation.
"""

import time

from absl import flags
from ml_collections import config_flags
import rich.box
import rich.table

from effllm_jax import errors
from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Text orders.', lower_bound=1)
_SHARE = flags.DEFINE_float(
  'share', 0.05, 'Of the parameters to remove.', 0.0, 0.5
)
_DAMPING = flags.DEFINE_list(
  'damping', ['0', '1', '10'], 'Dampings to compare; 0: chosen.'
)
_BATCHES = flags.DEFINE_integer(
  'batches', 4, 'Batches to score on, and of the larger repair.', lower_bound=2
)
_TOKENS = flags.DEFINE_integer(
  'tokens', 256, 'Held-out tokens of each domain.', lower_bound=2
)


def main(argv: list[str]) -> None:
  """Measures every seed and prints one table."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import dataclasses

  import jax
  import jax.numpy as jnp
  import numpy as np

  from effllm_jax import budgets
  from effllm_jax import corpus
  from effllm_jax import data
  from effllm_jax import evaluate
  from effllm_jax import heldout as heldout_lib
  from effllm_jax import optimizers
  from effllm_jax import plan as plan_lib
  from effllm_jax import selection
  from effllm_jax import sources
  from effllm_jax import state as state_lib
  from effllm_jax import steps
  from effllm_jax import structure

  config = cli.config(_CONFIG)
  try:
    dampings = [float(x) for x in _DAMPING.value]
  except ValueError as e:
    raise errors.InputError(f'--damping: {e}; give numbers') from e
  if not all(0 <= x < float('inf') for x in dampings):
    raise errors.InputError(
      f'--damping={",".join(_DAMPING.value)} has a number below 0, or none; '
      'give numbers of at least 0'
    )
  # A batch is what an update takes.
  count = config.train.accumulate
  sequences = config.data.batch_size * count
  if 0 in dampings and sequences < 2:
    raise errors.InputError(
      f'data.batch_size {config.data.batch_size}: a damping is chosen on one '
      'sequence of several; set --config.data.batch_size=2, or --damping'
    )
  cache = cli.CACHE.value
  source = sources.load_whole(config.source, cache, '--config.source')
  cfg, alive = source.cfg, structure.all_alive(source.cfg)
  params = jax.tree.map(jnp.asarray, source.params)
  text = corpus.prepare(config.data.text, cache)
  encoding = (text, source.tokenizer, source.separator_id)
  heldout = heldout_lib.windows(
    *encoding,
    seq_len=config.data.seq_len,
    tokens_per_domain=_TOKENS.value,
  )
  plan = plan_lib.make(config, cfg)
  recipe = dataclasses.replace(plan.recipe, distill=0.0)
  rules = dataclasses.replace(
    plan.rules, policy='uniform', multiple_of=(1, 1, 1)
  )
  cost = budgets.params(cfg)
  target = int(cfg.num_params() * (1 - _SHARE.value))

  def score(batches):
    # At rate 0 the moments move and the parameters do not.
    tx = optimizers.optimizer(
      lambda _: 0.0, recipe.b1, recipe.b2, 0.0, recipe.clip
    )
    state = state_lib.fresh_state(jax.tree.map(jnp.copy, params), cfg, tx)
    for windows in batches:
      state, _ = steps.train_step(
        state, jnp.asarray(windows).reshape(count, -1, windows.shape[-1]),
        cfg=cfg, tx=tx, recipe=recipe, score=True,
      )  # fmt: skip
    return state.prune.scores

  def loss(params, masks):
    return evaluate.bits_per_byte(
      params, masks, heldout, cfg, recipe.compute, config.data.batch_size
    )['nats_per_token']

  compiled = {}

  def repaired_loss(masks, windows, damping):
    # A copy: the step donates what it gets.
    copied = jax.block_until_ready(jax.tree.map(jnp.copy, params))
    given = copied, alive, masks, jnp.asarray(windows)
    key = windows.shape, damping
    if key not in compiled:
      compiled[key] = steps.repair_step.lower(
        *given, cfg=cfg, damping=damping
      ).compile()
    start = time.perf_counter()
    repaired, fits = jax.block_until_ready(compiled[key](*given))
    seconds = time.perf_counter() - start
    without, left = (
      sum(float(fit[key]) for fit in fits.values())
      for key in ('error_without', 'error_with')
    )
    return loss(repaired, masks), left / without, seconds

  console = cli.tables()
  before = loss(params, alive)
  rows = {}
  for seed in range(_SEEDS.value):
    stream = data.train_iterator(
      *encoding,
      seq_len=config.data.seq_len,
      batch_size=sequences,
      seed=seed,
      weights=config.data.weights.to_dict(),
      workers=0,
      timeout=config.data.timeout,
    )
    batches = [next(stream) for _ in range(_BATCHES.value)]
    masks = selection.select(score(batches), alive, target, target, rules, cost)
    live = selection.live_widths(masks)
    widths = {t: float(np.mean(live[t])) for t in structure.TYPES}
    size = selection.live_params(masks, cfg)
    console.print(
      f'seed {seed}: {cfg.num_params():,} -> {size:,} parameters; '
      + ', '.join(f'{t} {widths[t]:g}' for t in structure.TYPES)
    )
    variants = [('masked only', None, np.zeros((0, 0, 1)))]
    # Every sequence is a micro-batch: a choice of damping asks for two.
    variants += [
      (f'damping {damping:g}' if damping else 'chosen', damping, windows)
      for damping in dampings
      for windows in (batches[0][:, None], np.concatenate(batches)[:, None])
    ]
    for name, damping, windows in variants:
      if damping is None:
        found = loss(params, masks), 1.0, 0.0
      else:
        found = repaired_loss(masks, windows, damping)
      rows.setdefault((name, windows[..., 1:].size), []).append(found)
      console.print(f'  {name} {windows[..., 1:].size}: {found[0]:.4f}')

  pruned = [row[0] for row in rows['masked only', 0]]
  table = rich.table.Table(
    '', 'tokens', *(f'seed {i}' for i in range(_SEEDS.value)), 'mean',
    'damage left', 'layer error left', 'seconds',
    title='Held-out loss, nats per token', box=rich.box.SIMPLE_HEAD,
  )  # fmt: skip
  columns = _SEEDS.value + 1
  table.add_row('before', '', *[f'{before:.4f}'] * columns, '', '', '')
  for (name, tokens), found in rows.items():
    losses, errors_left, seconds = zip(*found, strict=True)
    damage = (np.mean(losses) - before) / (np.mean(pruned) - before)
    table.add_row(
      name,
      f'{tokens}' if tokens else '',
      *(f'{x:.4f}' for x in losses),
      f'{np.mean(losses):.4f}',
      f'{damage:.2f}',
      f'{np.mean(errors_left):.2f}',
      f'{np.median(seconds):.2f}' if tokens else '',
    )
  console.print(table)


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
