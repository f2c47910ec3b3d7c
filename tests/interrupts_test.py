import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading

import pytest

from effllm_jax import interrupts
from effllm_jax import loop
from effllm_jax import small_run
from effllm_jax import train
from tests import conftest


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_only_the_first_signal_is_remembered(signum):
  """The second one does what it did outside; so does every one afterwards."""
  obeyed = []
  before = signal.signal(signum, lambda number, frame: obeyed.append(number))
  try:
    with interrupts.requests() as requests:
      assert requests.signum is None
      os.kill(os.getpid(), signum)
      assert (requests.signum, obeyed) == (signum, [])
      os.kill(os.getpid(), signum)
      assert obeyed == [signum]
    with interrupts.requests() as requests:
      pass
    os.kill(os.getpid(), signum)
    assert (requests.signum, obeyed) == (None, [signum, signum])
  finally:
    signal.signal(signum, before)


def test_another_thread_leaves_the_handlers_alone():
  before, found = signal.getsignal(signal.SIGTERM), []

  def run():
    with interrupts.requests() as requests:
      found.append((signal.getsignal(signal.SIGTERM), requests.signum))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert found == [(before, None)]


def test_a_stop_in_the_last_step_is_not_lost(tmp_path, monkeypatch):
  """A sweep would go on with the next variant."""
  small_run.write_inputs(tmp_path)
  config = small_run.config(tmp_path / 'model', tmp_path / 'text')
  config.prune.policy, config.train.tokens = 'none', 2 * 64
  config.optimizer.warmup_tokens = config.optimizer.decay_tokens = 64
  evaluate, last = loop.Loop._evaluate, []

  def stopped(self, step, phase):
    evaluate(self, step, phase)
    if phase == 'final':
      os.kill(os.getpid(), signal.SIGINT)
      last.append(step)

  monkeypatch.setattr(loop.Loop, '_evaluate', stopped)
  run = lambda: train.run(config, tmp_path / 'run', tmp_path / 'cache')
  with pytest.raises(interrupts.Stopped, match='after step 2;'):
    run()
  # It had finished, and is not asked again.
  run()
  assert last == [2]


def test_a_stop_travels_to_another_process():
  stop = pickle.loads(pickle.dumps(interrupts.Stopped(signal.SIGTERM, 7)))
  assert (stop.signum, stop.step) == (signal.SIGTERM, 7)
  assert str(stop).startswith('stopped after step 7; run the same command')


# As a command is at work: half of something lies in a folder.
COMMAND = """
import gc, os, pathlib, signal, tempfile, threading
from experiments import cli

# Also where the shell that started the tests ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def main(argv):
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, 'half').touch()

    def wait(*of_a_collection):
      gc.callbacks[:] = []
      print(folder, flush=True)
      threading.Event().wait()

    if os.environ['WHERE'] == 'a collection':
      gc.callbacks[:] = [wait]
      gc.collect()
    wait()

cli.run(main)
"""


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('where', ['main', 'a collection'])
def test_a_command_that_is_stopped_leaves_nothing_unfinished(
  signum, where, tmp_path
):
  """Also while garbage is collected, where Python ignores what is raised."""
  process = subprocess.Popen(
    [sys.executable, '-c', COMMAND, f'--cache={tmp_path / "cache"}'],
    cwd=conftest.ROOT,
    env=os.environ | {'TMPDIR': str(tmp_path), 'WHERE': where},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  folder = pathlib.Path(process.stdout.readline().strip())
  assert (folder / 'half').exists()
  process.send_signal(signum)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 128 + signum, said
  assert said.splitlines() == ['stopped; run the same command again to resume']
  assert not folder.exists()


# Its first import takes a second, in which a user may think better of it.
IMPORTING = """
import sys
from experiments import cli

class Finder:
  def find_spec(self, name, path=None, target=None):
    if name == 'effllm_jax.interrupts':
      raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
cli.run(print)
"""


def test_a_command_that_is_stopped_while_it_begins():
  done = subprocess.run(
    [sys.executable, '-c', IMPORTING],
    cwd=conftest.ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (128 + signal.SIGINT, '')
  assert done.stderr == 'stopped; run the same command again to resume\n'
