r"""Runs every variant that a config's `sweep()` yields; prints one table.

    python -m experiments.sweep \
      --config=experiments/configs/efficientllm_a.py --workdir=runs/sweep

`sweep()` yields dicts of overrides, as in `{'optimizer.peak': 1e-3}`; an empty
one is the config as it is. Each variant has its own folder below --workdir and
resumes there, so a sweep can be stopped, continued and extended. Several calls
at once, on a core or a GPU each, share the variants. One that fails, as at a
learning rate at which it diverges, does not keep the others from running.
"""

import hashlib
import os
import pathlib

from absl import flags
import rich.table

from effllm_jax import errors
from experiments import cli

_CONFIG = flags.DEFINE_string('config', None, 'A file with a sweep().')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of all variants.')


def main(argv: list[str]) -> None:
  """Runs the variants one after another, then prints their results."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import jax

  from effllm_jax import atomic
  from effllm_jax import plan
  from effllm_jax import runlog
  from effllm_jax import sources
  from effllm_jax import train
  from effllm_jax import workdir
  from experiments import choices

  root, done, failed = pathlib.Path(_WORKDIR.value), set(), {}

  def attempt(variant):
    name, folder, config = variant
    if name in done:
      return None
    # What the variant before has compiled; see `pruning.shrink`.
    jax.clear_caches()
    try:
      train.run(config, folder, cli.CACHE.value)
    except atomic.HeldError:
      return folder / workdir.LOCK
    except errors.InputError as e:
      failed[name] = e
    done.add(name)
    return None

  # All of them, before the first one takes its time.
  variants = []
  for overrides, config in choices.sweep(_CONFIG.value):
    name = ','.join(f'{k}={v}' for k, v in overrides.items()) or 'base'
    variants.append((name, root / _folder_name(name), config))
  for name, _, config in variants:
    try:
      source = sources.load(config.source, cli.CACHE.value, params=False)
      plan.make(config, source.cfg, source.masks)
    except errors.InputError as e:
      raise errors.InputError(f'variant {name}: {e}') from e
  atomic.share(variants, attempt)
  table = rich.table.Table('variant', 'parameters', 'bits per byte', 'seconds')
  for name, folder, _ in variants:
    if name in failed:
      continue
    try:
      run = runlog.read(folder)
      source, final = run.evaluation('source'), run.evaluation('final')
    except errors.InputError as e:
      failed[name] = e
      continue
    table.add_row(
      name,
      f'{final["live_params"]:,}',
      f'{source["bits_per_byte"]:.4f} -> {final["bits_per_byte"]:.4f}',
      f'{run.step_seconds:.0f}',
    )
  if table.rows:
    cli.tables().print(table)
  if failed:
    raise errors.InputError(
      '; '.join(f'variant {name}: {e}' for name, e in failed.items())
    )


def _folder_name(name: str) -> str:
  """The name of a variant as that of a folder, which has 255 bytes at most."""
  name = name.replace(os.sep, '_')
  if len(name.encode()) <= 255:
    return name
  return f'{name[:48]}...{hashlib.sha256(name.encode()).hexdigest()[:16]}'


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
