r"""Scores of groups against what removing each group really does to the loss.

    python -m experiments.validate_saliency --out=saliency.json \
      [--source=smollm2-135m] [--groups=60] [--batches=4] [--seed=0]

Without --source a small model is trained first, on bytes, until its learning
rate has decayed: like a source model it is finished. A group is removed by its
mask bit, alone, and the change of the held-out loss is measured; nothing is
estimated. The scores come from `steps.train_step` at learning rate 0, as in a
run: on training text, with Adam's moments warmed up, averaged over the batches
with the decay of `efficientllm_a`. Printed are Spearman's rank correlations.
The last row says how far held-out text of this size determines the truth: the
change on its even tokens against the change on its odd ones.

A second table is of blocks, as a uniform prune takes them: the lowest head of
every layer, or channels of as many parameters; with standard errors over the
held-out windows. A score that compares types well has its three sums in the
order of the three changes.
"""

import dataclasses
import time

from absl import flags

from effllm_jax import errors
from experiments import cli

_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')
_SOURCE = flags.DEFINE_string(
  'source', '', 'A source as in a config; empty: train a small model.'
)
_TEXT = flags.DEFINE_string('text', 'pypi', 'As data.text in a config.')
_GROUPS = flags.DEFINE_integer(
  'groups', 0, 'At most so many groups of each type; 0: all.', lower_bound=0
)
_BATCHES = flags.DEFINE_integer(
  'batches', None, 'Training batches to score on.', lower_bound=1
)
_TOKENS = flags.DEFINE_integer(
  'tokens', None, 'Held-out tokens, over all domains.', lower_bound=64
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of text, model and drawn groups.')


def main(argv: list[str]) -> None:
  """Measures, prints one table, writes the JSON."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import jax
  import jax.numpy as jnp

  from effllm_jax import atomic
  from effllm_jax import bpe
  from effllm_jax import corpus
  from effllm_jax import sources
  from effllm_jax import structure
  from experiments import brute_force

  out = cli.out_file(_OUT.value)
  started = time.perf_counter()
  console = cli.tables()
  cache, seed = cli.CACHE.value, _SEED.value
  small = not _SOURCE.value
  sizes = brute_force.SMALL_SIZES if small else brute_force.SOURCE_SIZES
  sizes = dataclasses.replace(
    sizes,
    batches=_BATCHES.value or sizes.batches,
    heldout_tokens=_TOKENS.value or sizes.heldout_tokens,
  )
  text = corpus.prepare(_TEXT.value, cache, 'set --text')
  if small:
    tokenizer, separator_id = bpe.of_bytes('<|endoftext|>')
    cfg = brute_force.SMALL
    name = f'a model of {cfg.num_params():,} parameters'
  else:
    source = sources.load_whole(_SOURCE.value, cache, '--source')
    tokenizer, separator_id = source.tokenizer, source.separator_id
    cfg, name = source.cfg, source.name
  stream = brute_force.train_batches(text, tokenizer, separator_id, sizes, seed)
  if small:
    params = brute_force.train_small(stream, cfg, brute_force.SMALL_STEPS, seed)
    console.print(
      f'trained {brute_force.SMALL_STEPS} steps in '
      f'{time.perf_counter() - started:.0f} s'
    )
  else:
    params = jax.tree.map(jnp.asarray, source.params)
  batches = [next(stream) for _ in range(sizes.batches)]
  heldout = brute_force.heldout_windows(text, tokenizer, separator_id, sizes)
  groups = brute_force.draw_groups(cfg, _GROUPS.value, seed)
  result = brute_force.measure(params, batches, heldout, cfg, groups)
  entropy = brute_force.unigram_entropy(batches)
  result = {
    'source': name,
    'architecture': dataclasses.asdict(cfg),
    'text': _TEXT.value,
    'seed': seed,
    'sizes': dataclasses.asdict(sizes),
    'heldout_tokens': int(heldout[1].sum()),
    'unigram_entropy': entropy,
    **result,
    'seconds': time.perf_counter() - started,
  }
  with errors.writing(out, 'set --out'):
    atomic.write_json(out, result)
  console.print(
    f'{name}: held-out loss {result["loss"]:.3f} nats per token on '
    f'{result["heldout_tokens"]} tokens (unigram entropy {entropy:.3f}); '
    + ', '.join(f'{len(result["groups"][t])} {t}' for t in structure.TYPES)
  )
  console.print(brute_force.table(result, sizes.batches))
  console.print(brute_force.block_table(result, cfg))
  console.print(f'{result["seconds"]:.0f} s; {out}')


if __name__ == '__main__':
  flags.mark_flag_as_required('out')
  cli.run(main)
