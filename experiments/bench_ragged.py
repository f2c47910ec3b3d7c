r"""A training step of a ragged model whose arrays have not shrunk.

    python -m experiments.bench_ragged \
      --config=experiments/configs/smollm2_135m.py [--repeats=7]

Between two shrinks the arrays of a ragged model stay as wide as its widest
layer. How much cheaper does a step get as heads and feed-forward channels die?
Random weights in the shape of SmolLM2-135M, batch and compute as in the config.
Layers differ in width around the live share. For comparison, models without
masks that are physically that narrow in every layer; their number of heads is
whole, so it is the mean of models with 1, 2 or 3, weighted as the layers are.

The variants take turns, in another order each round, so that a machine that
drifts drifts for all of them; printed are medians and ratios to the dense one.
"""

from absl import flags
from ml_collections import config_flags

from effllm_jax import errors
from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file in experiments/configs.', lock_config=True
)
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed rounds.', lower_bound=1)
_IMPLEMENTATIONS = flags.DEFINE_list(
  'implementations', ['xla', 'xla_loop', 'bucket'], 'Which to time.'
)

# Live share -> heads of four layers in a row, of the 3 that SmolLM2-135M has.
HEADS = {1.0: (3, 3, 3, 3), 0.75: (2, 3, 2, 2), 0.5: (1, 2, 1, 2),
         0.25: (1, 1, 0, 1)}  # fmt: skip


def main(argv: list[str]) -> None:
  """Times the variants and prints one table."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import statistics

  import jax
  import rich.table

  from effllm_jax import selection
  from experiments import bench_setup

  _check_implementations()
  config = cli.config(_CONFIG)
  bench = bench_setup.make(config)
  for name in _IMPLEMENTATIONS.value:
    # What it cannot take of dtype, tokens and widths is refused here.
    config.model.kernels = name
    bench_setup.make(config)
  cfg, plan = bench.cfg, bench.plan
  median = bench_setup.medians(_steps(bench), _REPEATS.value)
  dense = median[1.0, 'xla']
  table = rich.table.Table(
    'live heads and ffn', 'live parameters', 'seconds dense',
    *_IMPLEMENTATIONS.value, 'physically shrunk',
  )  # fmt: skip
  for share in HEADS:
    ratios = [median[share, x] / dense for x in _IMPLEMENTATIONS.value]
    narrow = [median[share, k] for k in HEADS[share] if (share, k) in median]
    whole = len(narrow) == len(HEADS[share])
    table.add_row(
      f'{share:.0%}',
      f'{selection.live_params(_masks(cfg, share), cfg):,}',
      f'{dense:.3f}' if share == 1 else '',
      *(f'{x:.3f}' for x in ratios),
      f'{statistics.mean(narrow) / dense:.3f}' if whole else '',
    )
  console = cli.tables()
  console.print(
    f'{jax.devices()[0].device_kind}, jax {jax.__version__}, '
    f'{plan.tokens_per_step} tokens a step, {plan.recipe.compute.dtype}; '
    'ratios to the dense model'
  )
  console.print(table)


def _check_implementations() -> None:
  import jax

  from effllm_jax import kernels

  runs = kernels.runnable()
  for name in _IMPLEMENTATIONS.value:
    if name not in runs:
      raise errors.InputError(
        f'--implementations names {name!r}, which does not run on this '
        f'{jax.default_backend()}; those that do are {", ".join(runs)}'
      )


def _steps(bench):
  """The steps to be timed, by live share and implementation or heads left.

  The latter are of models that are physically that narrow.
  """
  import dataclasses
  import functools

  import jax
  import jax.numpy as jnp

  cfg = bench.cfg
  states = {cfg: bench.fresh(cfg)}
  steps = {
    name: bench.step(states[cfg], cfg, kernels=name)
    for name in dict.fromkeys(('xla', *_IMPLEMENTATIONS.value))
  }

  def take(shape, step, masks=None):
    state = states[shape]
    if masks is not None:
      # A step donates its state, the masks in it too.
      masks = jax.tree.map(jnp.copy, masks)
      state = state.replace(prune=state.prune.replace(masks=masks))
    states[shape], numbers = step(state)
    return states[shape], numbers

  calls = {}
  for share in HEADS:
    masks = _masks(cfg, share)
    for name, step in steps.items():
      if name in _IMPLEMENTATIONS.value or share == 1:
        calls[share, name] = functools.partial(take, cfg, step, masks)
    for heads in set(HEADS[share]) - {0}:
      # Arrays without a head there are not: of layers like that, no model.
      small = dataclasses.replace(cfg, K=heads, F=round(cfg.F * share))
      if small != cfg:
        states[small] = states.get(small) or bench.fresh(small)
        step = bench.step(states[small], small, kernels='xla')
        calls[share, heads] = functools.partial(take, small, step)
  return calls


def _masks(cfg, share: float):
  """Layers of many widths, on multiples of 64, `share` on average."""
  import jax.numpy as jnp
  import numpy as np

  from effllm_jax import structure

  slope = np.linspace(-1, 1, cfg.N) * min(share, 1 - share) / 2
  ffn = np.round(cfg.F * (share + slope) / 64) * 64
  heads = np.array(HEADS[share])[np.arange(cfg.N) % 4]
  return structure.Groups(
    heads=jnp.arange(cfg.K) < heads[:, None],
    ffn=jnp.arange(cfg.F) < ffn[:, None],
    stem=jnp.ones(cfg.D, bool),
  )


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
