"""Files of tokens -> packed windows -> batches, with Grain.

A text is tokenised once, into one file of tokens per domain beside its
dataset. Every window of a file can then be read on its own, which gives three
things that a stream of documents does not: windows are shuffled one by one (a
small batch is never two pages of one book), the state of the input is a single
number, and reading costs next to nothing (millions of tokens a second, against
130 that a CPU step takes and 100,000 of an accelerator's; `data_seconds` in the
metrics is what a step waited).
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import copy
import math
import os
import pathlib

from absl import flags
import grain
import numpy as np
import tokenizers

from effllm_jax import dataset
from effllm_jax import errors
from effllm_jax import tokenizing
from effllm_jax import workers as workers_lib


class _Windows:
  """Random access to all windows of some token files, int32 [seq_len + 1].

  Neighbours overlap by one token, the context of the first target: no token is
  a target twice in an epoch. A window is whole and of one file, so what is left
  at the end of a file, up to `seq_len` tokens, is never read.

  Attributes:
    counts: how many each file has.
  """

  def __init__(self, paths: Sequence[pathlib.Path], seq_len: int):
    self._paths, self._seq_len = [str(p) for p in paths], seq_len
    self._open()

  def _open(self):
    self._files = [tokenizing.read(path) for path in self._paths]
    self.counts = [max(len(f) - 1, 0) // self._seq_len for f in self._files]
    self._ends = np.cumsum(self.counts)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, i: int) -> np.ndarray:
    file = int(np.searchsorted(self._ends, i, side='right'))
    start = (i - int(self._ends[file - 1] if file else 0)) * self._seq_len
    window = self._files[file][start : start + self._seq_len + 1]
    return window.astype(np.int32)

  def __getstate__(self):
    return {'_paths': self._paths, '_seq_len': self._seq_len}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()


class TrainIterator(grain.DatasetIterator):
  """Endless batches, with a state that names the stream it belongs to.

  Attributes:
    new_tokens: targets, of all processes, until some text comes again.
    unread: domains that are too short for one window.
  """

  def __init__(
    self,
    parent: grain.DatasetIterator,
    stream: dict,
    timeout: float,
    recent: int,
    new_tokens: int,
    unread: Sequence[str],
  ):
    """Reads `parent`; `timeout` is in seconds, 0 waits for ever."""
    super().__init__(parent)
    self.new_tokens, self.unread = new_tokens, tuple(unread)
    self._stream, self._timeout = stream, timeout
    self._lost = False
    self._recent = collections.deque(maxlen=recent)
    # Grain's state before each of them but the oldest, to read them again after
    # a resume.
    self._before = collections.deque(maxlen=recent - 1)

  def __next__(self) -> np.ndarray:
    """The next batch.

    Raises:
      errors.InputError: a worker process has ended, or gives no batch in time.
    """
    if self._before.maxlen:
      self._before.append(copy.deepcopy(self._parent.get_state()))
    # A copy: a worker's array is shared memory, and would be left over at the
    # end of the process.
    batch = np.array(self._read())
    self._recent.append(batch)
    return batch

  def recent(self, apart: float = 0.0) -> np.ndarray:
    """The newest batches joined, int32 [recent * rows, seq_len + 1].

    While fewer have been read, they are repeated to fill the shape. Restored
    with the state.

    Args:
      apart: share of the rows, at the end, that are never copies of the other
        rows, so that these can be judged on them.
    """
    rows = np.concatenate(self._recent)
    count = self._recent.maxlen * len(self._recent[-1])
    fill = lambda rows, count: np.resize(rows, (count, rows.shape[1]))
    if len(rows) == count or len(rows) < 2 or not apart:
      return fill(rows, count)
    newest, end = max(round(apart * len(rows)), 1), round(apart * count)
    return np.concatenate(
      [fill(rows[:-newest], count - end), fill(rows[-newest:], end)]
    )

  def _read(self) -> np.ndarray:
    if not self._timeout:
      return next(self._parent)
    remedy = (
      'run the same command again to resume; if it happens again, check the '
      'memory and the disk of this machine, or start in a new --workdir with '
      '--config.data.workers=0'
    )
    try:
      return workers_lib.within(self._timeout, lambda: next(self._parent))
    except TimeoutError as e:
      self._lost = True
      raise errors.InputError(
        f'the data workers gave no batch in {self._timeout:g} s, which is '
        f'--config.data.timeout; {remedy}'
      ) from e
    except RuntimeError as e:
      if 'Worker process was terminated' not in str(e):
        raise
      self._lost = True
      ended = str(e).partition('.')[0]
      raise errors.InputError(
        f'a data worker has ended ({ended}); {remedy}'
      ) from e

  def get_state(self) -> dict:
    """JSON: the stream's settings, and a state of Grain some batches ago."""
    return {
      'stream': self._stream,
      'grain': self._before[0] if self._before else self._parent.get_state(),
      'read': len(self._before),
    }

  def set_state(self, state: dict) -> None:
    """Goes on after the batch at which `state` was taken.

    Raises:
      errors.InputError: the state is of another stream.
    """
    for name, now in self._stream.items():
      saved = state['stream'].get(name)
      if saved != now:
        raise errors.InputError(
          f'the checkpoint was saved with {name} {saved!r}, this run has '
          f'{now!r}; use the saved value, or start a new workdir'
        )
    self._parent.set_state(state['grain'])
    self._before.clear()
    self._recent.clear()
    for _ in range(min(state['read'], self._before.maxlen)):
      next(self)

  def close(self) -> None:
    """Ends the worker processes, whatever one that was lost has left."""
    close = super().close
    if self._lost:
      # Grain's does nothing the second time, as when this object is deleted.
      self._lost = False
      workers_lib.close_lost(close)
    else:
      close()


def train_iterator(
  data_dir: str | os.PathLike,
  tokenizer: tokenizers.Tokenizer,
  separator_id: int,
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  weights: Mapping[str, float],
  workers: int,
  timeout: float,
  recent: int = 1,
  process_index: int = 0,
  process_count: int = 1,
) -> TrainIterator:
  """Endless batches of packed training text, int32 [rows, seq_len + 1].

  Inputs are `[:, :-1]`, targets `[:, 1:]`. Documents of a domain are joined by
  separators and cut into windows, which are drawn in a new order every epoch;
  what is left at the end of a domain is never read. The batches
  depend on every argument and on nothing else; a state refuses to load into
  another stream.

  Args:
    data_dir: folder of `corpus.prepare`.
    tokenizer: its special tokens are not looked for in the text.
    separator_id: token between documents.
    seq_len: targets a window.
    batch_size: windows a batch, of all processes together; their number
      divides it, and rows is what is left for this one.
    seed: of the order of the windows.
    weights: share of the tokens by domain, of any sum; a domain that is left
      out is not read. Empty: every window once per epoch.
    workers: Grain processes; 0 reads in a thread of this process.
    timeout: seconds that a batch of theirs may take.
    recent: how many batches `TrainIterator.recent` gives back.
    process_index: which of the disjoint shards of every batch to read.
    process_count: number of shards; a state can be read with another one.

  Raises:
    errors.InputError: a weight or a number that makes no sense, or too little
      text.
  """
  manifest = dataset.manifest(data_dir)
  weights = _check_weights(weights, list(manifest['domains']))
  for name, value, least in (
    ('data.seq_len', seq_len, 1), ('data.batch_size', batch_size, 1),
    ('data.workers', workers, 0), ('seed', seed, 0),
  ):  # fmt: skip
    if value < least:
      raise errors.InputError(
        f'{name} {value} is below {least}; set --config.{name}'
      )
  files = tokenizing.tokenize(data_dir, tokenizer, separator_id)
  groups = _windows(files, weights, seq_len)
  shares = [weights[name] for name in groups] if weights else None
  # Dealt out last of all: what all processes read in a step is what one process
  # would have read, and a state of one is that of all.
  mixed = grain.MapDataset.mix(
    [
      grain.MapDataset.source(x).seed(seed).shuffle().repeat()
      for x in groups.values()
    ],
    shares,
  )[process_index::process_count]
  # The stream has no remainder, but rounding its length up overflows at 1.
  batches = mixed.batch(
    batch_size // process_count, drop_remainder=True
  ).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16))
  if workers:
    # Grain reads flags of its own; a notebook or a test has parsed none.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=8),
      worker_init_fn=workers_lib.end_with_parent,
    )
  stream = {
    'dataset': manifest['digest'],
    'tokenizer': tokenizing.digest(tokenizer),
    'separator_id': separator_id,
    'seq_len': seq_len,
    'batch_size': batch_size,
    'seed': seed,
    'weights': weights,
    'workers': workers,
    'recent': recent,
  }
  total = sum(weights.values())
  new_tokens = min(
    int(len(x) * seq_len / (weights[name] / total if weights else 1))
    for name, x in groups.items()
  )
  unread = []
  if not weights:
    (windows,) = groups.values()
    unread = [d for d, n in zip(files, windows.counts, strict=True) if not n]
  return TrainIterator(
    iter(batches), stream, timeout if workers else 0, recent, new_tokens, unread
  )


def _windows(
  files: Mapping[str, pathlib.Path], weights: Mapping[str, float], seq_len: int
) -> dict[str, _Windows]:
  """The windows of each domain that has a weight; without any, all in one."""
  groups = {d: [files[d]] for d in weights} or {'text': [*files.values()]}
  found = {name: _Windows(paths, seq_len) for name, paths in groups.items()}
  for name, windows in found.items():
    if not len(windows):
      what = f'{name} is not' if weights else 'no domain is'
      raise errors.InputError(
        f'{what} long enough for a window of {seq_len} tokens; add text, put '
        'more of it into one domain, or lower --config.data.seq_len'
      )
  return found


def _check_weights(
  weights: Mapping[str, float], known: list[str]
) -> dict[str, float]:
  """Positive weights by domain, sorted; empty when none are given."""
  for name, value in weights.items():
    if name not in known:
      raise errors.InputError(
        f'data.weights names {name!r}, which this text does not have; its '
        f'domains are {", ".join(known)}'
      )
    if not (math.isfinite(value) and value >= 0):
      raise errors.InputError(
        f'data.weights.{name} is {value}; set a number from 0 up (domains: '
        f'{", ".join(known)})'
      )
  kept = {name: float(weights[name]) for name in sorted(weights)}
  if weights and not any(kept.values()):
    raise errors.InputError(
      'data.weights are all 0; give a positive weight to at least one of '
      f'{", ".join(known)}'
    )
  return {name: value for name, value in kept.items() if value}
