"""What the values of a config must be: alone, together, beside a source."""

import math
import threading

import ml_collections
import numpy as np

from effllm_jax import errors
from effllm_jax import kernels
from effllm_jax import model
from effllm_jax import rules as rules_lib
from effllm_jax import saliency
from effllm_jax import sharding
from effllm_jax import structure

# Where the weights of a run come from: `config.init`.
INITS = ('source', 'random')
# What `config.prune.policy` may be; 'none' only trains.
POLICIES = (*rules_lib.POLICIES, 'none')
# When the teacher speaks: `config.distill.when`.
DISTILL_WHEN = ('always', 'recovery')


def check(
  config: ml_collections.ConfigDict, source: structure.ModelConfig
) -> None:
  """Checks every value by itself, then the values beside each other.

  Raises:
    errors.InputError: a value that cannot work, with the key to change.
  """
  _check_ranges(config)
  _check_training(config)
  _check_pairs(config, source)


def check_blocks(rules: rules_lib.Rules, widths: dict[str, np.ndarray]) -> None:
  """Checks that ragged finds whole blocks in every layer.

  One with dead slots would count as taken.

  Args:
    rules: of the ragged policy.
    widths: `selection.live_widths` of the source; empty where all is alive.

  Raises:
    errors.InputError: a layer that the blocks do not divide.
  """
  for name, multiple in zip(structure.TYPES, rules.multiple_of, strict=True):
    if name == 'stem' or name not in widths:
      continue
    odd = widths[name][widths[name] % multiple != 0]
    if odd.size:
      raise errors.InputError(
        f"prune.policy 'ragged' takes {name} in blocks of prune.multiple_of."
        f'{name} {multiple}, and a layer of the source has {odd[0]} alive; set '
        f'--config.prune.multiple_of.{name} to a divisor'
      )


def implementation(
  config: ml_collections.ConfigDict,
  source: structure.ModelConfig,
  mesh: sharding.Mesh | None,
) -> str:
  """The implementation of the kernels; 'auto' is this platform's choice.

  Raises:
    errors.InputError: it does not run here, or not on such sizes.
  """
  name = config.model.kernels
  # Survivors stand at the front of an axis: cut into parts, the first ones
  # would be busy and the last ones idle.
  apart = mesh is not None and mesh.shape['tensor'] > 1
  if name == 'auto':
    return 'xla' if apart else kernels.resolve(None)
  if apart and name != 'xla':
    raise errors.InputError(
      f'model.kernels {name!r} saves nothing where heads and channels are '
      f'split over mesh.tensor {mesh.shape["tensor"]}; set '
      '--config.model.kernels=xla or --config.mesh.tensor=1'
    )
  known = ('auto', *kernels.IMPLEMENTATIONS)
  _require(config, 'model.kernels', known.__contains__,
           f'one of {", ".join(known)}')  # fmt: skip
  if why := kernels.refusal(name):
    raise errors.InputError(
      f'model.kernels {name!r} {why}; set --config.model.kernels=auto or bucket'
    )
  if name == 'pallas_tpu':
    _require(config, 'data.seq_len', (2**17).__ge__,
             'at most 131072, which pallas_tpu takes')  # fmt: skip
  if name == 'pallas_hopper':
    _require(config, 'model.dtype', 'bfloat16'.__eq__,
             'bfloat16, which pallas_hopper takes')  # fmt: skip
    # Channels are counted in rows of 128 bytes.
    multiple = lambda v: v % 64 == 0
    for key in ('ffn', 'stem'):
      for step in (f'shrink.quantum.{key}', f'prune.multiple_of.{key}'):
        _require(config, step, multiple,
                 'a multiple of 64, which pallas_hopper takes')  # fmt: skip
    _check_hopper(config, source, mesh)
  return name


def device_tokens(
  config: ml_collections.ConfigDict, mesh: sharding.Mesh | None
) -> int:
  """Tokens of a micro-batch on one device: what a product reads at a time."""
  parts = 1 if mesh is None else sharding.batch_parts(mesh)
  return config.data.batch_size * config.data.seq_len // parts


def _check_hopper(config, source, mesh):
  """Each axis of each product is a multiple of 64, also after a shrink.

  The last one goes by the multiples of the prune alone.
  """
  if source.H > 128:
    raise errors.InputError(
      f'heads of the source have {source.H} channels; pallas_hopper takes up '
      'to 128; set --config.model.kernels=bucket'
    )
  rest = 'pallas_hopper takes multiples of 64; set --config.'
  tokens = device_tokens(config, mesh)
  if tokens % 64:
    raise errors.InputError(
      f'data.batch_size x data.seq_len are {tokens} tokens of a micro-batch on '
      f'one device; {rest}data.seq_len, or --config.model.kernels=bucket'
    )
  for key, heads in (
    ('shrink.quantum.heads', config.shrink.quantum.heads),
    ('prune.multiple_of.heads', config.prune.multiple_of.heads),
  ):
    if heads * source.H % 64:
      raise errors.InputError(
        f'{key} {heads} of {source.H} channels leave {heads * source.H}; '
        f'{rest}{key}={64 // math.gcd(source.H, 64)}'
      )
  widths = {
    'stem': source.D, 'ffn': source.F, 'key/value head': source.K * source.H
  }  # fmt: skip
  for what, width in widths.items():
    if width % 64:
      raise errors.InputError(
        f'the source has {width} {what} channels; {rest}model.kernels=bucket'
      )


def _check_ranges(config):
  """Every value by itself."""
  at_least_one = [
    'data.seq_len', 'data.batch_size', 'train.accumulate', 'train.tokens',
    'train.log_every', 'train.max_skipped', 'prune.every',
    'checkpoint.every_steps', 'checkpoint.keep', 'eval.every_tokens',
    'shrink.quantum.heads', 'shrink.quantum.ffn', 'shrink.quantum.stem',
    'distill.top_k', 'repair.batches',
  ]  # fmt: skip
  for key in at_least_one:
    _require(config, key, lambda v: v >= 1, 'at least 1')
  for key in ('data.workers', 'optimizer.warmup_tokens',
              'optimizer.decay_tokens', 'eval.tokens_per_domain'):  # fmt: skip
    _require(config, key, lambda v: v >= 0, 'at least 0')
  for key in ('optimizer.peak', 'optimizer.clip', 'distill.temperature'):
    _require(config, key, lambda v: 0 < v < math.inf, 'positive')
  # A thread waits no longer.
  longest = threading.TIMEOUT_MAX
  _require(config, 'data.timeout', lambda v: 0 < v <= longest,
           f'positive and at most {longest:g}')  # fmt: skip
  # Of more bits jax takes the lower ones, and two seeds would be one.
  _require(config, 'seed', lambda v: 0 <= v < 2**32, 'from 0 to 4294967295')
  for key in ('optimizer.b1', 'optimizer.b2', 'prune.ema', 'shrink.threshold'):
    # As they are used: in float32 1 - 1e-8 is 1.
    _require(config, key, lambda v: 0 <= v < 1 != np.float32(v), 'in [0, 1)')
  for key in ('distill.weight', 'optimizer.embedding'):
    _require(config, key, lambda v: 0 <= v <= 1, 'in [0, 1]')
  for key in ('optimizer.end', 'optimizer.weight_decay', 'repair.damping'):
    _require(config, key, lambda v: 0 <= v < math.inf, 'at least 0 and finite')
  for key, known in (
    ('init', INITS),
    ('prune.policy', POLICIES),
    ('optimizer.schedule', ('cosine', 'wsd')),
    ('model.dtype', ('float32', 'bfloat16')),
    ('model.remat', model.REMAT),
    ('prune.saliency', saliency.KINDS),
    ('distill.when', DISTILL_WHEN),
  ):
    _require(config, key, known.__contains__, f'one of {", ".join(known)}')


def _check_training(config):
  """What the values of schedule, repair and learning rate make of another."""
  prune, tokens = config.prune, config.train.tokens
  if prune.policy != 'none' and not (
    0 <= prune.begin_tokens < prune.end_tokens <= tokens
  ):
    raise errors.InputError(
      f'0 <= prune.begin_tokens {prune.begin_tokens:,} < prune.end_tokens '
      f'{prune.end_tokens:,} <= train.tokens {tokens:,} does not hold; change '
      'the three'
    )
  repair = config.repair
  fitted = repair.batches * config.train.accumulate
  if repair.enabled and not repair.damping and fitted < 2:
    raise errors.InputError(
      f'repair.damping {repair.damping:g} is chosen on one micro-batch of '
      'several, and repair.batches 1 with train.accumulate 1 leaves none; set '
      '--config.repair.batches=2, or a damping'
    )
  rate = config.optimizer
  if rate.end > rate.peak:
    raise errors.InputError(
      f'optimizer.end {rate.end:g} is above optimizer.peak {rate.peak:g}, and '
      'the rate would rise to the end; lower --config.optimizer.end too'
    )
  decay = rate.decay_tokens if rate.schedule == 'wsd' else 0
  if rate.warmup_tokens + decay > tokens:
    raise errors.InputError(
      f'optimizer.warmup_tokens {rate.warmup_tokens:,} and decay_tokens '
      f'{decay:,} exceed train.tokens {tokens:,}; lower them'
    )


def _check_pairs(config, source):
  """What one value makes of another, or of the source."""
  if config.data.seq_len > source.context:
    raise errors.InputError(
      f"data.seq_len {config.data.seq_len} exceeds the source model's context "
      f'{source.context}; set --config.data.seq_len'
    )
  if config.init == 'random' and not config.optimizer.embedding:
    raise errors.InputError(
      f'optimizer.embedding {config.optimizer.embedding} would leave the '
      "embedding as init 'random' draws it; set --config.optimizer.embedding=1"
    )
  if config.distill.teacher and not config.distill.weight:
    raise errors.InputError(
      f'distill.teacher {config.distill.teacher!r} would not be asked: set '
      '--config.distill.weight above 0, or no teacher'
    )
  if config.budget.table and config.budget.kind != 'ms':
    raise errors.InputError(
      f'budget.table {config.budget.table!r} would not be read: set '
      '--config.budget.kind=ms, or no table'
    )
  if config.distill.weight and config.distill.top_k > source.V:
    raise errors.InputError(
      f'distill.top_k {config.distill.top_k} exceeds the {source.V} tokens of '
      'the vocabulary; set --config.distill.top_k'
    )


def _require(config, key, holds, what):
  value = config
  for part in key.split('.'):
    value = value[part]
  if not holds(value):
    raise errors.InputError(
      f'{key} {value!r} is not {what}; set --config.{key}'
    )
