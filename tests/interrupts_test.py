import os
import pickle
import signal
import threading

import pytest

from effllm_jax import interrupts


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


def test_a_stop_travels_to_another_process():
  stop = pickle.loads(pickle.dumps(interrupts.Stopped(signal.SIGTERM, 7)))
  assert (stop.signum, stop.step) == (signal.SIGTERM, 7)
  assert str(stop).startswith('stopped after step 7; run the same command')
