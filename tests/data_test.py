"""Batches: what is in them, in which order, and how a stream goes on."""

import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import pytest

from effllm_jax import corpus
from effllm_jax import data
from effllm_jax import dataset
from effllm_jax import documents as documents_lib
from effllm_jax import errors
from effllm_jax import heldout as heldout_lib
from effllm_jax import tokenizing
from effllm_jax import workers as workers_lib
from tests import conftest

SEPARATOR = 0
SEQ = 16


@pytest.fixture(name='bpe', scope='module')
def _bpe():
  return conftest.byte_bpe(conftest.real_text()[:6])


@pytest.fixture(name='built', scope='module')
def _built(tmp_path_factory):
  """Two domains: `low` in lower case, `UP`, a quarter of it, in upper case."""
  root = tmp_path_factory.mktemp('data')
  for domain, stop in (('low', 16), ('UP', 4)):
    (root / 'text' / domain).mkdir(parents=True)
    for i, text in enumerate(conftest.real_text()[:stop]):
      text = (text.lower() if domain == 'low' else text.upper())[:3000]
      # Unlike any other document, or it would be taken for a copy.
      words = [f'{w}{i}' for w in text.split()]
      (root / 'text' / domain / f'{i}.txt').write_text(' '.join(words))
  return corpus.prepare(str(root / 'text'), root)


def batches(built, bpe, **changes):
  settings = (
    dict(seq_len=SEQ, batch_size=4, seed=0, weights={}, workers=0, timeout=60.0)
    | changes
  )
  return data.train_iterator(built, bpe, SEPARATOR, **settings)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def training_windows(built, bpe):
  """What an epoch must hold, made without `data`."""
  by_domain = {domain: [] for domain in dataset.domains(built)}
  for record in dataset.source(built, 'train'):
    document = dataset.as_document(record)
    by_domain[document.domain] += [
      SEPARATOR, *bpe.encode(document.text).ids
    ]  # fmt: skip
  for tokens in by_domain.values():
    tokens.append(SEPARATOR)
    for start in range(0, len(tokens) - SEQ, SEQ):
      yield tuple(tokens[start : start + SEQ + 1])


def test_batches_are_windows_of_the_text(built, bpe):
  iterator = batches(built, bpe)
  batch = next(iterator)
  assert batch.shape == (4, SEQ + 1) and batch.dtype == np.int32
  expected = collections.Counter(training_windows(built, bpe))
  total = expected.total()
  rows = np.concatenate([batch, *take(iterator, -(-total // 4) - 1)])[:total]
  assert collections.Counter(map(tuple, rows.tolist())) == expected
  assert iterator.new_tokens == total * SEQ
  assert iterator.unread == ()


def test_a_domain_that_has_no_window_is_named(built, bpe):
  files = tokenizing.tokenize(built, bpe, SEPARATOR)
  sizes = {d: len(np.load(x)) for d, x in files.items()}
  short = min(sizes, key=sizes.get)
  # A window has one token more than targets.
  assert batches(built, bpe, seq_len=sizes[short]).unread == (short,)
  assert batches(built, bpe, seq_len=sizes[short] - 1).unread == ()


def test_text_is_new_until_a_domain_is_through(built, bpe):
  files = tokenizing.tokenize(built, bpe, SEPARATOR)
  windows = {d: (len(np.load(x)) - 1) // SEQ for d, x in files.items()}
  iterator = batches(built, bpe, weights={'low': 3.0, 'UP': 1.0})
  assert iterator.new_tokens == min(
    int(windows['low'] * SEQ / 0.75), windows['UP'] * SEQ * 4
  )


@pytest.mark.parametrize(('count', 'size'), [(3, 10**6), (256, 5000), (256, 1)])
def test_documents_are_tokenised_some_at_a_time(
  built, bpe, tmp_path, monkeypatch, count, size
):
  """So many of them, or of their bytes, and at least one."""
  want = tokenizing.tokenize(built, bpe, SEPARATOR)
  monkeypatch.setattr(tokenizing, '_CHUNK', count)
  monkeypatch.setattr(tokenizing, '_CHUNK_BYTES', size)
  source = dataset.source(built, 'train')
  documents = [dataset.as_document(source[i]) for i in range(len(source))]
  chunks = [*documents_lib.in_blocks(documents, count, size)]
  assert [d for chunk in chunks for d in chunk] == documents
  assert len(chunks) > 1
  for chunk, later in itertools.pairwise(chunks):
    total = sum(d.size for d in chunk)
    assert len(chunk) <= count and (total <= size or len(chunk) == 1)
    # No less than fits.
    assert len(chunk) == count or total + later[0].size > size
  # The same tokens, whichever are tokenised together.
  copy = shutil.copytree(
    built, tmp_path / 'data', ignore=shutil.ignore_patterns('tokens-*')
  )
  for domain, path in tokenizing.tokenize(copy, bpe, SEPARATOR).items():
    np.testing.assert_array_equal(np.load(path), np.load(want[domain]))
    # A file that was added to is one that was written at once.
    np.save(tmp_path / 'once.npy', np.load(path))
    assert path.read_bytes() == (tmp_path / 'once.npy').read_bytes()


@pytest.mark.parametrize(
  'damage',
  [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b''),
    lambda path: os.truncate(path, path.stat().st_size - 1),
    lambda path: path.write_bytes(bytes(path.stat().st_size)),
    lambda path: np.save(path, np.zeros((8, 8), np.uint16)),
    lambda path: np.save(path, np.zeros(64, np.float32)),
    lambda path: np.save(path, [None], allow_pickle=True),
  ],
)  # fmt: skip
def test_a_damaged_file_of_tokens_is_named(built, bpe, tmp_path, damage):
  copy = shutil.copytree(built, tmp_path / 'data')
  want = tokenizing.tokenize(copy, bpe, SEPARATOR)
  path = [*want.values()][-1]
  whole = path.read_bytes()
  damage(path)
  with pytest.raises(errors.InputError) as caught:
    batches(copy, bpe)
  said = str(caught.value)
  assert said.startswith(f'{path} is not a file of tokens (')
  assert said.endswith(f'; delete the folder {path.parent}, it is made again')
  # What is told to do helps.
  shutil.rmtree(path.parent)
  batches(copy, bpe)
  assert path.read_bytes() == whole


def test_a_separator_beyond_two_bytes(built, bpe):
  files = tokenizing.tokenize(built, bpe, 70_000)
  for tokens in map(np.load, files.values()):
    assert tokens.dtype == np.uint32
    assert tokens[0] == tokens[-1] == 70_000 and tokens.min() < 400
  files = tokenizing.tokenize(built, bpe, 65_535)
  assert {np.load(x).dtype for x in files.values()} == {np.dtype(np.uint16)}


def test_the_order_is_of_the_seed_and_new_each_epoch(built, bpe):
  total = sum(1 for _ in training_windows(built, bpe))
  rows = np.concatenate(take(batches(built, bpe, batch_size=1), 2 * total))
  again = np.concatenate(take(batches(built, bpe, batch_size=1), 2 * total))
  np.testing.assert_array_equal(rows, again)
  first, second = rows[:total], rows[total:]
  assert sorted(map(tuple, first)) == sorted(map(tuple, second))
  assert (first != second).any(axis=1).mean() > 0.9
  other = np.concatenate(take(batches(built, bpe, batch_size=1, seed=7), total))
  assert (first != other).any(axis=1).mean() > 0.9


@pytest.mark.parametrize('weights', [{}, {'low': 1.0, 'UP': 3.0}])
def test_processes_read_together_what_one_would(built, bpe, weights):
  """Row by row, dealt out in turns, across the ends of epochs."""
  settings = dict(weights=weights, batch_size=6)
  shards = [
    batches(built, bpe, process_index=i, process_count=3, **settings)
    for i in range(3)
  ]
  count = 2 * sum(1 for _ in training_windows(built, bpe)) // 6
  for want in take(batches(built, bpe, **settings), count):
    rows = np.stack([next(shard) for shard in shards], axis=1)
    np.testing.assert_array_equal(rows.reshape(want.shape), want)
  # A state of any of them is a state of all, and of one alone.
  state = shards[1].get_state()
  assert state == shards[2].get_state()
  alone = batches(built, bpe, **settings)
  alone.set_state(state)
  np.testing.assert_array_equal(next(alone)[0], next(shards[0])[0])


def upper_share(built, bpe, weights):
  text = bpe.decode_batch(
    np.concatenate(take(batches(built, bpe, weights=weights), 250)).tolist()
  )
  upper = sum(any(c.isupper() for c in t) for t in text)
  lower = sum(any(c.islower() for c in t) for t in text)
  return upper / (upper + lower)


def test_weights_are_shares_of_the_tokens(built, bpe):
  for share in (0.1, 0.5, 0.9):
    weights = {'low': 2 * (1 - share), 'UP': 2 * share}
    assert abs(upper_share(built, bpe, weights) - share) < 0.03
  assert upper_share(built, bpe, {'low': 1, 'UP': 0}) == 0
  assert upper_share(built, bpe, {'UP': 5}) == 1
  assert 0.1 < upper_share(built, bpe, {}) < 0.35  # by size
  # In whatever order they are named.
  first, other = (
    take(batches(built, bpe, weights=dict(weights)), 8)
    for weights in (
      [('low', 1.0), ('UP', 3.0)],
      [('UP', 3.0), ('low', 1.0)],
    )
  )
  np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize('workers', [0, 2])
def test_resume_is_exact(built, bpe, workers):
  """Within an epoch and across its end, and at the start."""
  total = sum(1 for _ in training_windows(built, bpe))
  count = total // 4 + 40
  reference = batches(built, bpe, workers=workers)
  expected, states = [], {}
  for step in range(count):
    if step in {0, 7, total // 4 - 2, total // 4 + 1}:
      states[step] = json.dumps(reference.get_state())
    expected.append(next(reference))
  assert len(states) == 4
  fresh = batches(built, bpe, workers=workers)
  # Not in memory that is shared with a worker, and is left over by the last.
  assert type(next(fresh)) is np.ndarray
  for stop, state in states.items():
    fresh.set_state(json.loads(state))
    got = take(fresh, 12)
    np.testing.assert_array_equal(got, expected[stop : stop + 12])
  for iterator in (reference, fresh):
    iterator.close()


@pytest.mark.parametrize('workers', [0, 2])
def test_the_newest_batches_are_restored_with_the_state(built, bpe, workers):
  """Before there are as many as asked for, at that moment, and later."""
  plain = batches(built, bpe, workers=workers)
  reference = batches(built, bpe, workers=workers, recent=3)
  fresh = batches(built, bpe, workers=workers, recent=3)
  expected = take(plain, 9)
  for step, batch in enumerate(expected, 1):
    if step in {1, 2, 7}:
      fresh.set_state(json.loads(json.dumps(reference.get_state())))
    seen = expected[max(step - 3, 0) : step]
    # One alone three times, the first of two twice.
    joined = np.concatenate((seen * 3)[:3])
    for iterator in (reference, fresh):
      np.testing.assert_array_equal(next(iterator), batch)
      np.testing.assert_array_equal(iterator.recent(), joined)
  for iterator in (plain, reference, fresh):
    iterator.close()


def test_a_share_of_the_newest_batches_repeats_nothing_of_the_rest(built, bpe):
  """Of as many as asked for it is the end, of fewer their newest rows."""
  iterator = batches(built, bpe, recent=8)
  seen = []
  for _ in range(10):
    seen += [tuple(row) for row in next(iterator)]
    held = seen[-32:]
    rows = [tuple(row) for row in iterator.recent(0.25)]
    rest, end = rows[:-8], rows[-8:]
    assert len(rest) == 24 and not set(rest) & set(end)
    newest = len(held) // 4
    assert set(end) == set(held[-newest:]), len(seen)
    assert set(rest) == set(held[:-newest]), len(seen)
  assert rows == held
  iterator.close()


def test_a_share_of_a_few_rows_is_one_of_them(built, bpe):
  """Of a single one it is that one."""
  for size, first in ((1, 4), (2, 6)):
    iterator = batches(built, bpe, batch_size=size, recent=4)
    batch = next(iterator)
    want = [*batch[:1].tolist() * first, *batch[1:].tolist() * 2]
    assert iterator.recent(0.25).tolist() == want
    iterator.close()


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('workers', 1),
    ('recent', 2),
    ('seed', 1),
    ('seq_len', 8),
    ('batch_size', 2),
    ('weights', {'low': 1.0}),
  ],
)
def test_a_state_of_another_stream_is_refused(built, bpe, name, value):
  here, there = batches(built, bpe), batches(built, bpe, **{name: value})
  state = json.loads(json.dumps(there.get_state()))
  with pytest.raises(errors.InputError, match=f'{name} .*; use the saved') as e:
    here.set_state(state)
  assert repr(value) in str(e.value)
  now = {'workers': 0, 'recent': 1, 'seed': 0, 'seq_len': SEQ, 'batch_size': 4,
         'weights': {}}[name]  # fmt: skip
  assert repr(now) in str(e.value)
  there.close()


def test_a_state_of_another_text_or_tokenizer_is_refused(built, bpe, tmp_path):
  here = batches(built, bpe)
  other = conftest.byte_bpe(conftest.real_text()[6:9])
  with pytest.raises(errors.InputError, match='saved with tokenizer'):
    here.set_state(batches(built, other).get_state())
  user = conftest.write_text_folder(tmp_path / 'text')
  text = batches(corpus.prepare(str(user), tmp_path), bpe)
  with pytest.raises(errors.InputError, match='saved with dataset'):
    here.set_state(text.get_state())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'weights': {'lwo': 1}}, "names 'lwo'.*domains are UP, low"),
    ({'weights': {'low': -1}}, 'data.weights.low is -1; .*UP, low'),
    ({'weights': {'low': float('nan')}}, 'data.weights.low is nan'),
    ({'weights': {'low': 0, 'UP': 0}}, 'all 0; .*UP, low'),
    ({'workers': -1}, 'data.workers -1 is below 0'),
    ({'seq_len': 0}, 'data.seq_len 0 is below 1'),
    ({'batch_size': 0}, 'data.batch_size 0 is below 1'),
    ({'seed': -1}, 'seed -1 is below 0'),
    (
      {'seq_len': 10**6},
      'no domain is long enough for a window of 1000000 tok',
    ),
    (
      {'seq_len': 10**6, 'weights': {'UP': 1}},
      'UP is not long enough for a window of 1000000 tokens',
    ),
  ],
)
def test_bad_settings(built, bpe, changes, message):
  with pytest.raises(errors.InputError, match=message) as e:
    batches(built, bpe, **changes)
  assert ';' in str(e.value) and '\n' not in str(e.value)


def test_special_tokens_in_a_text_are_text(tmp_path, bpe):
  (tmp_path / 'text').mkdir()
  for i in range(2):
    words = ' '.join(f'w{i}x{j}' for j in range(40 * (i + 1)))
    text = f'number {i} <|endoftext|> is written {words}'
    (tmp_path / 'text' / f'{i}.txt').write_text(text)
  built = corpus.prepare(str(tmp_path / 'text'), tmp_path)
  (held,) = heldout_lib.windows(
    built, bpe, SEPARATOR, seq_len=512, tokens_per_domain=0
  ).values()
  assert (held.windows[0, : int(held.weight.sum()) + 1] == SEPARATOR).sum() == 1
  (row,) = next(batches(built, bpe, batch_size=1, seq_len=32))
  assert (row == SEPARATOR).sum() <= 1


class Stuck(grain.DatasetIterator):
  """Waits for a lock that a dead process held, also on the way out."""

  def __next__(self):
    # Longer than the test allows, and no longer: deleting it waits too.
    threading.Event().wait(15)

  close = __next__

  def get_state(self):
    return {}

  def set_state(self, state):
    del state


def test_a_lock_that_a_lost_worker_held_hangs_nothing(monkeypatch):
  monkeypatch.setattr(workers_lib, '_CLOSING_SECONDS', 0.1)
  iterator = data.TrainIterator(
    Stuck(), {}, timeout=0.1, recent=1, new_tokens=1, unread=[]
  )
  start = time.monotonic()
  with pytest.raises(errors.InputError, match=r'gave no batch in 0\.1 s'):
    next(iterator)
  iterator.close()
  assert time.monotonic() - start < 10
  # As when it is deleted, where a new thread may no longer be had.
  monkeypatch.setattr(threading, 'Thread', None)
  iterator.close()


def test_a_worker_ends_with_the_process_that_reads():
  """Which is killed, and can see to nothing."""
  context = multiprocessing.get_context('fork')
  here, there = context.Pipe()

  def work():
    workers_lib.end_with_parent(0, 1)
    there.send(os.getpid())
    time.sleep(600)

  def read():
    context.Process(target=work).start()
    time.sleep(600)

  reader = context.Process(target=read)
  reader.start()
  assert here.poll(60)
  worker = pathlib.Path('/proc', str(here.recv()), 'cmdline')
  assert worker.read_bytes()
  reader.kill()
  reader.join()
  start = time.monotonic()
  # Of one that has ended it is empty, and then it is not there.
  with contextlib.suppress(FileNotFoundError, ProcessLookupError):
    while worker.read_bytes():
      assert time.monotonic() - start < 60
      time.sleep(0.01)


# What has a lock that its worker took along, as one that died while it looked
# whether it has to stop.
LOST_LOCK = """
import gc, sys
import grain, tokenizers
from effllm_jax import data, errors, workers
workers._CLOSING_SECONDS = 1.0
iterator = data.train_iterator(
  sys.argv[1], tokenizers.Tokenizer.from_file(sys.argv[2]), 0, seq_len=16,
  batch_size=4, seed=0, weights={}, workers=2, timeout=60.0,
)
next(iterator), next(iterator)
readers = [
  x for x in gc.get_objects() if issubclass(type(x), grain.DatasetIterator)
  and vars(x).get('_prefetch_process')
]
for reader in readers:
  reader._prefetch_should_stop._cond._lock.acquire()
readers[0]._prefetch_process.kill()
iterator._timeout = 1.0
try:
  while True:
    next(iterator)
except errors.InputError as e:
  print(len(readers), e)
iterator.close()
sys.exit(2)
"""


def test_nor_does_it_hang_the_end_of_the_process(built, bpe, tmp_path):
  """Where Grain closes its readers again; in a process of its own."""
  bpe.save(str(tmp_path / 'tokenizer.json'))
  done = subprocess.run(
    [sys.executable, '-c', LOST_LOCK, built, tmp_path / 'tokenizer.json'],
    cwd=conftest.ROOT, capture_output=True, text=True, check=False, timeout=60,
  )  # fmt: skip
  assert done.returncode == 2, done.stderr
  assert done.stdout.startswith('2 the data workers gave no batch in 1 s')


@pytest.mark.parametrize(
  ('signum', 'words'),
  [
    (signal.SIGSTOP, r'gave no batch in 3 s, .*data\.timeout'),
    (signal.SIGKILL, 'a data worker has ended'),
  ],
)
def test_a_lost_worker_ends_in_one_line(built, bpe, signum, words):
  """Stopped for good, or killed as when memory runs out."""
  iterator = batches(built, bpe, workers=2, timeout=60.0)
  # One of each worker: both have started.
  take(iterator, 2)
  iterator._timeout = 3.0
  workers = [
    p for p in multiprocessing.active_children() if p.name.startswith('grain-')
  ]
  assert len(workers) == 2
  os.kill(workers[0].pid, signum)
  start = time.monotonic()
  with pytest.raises(errors.InputError, match=words) as refusal:
    # What it had read before is still to come.
    for _ in range(100):
      next(iterator)
  iterator.close()
  assert time.monotonic() - start < 20
  assert '\n' not in str(refusal.value)
  for worker in workers:
    worker.join(5)
    assert not worker.is_alive()
