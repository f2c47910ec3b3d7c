"""Grain's worker processes: how they end, and how one goes on without them.

A worker can be killed, as where memory runs out, or stopped for good, and take
along what it holds: a message that it was writing, a lock.
"""

from collections.abc import Callable
import concurrent.futures
import gc
import multiprocessing
from multiprocessing import connection
import os
import signal
import threading
from typing import Any

# For Grain to let go of its threads.
_CLOSING_SECONDS = 5.0


def end_with_parent(index: int, count: int) -> None:
  """Has a worker process end with the one that reads, and not before.

  A process that is killed tells nobody, and Grain's workers would wait for it
  for ever. Ctrl-C reaches them too, and is for the other one to answer.
  """
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch():
    connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def within(seconds: float, call: Callable[[], Any]) -> Any:
  """What `call` returns; raises TimeoutError after so many seconds.

  In a thread that dies with the process: reading from a worker that was stopped
  in the middle of a message never returns.
  """
  answer = concurrent.futures.Future()

  def run():
    try:
      answer.set_result(call())
    except BaseException as e:
      answer.set_exception(e)

  threading.Thread(target=run, daemon=True).start()
  return answer.result(timeout=seconds)


def close_lost(close: Callable[[], None]) -> None:
  """Ends all workers and closes what reads them, whatever a lost one has left.

  Args:
    close: Grain's, of the iterator.
  """
  for process in multiprocessing.active_children():
    # Grain would wait 25 seconds for each.
    if process.name.startswith('grain-'):
      process.kill()
  # A process that dies within a lock never gives it back, and Grain takes the
  # same one on the way out.
  try:
    within(_CLOSING_SECONDS, close)
  except TimeoutError:
    _let_go()


def _let_go() -> None:
  """Has Grain close no reader again whose worker has died.

  It does when a reader is deleted, and at the end of the process, where a run
  that had told its error hung for ever. Grain has no function for this.
  """
  for x in gc.get_objects():
    if str(type(x).__module__).startswith('grain.'):
      # Not by `getattr`: some have one of their own, which raises.
      process = getattr(x, '__dict__', {}).get('_prefetch_process')
      if process and not process.is_alive():
        x._prefetch_process = None
