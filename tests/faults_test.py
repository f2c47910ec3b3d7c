"""The real command, broken in every way that a machine knows.

Whatever happened, the same command again ends with the same bits. 50 kills;
EFFLLM_KILLS=200 asks for more.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from effllm_jax import checkpoints
from effllm_jax import corpus
from effllm_jax import sources
from effllm_jax import tokenizing
from effllm_jax import workdir as workdir_lib
from tests import conftest
from tests import fork_server
from tests import runs

KILLS = int(os.environ.get('EFFLLM_KILLS', '50'))
CHAINS = 2
# The plainest kernels compile fastest; saves before, between and after shrinks.
CHANGES = {
  'model.kernels': 'xla', 'shrink.threshold': 0.2, 'checkpoint.every_steps': 3
}  # fmt: skip
SHRINKS = (12, 16)


@pytest.fixture(scope='module', name='setting')
def _setting(tmp_path_factory) -> runs.Setting:
  return runs.Setting(tmp_path_factory.mktemp('faults'))


@pytest.fixture(scope='module', name='servers')
def _servers():
  servers = [fork_server.Server(runs.ENV, conftest.ROOT) for _ in range(CHAINS)]
  yield servers
  for server in servers:
    server.close()


@pytest.fixture(scope='module', name='tokens')
def _tokens(setting) -> np.ndarray:
  """What the runs read, on disk; a few windows name tokens that do not exist.

  So every run here has steps that are not finite.
  """
  cache = setting.root / 'cache'
  source = sources.load(str(setting.model), cache, params=False)
  (path,) = tokenizing.tokenize(
    corpus.prepare(str(setting.text), cache),
    source.tokenizer,
    source.separator_id,
  ).values()
  tokens = np.load(path, mmap_mode='r+')
  tokens[::300] = 60_000
  tokens.flush()
  return tokens


@pytest.fixture(scope='module', name='finished')
def _finished(setting, servers, tokens) -> pathlib.Path:
  """The workdir of an undisturbed run."""
  del tokens  # They are on disk.
  workdir = setting.root / 'run'
  done = servers[0].run('main', setting.arguments(workdir, **CHANGES))
  assert done.returncode == 0, done.stderr
  assert 'is skipped: loss nan and gradient norm ' in done.stderr
  assert tuple(row['step'] for row in runs.rows(workdir, 'shrink')) == SHRINKS
  return workdir


class Watch:
  """What a run is doing, seen from outside through its files."""

  def __init__(self, workdir: pathlib.Path, process: fork_server.Process):
    self._workdir, self._process = workdir, process
    self._unfinished = self._folders()

  def _folders(self):
    # By inode: what a killed process left has the name of what comes next.
    return {
      (path.parent.name, path.stat().st_ino)
      for path in self._workdir.glob('*/*.orbax-checkpoint-tmp*')
      if path.exists()
    }

  def saves(self, kind: str) -> bool:
    """Whether a moment of this kind is being written."""
    try:
      return any(k == kind for k, _ in self._folders() - self._unfinished)
    except FileNotFoundError:  # It has just been committed.
      return False

  def _restored(self) -> int | None:
    """The step it goes on from; None: the files are still those of before."""
    said = self._process.said()
    match = re.search(r'^resuming .* after step (\d+)$', said, re.MULTILINE)
    if match:
      return int(match[1])
    return 0 if 'held out' in said else None

  def shrinks(self) -> bool:
    """Between the prune that a shrink follows and the row of the shrink."""
    if self._restored() is None:
      return False
    pruned = _last(self._workdir / 'trace.jsonl')
    return pruned in SHRINKS and runs.reached(self._workdir) < pruned

  def steps(self) -> bool:
    first = self._restored()
    return first is not None and runs.reached(self._workdir) > first

  def compiles(self) -> bool:
    """Restored, and no step finished."""
    return self._restored() is not None and not self.steps()

  def phases(self) -> list[str]:
    """What was going on when it died: a save goes on beside later steps."""
    return [name for name, holds in PHASES.items() if holds(self)] or ['start']


def _last(path: pathlib.Path) -> int:
  """Step of the last row; -1 before the first."""
  lines = path.read_bytes().split(b'\n')[:-1] if path.exists() else []
  return json.loads(lines[-1])['step'] if lines else -1


PHASES = {
  'rolling save': lambda watch: watch.saves('checkpoints'),
  'event save': lambda watch: watch.saves('events'),
  'shrink': Watch.shrinks,
  'compile': Watch.compiles,
  'step': Watch.steps,
}
# How long after the beginning of a phase it is killed, seconds at most.
JITTER = {
  'rolling save': 0.02, 'event save': 0.02, 'shrink': 0.3, 'compile': 0.5,
  'step': 0.02, 'start': 0.5,
}  # fmt: skip
# In this order every run comes by a shrink, then its save, then one after it.
ORDER = ('start', 'shrink', 'event save', 'rolling save', 'compile', 'step')


def test_kills_change_nothing(setting, finished, servers):
  """Invariant 8: SIGKILL, the same command again, the same bits at the end."""

  def chain(number):
    rng, hit = random.Random(number), collections.Counter()
    kills = ends = 0
    workdir = setting.root / f'killed{number}'
    flags = setting.arguments(workdir, **CHANGES)
    while True:
      process = servers[number].start('main', flags)
      watch = Watch(workdir, process)
      wanted = ORDER[kills % len(ORDER)]
      if kills < KILLS // CHAINS:
        begins = PHASES.get(wanted, lambda _: True)
        while process.alive():
          while process.alive() and not begins(watch):
            time.sleep(0.004)
          time.sleep(rng.random() * JITTER[wanted])
          if not process.alive():
            break
          # A moment behind a phase is as good, unless the phase itself is due:
          # beside other work it may be over whenever this thread has its turn.
          with contextlib.suppress(ProcessLookupError):  # It has just ended.
            os.kill(process.pid, signal.SIGSTOP)
            if hit[wanted] > kills / 25 or wanted in watch.phases():
              os.kill(process.pid, signal.SIGKILL)
              break
            os.kill(process.pid, signal.SIGCONT)
      done = process.wait()
      if done.returncode == -signal.SIGKILL:
        hit.update(watch.phases())
        kills += 1
        continue
      assert done.returncode == 0, done.stderr
      runs.same_result(workdir, finished)
      ends += 1
      if kills >= KILLS // CHAINS:
        return kills, ends, hit
      shutil.rmtree(workdir)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    results = list(pool.map(chain, range(CHAINS)))
  kills, ends = (sum(result[i] for result in results) for i in (0, 1))
  hit = sum((hit for *_, hit in results), collections.Counter())
  print(f'{kills} kills, {dict(hit)}; {ends} runs to the same bits')
  assert kills == KILLS // CHAINS * CHAINS
  assert set(hit) == {*ORDER}
  assert min(hit.values()) >= KILLS // 25, hit


def test_sigterm_saves_and_ends_cleanly(setting, finished, servers):
  workdir = setting.root / 'terminated'
  flags = setting.arguments(workdir, '--profile=1:24', **CHANGES)
  process = servers[0].start('main', flags)
  while runs.reached(workdir) < 1:
    assert process.alive(), process.said()
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGTERM)
  done = process.wait()
  assert done.returncode == 128 + signal.SIGTERM, done.stderr
  step = checkpoints.moments(workdir)[0].step
  assert 1 <= step < 24
  # Nothing was lost, the step that it came in included.
  assert step == _last(workdir / 'metrics.jsonl')
  assert done.stderr.splitlines()[-1] == (
    f'stopped after step {step}; run the same command again to resume'
  )
  assert 'Traceback' not in done.stderr
  assert f'profile of steps 1 to {step}: ' in done.stderr
  assert _profiled(workdir) == list(range(1, step + 1))
  shutil.rmtree(workdir / 'profile')
  done = servers[0].run('main', flags)
  assert done.returncode == 0, done.stderr
  assert f'after step {step}' in done.stderr
  assert _profiled(workdir) == list(range(step + 1, 25))
  runs.same_result(workdir, finished)
  done = servers[0].run('main', flags)
  assert done.returncode == 0, done.stderr
  assert 'no profile: this call ran none of the steps 1 to 24' in done.stderr


def _profiled(workdir: pathlib.Path) -> list[int]:
  """The steps that jax's own reader finds in the trace of a run."""
  (path,) = (workdir / 'profile').rglob('*.xplane.pb')
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  found = itertools.chain.from_iterable(
    line.events for plane in planes for line in plane.lines
  )
  return [dict(x.stats)['step_num'] for x in found if x.name == 'step']


@pytest.mark.parametrize(
  ('part', 'damage'),
  [('*', 'truncate'), ('params', 'flip'), ('optimizer', 'flip')],
)
def test_a_damaged_newest_checkpoint_falls_back(
  setting, finished, servers, part, damage
):
  workdir = setting.root / f'{damage}-{part.strip("*")}'
  shutil.copytree(finished, workdir)
  files = (workdir / 'checkpoints' / '24').glob(f'{part}/**/d/*')
  files = sorted(files, key=lambda p: p.stat().st_size)
  if damage == 'truncate':
    for path in files:
      os.truncate(path, path.stat().st_size // 2)
  else:
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 4
    files[-1].write_bytes(content)
  done = servers[0].run('main', setting.arguments(workdir, **CHANGES))
  assert done.returncode == 0, done.stderr
  assert 'cannot be read' in done.stderr
  assert 'taking the one before' in done.stderr
  runs.same_result(workdir, finished)


def test_a_full_disk_ends_in_one_line_and_loses_nothing(
  setting, finished, servers
):
  """On a real file system of 2.6 MB that fills up while the run goes on."""
  disk = setting.root / 'disk'
  disk.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=2600k', 'tmpfs', str(disk)],
    capture_output=True, check=False,
  )  # fmt: skip
  if mounted.returncode:
    pytest.skip('mounting a small file system needs root')
  flags = setting.arguments(disk / 'run', **CHANGES)
  try:
    done = servers[0].run('main', flags)
    runs.refused(done, 'the disk is full')
    assert checkpoints.moments(disk / 'run')
    # With room again, the same command goes on to the same bits.
    subprocess.run(['mount', '-o', 'remount,size=64m', str(disk)], check=True)
    done = servers[0].run('main', flags)
    assert done.returncode == 0, done.stderr
    runs.same_result(disk / 'run', finished)
  finally:
    subprocess.run(['umount', str(disk)], check=True)


def test_steps_that_are_not_finite_are_skipped_and_counted(finished):
  strict = lambda word: pytest.fail(f'{word} is not JSON')
  rows = [
    json.loads(line, parse_constant=strict)
    for line in (finished / 'metrics.jsonl').read_text().splitlines()
  ]
  rows = [row for row in rows if row['kind'] == 'train']
  assert [row['step'] for row in rows] == list(range(1, 25))
  bad = [row['step'] for row in rows if row['loss'] is None]
  assert 2 <= len(bad) <= 12
  skipped = [row['skipped'] for row in rows]
  assert skipped == [sum(s <= row['step'] for s in bad) for row in rows]
  # Of the last update: it stays where a step is skipped.
  for row, after in itertools.pairwise(rows):
    same = row['learning_rate'] == after['learning_rate']
    assert same or after['step'] not in bad


@pytest.fixture(scope='module', name='skipped')
def _skipped(setting, servers, tokens) -> pathlib.Path:
  """The workdir of a run that begins with bad batches, and has trials."""
  before = tokens.copy()
  tokens[:] = 60_000
  tokens.flush()
  workdir = setting.root / 'skipped'
  # One shrink: each has programs of its own for the trials.
  flags = setting.arguments(
    workdir,
    **CHANGES
    | {
      'prune.calibrate': True,
      'shrink.threshold': 0.9,
      'train.max_skipped': 2,
      'checkpoint.every_steps': 9,
    },
  )
  runs.refused(
    servers[0].run('main', flags), '2 steps in a row were skipped, step 2'
  )
  # What is saved are good parameters, and the batches after the bad ones.
  (moment,) = checkpoints.moments(workdir)
  assert (moment.step, moment.skipped, moment.in_a_row) == (2, 2, 0)
  assert np.isfinite(checkpoints.read_params(moment).embed).all()
  done = servers[0].run('main', flags)
  runs.refused(done, 'step 4 cannot prune: every step up to it was skipped')
  tokens[:] = before
  tokens.flush()
  done = servers[0].run('main', flags)
  assert done.returncode == 0, done.stderr
  return workdir


def test_too_many_skipped_steps_end_in_one_line(skipped):
  """As `skipped` has seen; with good batches the run goes on."""
  rows = runs.rows(skipped, 'train')
  bad = [row['step'] for row in rows if row['loss'] is None]
  assert bad[:2] == [1, 2]
  assert rows[-1]['skipped'] == len(bad)


def test_trials_behind_a_skipped_batch_are_measured(skipped):
  """On held-out text: that batch has no loss."""
  bad = {row['step'] for row in runs.rows(skipped, 'train') if not row['loss']}
  trace = list(workdir_lib.read(skipped / 'trace.jsonl'))
  assert bad & {row['step'] for row in trace}
  for row in trace:
    assert all(x['change'] is not None for x in row['trials'].values())


def test_a_killed_data_worker_ends_in_one_line(setting, finished):
  """In a process of its own: Grain starts the program once more."""
  del finished  # It has prepared the text.
  workdir = setting.root / 'worker'
  flags = setting.arguments(workdir, **CHANGES, **{'data.workers': 1})
  process = subprocess.Popen(
    [sys.executable, '-m', 'experiments.main', *flags],
    # After the last line Python tells of the dead worker's shared memory.
    cwd=conftest.ROOT, env=runs.ENV | {'PYTHONWARNINGS': 'ignore'},
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  while runs.reached(workdir) < 1:
    assert process.poll() is None
    time.sleep(0.001)
  for child in _children(process.pid, 'spawn_main'):
    os.kill(child, signal.SIGKILL)
  _, said = process.communicate(timeout=120)
  done = subprocess.CompletedProcess('main', process.returncode, '', said)
  runs.refused(done, 'a data worker has ended', '--config.data.workers=0')


def _children(pid: int, command: str) -> list[int]:
  """The children of a process that have `command` in their command line."""
  found = []
  for task in pathlib.Path(f'/proc/{pid}/task').iterdir():
    # A thread, or a child, may end meanwhile.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
      for child in (task / 'children').read_text().split():
        if command in pathlib.Path(f'/proc/{child}/cmdline').read_text():
          found.append(int(child))
  return found
