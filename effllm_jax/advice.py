"""What a run tells its user to look at, each as lines of text."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import math
import statistics
from typing import Any

from effllm_jax import plan as plan_lib
from effllm_jax import sharding
from effllm_jax import structure

# Nats per token above the mean of the last rows. On SmolLM2 batches of 512
# tokens were up to 0.8 above, two prunes of a head of every layer 2.2 and 2.7.
_DAMAGE = 1.5


def devices(cfg: structure.ModelConfig, mesh: sharding.Mesh) -> list[str]:
  """The mesh, and what it cannot split; nothing of a single device."""
  if mesh.size == 1:
    return []
  shape = ' x '.join(f'{name} {n}' for name, n in mesh.shape.items())
  whole = sharding.undivided(cfg, mesh)
  return [
    f'mesh: {shape}'
    + (f'; whole on every device: {", ".join(whole)}' if whole else '')
  ]


def price(plan: plan_lib.Plan, cfg: structure.ModelConfig) -> list[str]:
  """Warns where embeddings that are not priced are most of the target."""
  share = plan.unpriced(cfg.D)
  # A small model came out well at 0.49 and without heads at 0.98, where
  # pricing the embedding mended it (experiments/HYPOTHESES.md).
  if share <= 0.5:
    return []
  return [
    f'the embeddings of the whole stem are {share:.0%} of budget.target and '
    'not in its price: layers may lose nearly all; consider '
    '--config.prune.price_embedding=True'
  ]


def epochs(tokens: int, new_tokens: int) -> list[str]:
  """Warns of a run that reads the same text more than four times.

  Up to four times, text is worth nearly as much as new text (Muennighoff et al.
  2023).

  Args:
    tokens: that the run trains on.
    new_tokens: how many of them come before any text comes again.
  """
  if tokens <= 4 * new_tokens:
    return []
  return [
    f'{tokens:,} tokens read {new_tokens:,} of text {tokens / new_tokens:.0f} '
    'times over; consider more text: --config.data.text'
  ]


def unread(domains: Sequence[str], seq_len: int) -> list[str]:
  """Warns of domains too short for a single window: they are not trained on.

  Args:
    domains: their names.
    seq_len: targets of a window.
  """
  if not domains:
    return []
  some = ', '.join(repr(d) for d in domains[:3])
  more = f' and {len(domains) - 3} more' if len(domains) > 3 else ''
  return [
    f'nothing is trained on of what has no window of {seq_len} tokens: {some}'
    f'{more}; consider fewer, larger domains or a lower --config.data.seq_len'
  ]


def same_order(
  config: Mapping[str, Any], before: Mapping[str, Any] | None
) -> list[str]:
  """Warns of a run that repeats the text of the run that made its source.

  The same text and the same seed mean the same windows in the same order.

  Args:
    config: of the run.
    before: config of the run that made the source; None: no run did.
  """
  order = lambda x: (x['seed'], x['data']['text'], {**x['data']['weights']})
  if before is None or config['init'] == 'random':
    return []
  if order(config) != order(before):
    return []
  return [
    f'the source has read {config["data"]["text"]!r} in the order of seed '
    f'{config["seed"]} too: this run reads that text again; consider another '
    '--config.seed'
  ]


def damping(
  step: int, fits: Mapping[str, Mapping[str, Any]], planned: float
) -> list[str]:
  """Warns of every matrix whose repair needed a higher damping than planned.

  Args:
    step: of the prune that was repaired.
    fits: by the matrix's input, see `steps.repair_step`.
    planned: the largest damping that was to be used.
  """
  lines = []
  for name, fit in fits.items():
    most = max(fit['damping'])
    # Tenfold at a time; float32 on the way back is not equal to the bit.
    if most > 2 * planned:
      how = (
        f'needed damping {most:g}'
        if math.isfinite(most)
        else 'found no damping that works and left some layers as they were'
      )
      lines.append(f'repair after step {step}: {name} {how}')
  return lines


class Damage:
  """Notices a prune after which the loss is far above what it was."""

  def __init__(self):
    self._rows = collections.deque(maxlen=8)

  def add(self, row: Mapping[str, Any]) -> list[str]:
    """Takes in the next `train` row of the metrics."""
    lines = []
    losses = [x['loss'] for x in self._rows if x['loss'] is not None]
    if len(self._rows) > 1 and losses and row['loss'] is not None:
      older, newer = self._rows[-2]['widths'], self._rows[-1]['widths']
      went = [t for t in structure.TYPES if newer[t] < older[t]]
      mean = statistics.fmean(losses)
      if went and row['loss'] > mean + _DAMAGE:
        worst = min(went, key=lambda t: newer[t] / older[t])
        lines.append(
          f'the loss is {row["loss"]:.2f} nats per token, after {mean:.2f}, '
          'since a prune took '
          + ', '.join(f'{t} {older[t]:g} -> {newer[t]:g}' for t in went)
          + f'; consider --config.prune.floors.{worst}={int(older[worst])} or '
          'another --config.prune.saliency'
        )
        # Once for each: what comes is measured from here.
        self._rows.clear()
    self._rows.append(row)
    return lines
