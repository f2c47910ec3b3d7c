"""Reads back what a run wrote into its workdir, while it runs or afterwards.

A line of `metrics.jsonl` is one object whose `kind` says what it holds:

    train   step, tokens, loss (nats/token), seconds, tokens_per_second,
            live_params, array_params; live_cost and target_cost (None before
            the schedule begins) in the unit of `budget.kind`; flops, spent
            since the start of the run, by purpose (`accounting.PURPOSES`);
            and per type: widths (mean over the layers), price (score per
            parameter, or what else is the unit of `budget.kind`; as trials
            have measured it where there are, `prune.calibrate`; None while
            nothing is scored), pruned (share of the source model's groups)
            compile_seconds and data_seconds are not in `seconds`
    eval    step, tokens, phase, live_params, bits_per_byte, domains, seconds
    shrink  event, step, tokens, widths_before, widths_after, params_before and
            params_after of the arrays; live_params, and widths_live, the least
            and the most of a layer; loss_before, loss_after, seconds
    save    step, tokens, seconds that the run waited for a checkpoint

`trace.jsonl` has one line per prune, of which `tokens` and `removed` are read:
the groups that went, by their place in the source model, heads and ffn as
[layer, index], stem as index.
"""

import array
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib
from typing import Any

import numpy as np

from effllm_jax import accounting
from effllm_jax import environment
from effllm_jax import errors
from effllm_jax import saliency
from effllm_jax import structure
from effllm_jax import untrusted
from effllm_jax import workdir

# Manifest of the training text, what is known of `eval.text`, and what
# `experiments.edge` and `experiments.evaluate` measured.
TEXT = 'text.json'
EVAL_TEXT = 'eval_text.json'
EDGE = 'edge.json'
BENCHMARKS = 'benchmarks.json'
_SCALARS = (
  'step', 'tokens', 'loss', 'seconds', 'tokens_per_second', 'live_params',
  'array_params', 'live_cost', 'target_cost', 'compile_seconds',
  'data_seconds',
)  # fmt: skip
_PER_TYPE = ('widths', 'price', 'pruned')
# What else is read, and as what (`untrusted.shaped`).
_BY_TYPE = dict.fromkeys(structure.TYPES, float)
_EVAL = {
  'step': float, 'tokens': float, 'phase': str, 'live_params': float,
  'bits_per_byte': float, 'domains': {str: float}, 'seconds': float,
}  # fmt: skip
_SHRINK = {
  'event': int, 'step': float, 'tokens': float, 'widths_before': _BY_TYPE,
  'widths_after': _BY_TYPE,
  'widths_live': {t: [float] for t in structure.TYPES},
  'params_before': float, 'params_after': float, 'live_params': float,
  'loss_before': float, 'loss_after': float, 'seconds': float,
}  # fmt: skip
_TEXT = {
  'domains': {str: {'train': {'bytes': float}}},
  'packages': (
    [{'name': str, 'version': str, 'licence': str, 'domain': str}],
    None,
  ),
}
_EVAL_TEXT = {'shared': ({str: float}, None)}
_EDGE = {
  'step': (int, None),
  'pad': int,
  'machine': str,
  'rows': [
    {
      'format': str, 'model': str, 'bytes': float, 'prefill': (float, None),
      'decode': (float, None), 'memory': (float, None),
      'bits_per_byte': (float, None),
    }
  ],
}  # fmt: skip
_BENCHMARKS = {
  'harness': str,
  'rows': [
    {
      'step': (int, None), 'task': str, 'metric': str, 'items': int,
      'limit': int, 'value': float, 'stderr': (float, None),
    }
  ],
}  # fmt: skip
_SOURCE = {
  'name': (str, None), 'description': (str, None), 'licence': (str, None),
}  # fmt: skip
# Groups of a source model: Llama 3.1 405B has 6.8M of them.
_MOST_GROUPS = 2**23


@dataclasses.dataclass(frozen=True)
class Run:
  """What one workdir says about its run, in the order of the steps.

  Attributes:
    workdir: its absolute path.
    config: the run's configuration, a nested dict.
    source: what is known of the source model; empty when not recorded.
    train: column name (`loss`, `widths.ffn`) -> float64 [rows]; nan = None.
    evals: held-out evaluations.
    shrinks: shrink events.
    save_seconds: that the run waited for its checkpoints, all together.
    prune_tokens: tokens seen at each prune, float64 [prunes].
    text: manifest of the training text; empty when not recorded.
    eval_text: what is recorded of `eval.text`; empty when not recorded.
    edge: what `experiments.edge` measured, of which `step`, its widths filled
      up to multiples of `pad`; empty before.
    benchmarks: what `experiments.evaluate` measured, a row for each step (None:
      the source model), task and metric; empty before.
    starts: where its steps were computed, `environment`; empty when not
      recorded.
    removed: by pruning type, tokens seen when each group of the source model
      went, inf where it is alive, 0 where it was dead before the run began:
      float64, heads [N, K], ffn [N, F], stem [D]. Empty when the shape of the
      source model is not recorded.
  """

  workdir: pathlib.Path
  config: dict
  source: dict
  train: dict[str, np.ndarray]
  evals: list[dict]
  shrinks: list[dict]
  prune_tokens: np.ndarray
  removed: dict[str, np.ndarray]
  save_seconds: float = 0.0
  text: dict = dataclasses.field(default_factory=dict)
  eval_text: dict = dataclasses.field(default_factory=dict)
  edge: dict = dataclasses.field(default_factory=dict)
  benchmarks: dict = dataclasses.field(default_factory=dict)
  starts: list[dict] = dataclasses.field(default_factory=list)

  @property
  def name(self) -> str:
    """Last part of the workdir's path."""
    return self.workdir.name

  @property
  def tokens(self) -> np.ndarray:
    """Tokens seen after each logged step, float64 [rows]."""
    return self.train['tokens']

  @property
  def step_seconds(self) -> float:
    """Of all training steps and prunes; a row has the mean since the last."""
    steps = np.diff(self.train['step'], prepend=0)
    return float(steps @ self.train['seconds'])

  @property
  def finished(self) -> bool:
    """Whether the last evaluation, after the last step, has been written."""
    last = self.last_eval('final')
    return last is not None and last['tokens'] >= self.tokens[-1]

  def last_eval(self, phase: str) -> dict | None:
    """The newest evaluation of one phase; None before there is one."""
    return next((x for x in reversed(self.evals) if x['phase'] == phase), None)

  def evaluation(self, phase: str) -> dict:
    """As `last_eval`, of a run that has come to its end.

    Raises:
      errors.InputError: its row is missing.
    """
    found = self.last_eval(phase)
    if found is None:
      raise errors.InputError(
        f'{self.workdir / "metrics.jsonl"} has no {phase!r} evaluation, as '
        'after lines of it were lost; put them back, or delete '
        f'{self.workdir} to have it run again'
      )
    return found

  def setting(self, key: str) -> Any:
    """What the config has at a key such as 'prune.policy'; None: nothing."""
    value = self.config
    for part in key.split('.'):
      # A stranger may have written anything in the place of a section.
      value = value.get(part) if isinstance(value, dict) else None
    return value

  @property
  def only_trains(self) -> bool:
    """Whether nothing was to be pruned: `prune.policy` is 'none'."""
    return self.setting('prune.policy') == 'none'

  @property
  def in_nats(self) -> bool:
    """Whether prices are of nats per token, as far as the config says."""
    calibrated = bool(self.setting('prune.calibrate'))
    return calibrated or self.setting('prune.saliency') in saliency.NATS

  @property
  def budget(self) -> tuple[str, float | None]:
    """What the target limits (`budget.kind`), and the target, if recorded."""
    try:
      budget = self.config['budget']
      return str(budget['kind']), float(budget['target'])
    except (KeyError, OverflowError, TypeError, ValueError):
      return 'params', None

  def source_cost(self) -> float:
    """Cost of the source model in the unit of the budget; nan if not logged."""
    if self.budget[0] == 'params':
      return float(self.source_params())
    # The first logged step may already have pruned something.
    pruned = any(self.train[f'pruned.{t}'][0] for t in structure.TYPES)
    return float('nan') if pruned else float(self.train['live_cost'][0])

  def layer_widths(self, name: str, tokens: np.ndarray) -> np.ndarray:
    """Live heads or ffn channels of each layer, int64 [len(tokens), N].

    Args:
      name: 'heads' or 'ffn'; `removed` must have it.
      tokens: after how many tokens; inf is now.
    """
    # An inf counts as alive whatever the tokens are.
    gone = [np.sort(layer[np.isfinite(layer)]) for layer in self.removed[name]]
    count = [np.searchsorted(layer, tokens, side='right') for layer in gone]
    return self.removed[name].shape[1] - np.stack(count, axis=-1)

  def uneven(self) -> bool:
    """Whether live widths differ by layer, now or when the run began."""
    return any(
      np.ptp(self.layer_widths(t, [0.0, np.inf]), axis=-1).any()
      for t in ('heads', 'ffn')
      if t in self.removed
    )

  def source_params(self) -> int:
    """Live parameters of the source model; of a dense one, those in arrays."""
    first = self.last_eval('source')
    return int(first['live_params']) if first else self.source_array_params()

  def source_array_params(self) -> int:
    """Parameters in the arrays of the source model."""
    if self.shrinks:
      return int(self.shrinks[0]['params_before'])
    return int(self.train['array_params'][0])

  def source_widths(self) -> dict[str, float]:
    """Live widths of the source model by pruning type, mean of the layers."""
    if self.removed:
      return {t: float((x > 0).sum(-1).mean()) for t, x in self.removed.items()}
    if self.shrinks:
      return self.shrinks[0]['widths_before']
    # The first logged step may already have pruned something.
    return {
      t: float(np.round(w[0] / (1 - p[0]))) if p[0] < 1 else float(w[0])
      for t in structure.TYPES
      for w, p in [(self.train[f'widths.{t}'], self.train[f'pruned.{t}'])]
    }

  def source_array_widths(self) -> dict[str, float]:
    """Widths of the arrays of the source model by pruning type."""
    if self.removed:
      return {t: float(x.shape[-1]) for t, x in self.removed.items()}
    return self.source_widths()

  def widths(self) -> dict[str, float]:
    """Live widths by pruning type, mean of the layers, at the newest step."""
    return {t: float(self.train[f'widths.{t}'][-1]) for t in structure.TYPES}

  def array_params(self) -> int:
    """Parameters in the arrays as they are now."""
    # The row of a step is written with the sizes from before its shrink.
    if self.shrinks and self.shrinks[-1]['tokens'] >= self.tokens[-1]:
      return int(self.shrinks[-1]['params_after'])
    return int(self.train['array_params'][-1])

  def at_ends(self, column: str) -> tuple[float, float]:
    """Medians of a column before the first and after the last shrink.

    Of at most the 50 logged steps nearest the start and the end of the run.
    """
    values, tokens = self.train[column], self.tokens
    first = self.shrinks[0]['tokens'] if self.shrinks else np.inf
    last = self.shrinks[-1]['tokens'] if self.shrinks else -1
    # A run may not have logged a step on either side: then take the nearest.
    before, after = values[tokens <= first], values[tokens > last]
    return (
      float(np.median(before[:50] if len(before) else values[:1])),
      float(np.median(after[-50:] if len(after) else values[-1:])),
    )


def read(folder: str | os.PathLike) -> Run:
  """Reads a workdir. A torn last line of a running or killed run is ignored.

  Raises:
    errors.InputError: the folder or a file is missing, nothing has been trained
      yet, or a line is broken; names the file and the line.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise errors.InputError(
      f'workdir {folder} does not exist; set --workdir to the folder of a run'
    )
  for name in ('metrics.jsonl', 'config.json'):
    if not (folder / name).is_file():
      raise errors.InputError(
        f'workdir {folder} has no {name}; set --workdir to the folder that '
        'experiments.main was given'
      )
  metrics, trace = folder / 'metrics.jsonl', folder / 'trace.jsonl'
  rows = _Metrics()
  _each(metrics, rows.add)
  if not len(rows.columns['step']):
    raise errors.InputError(
      f'{metrics} has no training step yet; run experiments.main with '
      f'--workdir={folder} first'
    )
  source = folder / 'source' / 'source.json'
  about = _found(source, _SOURCE)
  removed = _alive(about, source)
  prune_tokens = []
  _each(trace, lambda row: prune_tokens.append(_take_out(removed, row)))
  return Run(
    workdir=folder.resolve(),
    config=untrusted.read_json(folder / 'config.json', 'restore it'),
    source=about,
    train={x: np.frombuffer(y, np.float64) for x, y in rows.columns.items()},
    evals=rows.evals,
    shrinks=rows.shrinks,
    prune_tokens=np.asarray(prune_tokens, np.float64),
    save_seconds=math.fsum(rows.save_seconds),
    removed=removed,
    text=_found(folder / TEXT, _TEXT),
    eval_text=_found(folder / EVAL_TEXT, _EVAL_TEXT),
    edge=_found(folder / EDGE, _EDGE),
    benchmarks=benchmarks(folder),
    starts=environment.read(folder),
  )


class _Metrics:
  """The rows of `metrics.jsonl`, by their kinds.

  Attributes:
    columns: of `Run.train`; arrays of 8 bytes a number, since a run may have
      logged a million steps.
    evals: as they are in the file.
    shrinks: likewise.
    save_seconds: of each save.
  """

  def __init__(self):
    names = (
      *_SCALARS,
      *(f'{x}.{t}' for x in _PER_TYPE for t in structure.TYPES),
      *(f'flops.{x}' for x in accounting.PURPOSES),
    )
    self.columns = {name: array.array('d') for name in names}
    self.evals, self.shrinks, self.save_seconds = [], [], []

  def add(self, row: dict[str, Any]) -> None:
    """Takes a row in; rows of other kinds are passed over.

    Raises:
      KeyError, TypeError, ValueError: it lacks or misspells something.
    """
    match row['kind']:
      case 'train':
        self._add_step(row)
      case 'eval':
        self.evals.append(untrusted.shaped(_EVAL, row))
      case 'shrink':
        self.shrinks.append(untrusted.shaped(_SHRINK, row))
      case 'save':
        self.save_seconds.append(_number(row['seconds']))

  def _add_step(self, row):
    columns = self.columns
    for x in _SCALARS:
      columns[x].append(_number(row[x]))
    if not (columns['step'][-1] >= 1 and columns['tokens'][-1] >= 1):
      raise ValueError('step or tokens')
    for x in _PER_TYPE:
      values = row[x] or dict.fromkeys(structure.TYPES)
      for t in structure.TYPES:
        columns[f'{x}.{t}'].append(_number(values[t]))
    for x in accounting.PURPOSES:
      columns[f'flops.{x}'].append(_number(row['flops'][x]))


def _take_out(removed: dict[str, np.ndarray], row: dict[str, Any]) -> float:
  """Enters what a prune took in `removed`; returns the tokens seen by then."""
  tokens = _number(row['tokens'])
  for t, at in removed.items():
    index = np.asarray(row['removed'][t], np.int64).reshape(-1, at.ndim)
    if ((index < 0) | (index >= at.shape)).any():
      raise ValueError(f'removed.{t}')
    at[tuple(index.T)] = tokens
  return tokens


def names(workdirs: Sequence[str | os.PathLike]) -> list[str]:
  """The ends of the paths, as long as it takes to tell the runs apart."""
  parts = [pathlib.Path(os.path.abspath(x)).parts for x in workdirs]
  different, length = len(set(parts)), 1
  while len({x[-length:] for x in parts}) < different:
    length += 1
  return [str(pathlib.Path(*x[-length:])) for x in parts]


def benchmarks(workdir: str | os.PathLike) -> dict[str, Any]:
  """`Run.benchmarks` as it is now.

  Raises:
    errors.InputError: the file is damaged.
  """
  return _found(pathlib.Path(workdir) / BENCHMARKS, _BENCHMARKS)


def _alive(about, path) -> dict[str, np.ndarray]:
  """`Run.removed` before the first prune."""
  cfg = about.get('cfg')
  if cfg is None:
    return {}
  try:
    shapes = {
      t: [int(cfg[x]) for x in getattr(structure.GROUP_AXES, t)]
      for t in structure.TYPES
    }
    if any(n < 1 for shape in shapes.values() for n in shape):
      raise ValueError(f'widths {shapes}')
    if sum(map(math.prod, shapes.values())) > _MOST_GROUPS:
      raise ValueError(f'widths {shapes}')
  except (KeyError, OverflowError, TypeError, ValueError) as e:
    raise errors.InputError(
      f'{path} lacks or misspells {e} in cfg; restore it'
    ) from e
  if about.get('masks') is None:
    return {t: np.full(shape, np.inf) for t, shape in shapes.items()}
  try:
    masks = structure.masks_from_json(
      about['masks'], structure.Groups(**shapes)
    )
  except (KeyError, TypeError, ValueError) as e:
    raise errors.InputError(f'{path} lacks or misspells {e}; restore it') from e
  return {t: np.where(getattr(masks, t), np.inf, 0.0) for t in structure.TYPES}


def _number(value) -> float:
  number = untrusted.shaped((float, None), value)
  return float('nan') if number is None else float(number)


def _found(path: pathlib.Path, shape: dict[str, Any]) -> dict[str, Any]:
  """What a file holds; empty: there is none."""
  if not path.is_file():
    return {}
  return untrusted.read_shaped(path, shape, 'restore it')


def _each(path: pathlib.Path, use: Callable[[dict[str, Any]], None]) -> None:
  for number, row in enumerate(workdir.read(path), 1):
    try:
      use(row)
    except (
      AttributeError,
      KeyError,
      OverflowError,
      TypeError,
      ValueError,
    ) as e:
      raise errors.InputError(
        f'{path} row {number} lacks or misspells {e}: {str(row)[:60]!r}; '
        'take that line out'
      ) from e
