"""Work in a process of its own, whose memory is that of the work alone."""

from collections.abc import Callable
from concurrent import futures
import multiprocessing
import os
import threading
from typing import Any

from effllm_jax import errors


def call(what: str, work: Callable, *arguments) -> Any:
  """Calls a function in a new process.

  Args:
    what: it is, for the error.
    work: of a module, as its arguments and its result can be pickled.
    *arguments: of it.

  Raises:
    errors.InputError: as the function, or the process is gone.
  """
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(1, context) as pool:
    try:
      return pool.submit(_while_wanted, work, *arguments).result()
    except KeyboardInterrupt:
      # The pool waits for it. A run of ours saves first.
      for child in multiprocessing.active_children():
        child.terminate()
      raise
    except futures.process.BrokenProcessPool as e:
      raise errors.InputError(
        f'the process of {what} has ended without a word, as the system does '
        'to one that takes too much memory; free some and run the same command '
        'again'
      ) from e


def _while_wanted(work: Callable, *arguments) -> Any:
  """Calls a function, and ends with the process that wants the answer.

  A terminal's Ctrl-C does not reach it: that process hands it on, once.
  """
  os.setsid()

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
  return work(*arguments)
