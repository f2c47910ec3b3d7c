"""Starts the real commands again and again without importing jax each time.

    python -m tests.fork_server

Reads a line of JSON from stdin, `{"name", "flags", "stdout", "stderr"}`, forks,
and runs `python -m experiments.<name> <flags>` in the child, what it says going
to the two files. Answers with the child's process id, and once the child has
ended with its exit code (negative: the signal that killed it). Nothing but
imports happens before the fork: no thread and no jax backend exists yet.
"""

import gc
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import time

from jax import monitoring

# New objects before Python looks for cycles among them, and how often it looks
# among older ones.
GARBAGE = 1_000_000, 10, 10


def step_back() -> None:
  """Lets XLA's threads that compile run before the one that gives them work.

  The newest jax sets up a context of MLIR for each fusion that waits for them:
  265 for 480 fusions of a small training step where all threads share a core, 7
  where this one has a lower priority, and the step is compiled in two thirds of
  the time and of the memory (steps_test: 106 s of CPU time, now 76). On Linux a
  thread has a priority of its own, at first its parent's: the first program
  that is compiled, not loaded, starts the others.
  """
  loaded = stepped_back = False

  def event(name, **_):
    nonlocal loaded
    loaded = loaded or name == '/jax/compilation_cache/cache_hits'

  def duration(name, seconds, **_):
    nonlocal loaded, stepped_back
    if name == '/jax/core/compile/backend_compile_duration':
      if not (loaded or stepped_back):
        stepped_back = True
        os.nice(10)
      loaded = False

  monitoring.register_event_listener(event)
  monitoring.register_event_duration_secs_listener(duration)


class Process:
  """A command that runs; `wait` for its end."""

  def __init__(self, server: subprocess.Popen, pid: int, files: list):
    self._server, self._files = server, files
    self.pid = pid

  def said(self) -> str:
    """What it has written to stderr so far."""
    return self._files[1].read_text()

  def alive(self) -> bool:
    """Whether it runs; one that has ended has no root any more."""
    return pathlib.Path(f'/proc/{self.pid}/root').exists()

  def wait(self) -> subprocess.CompletedProcess:
    code = int(self._server.stdout.readline())
    said = [path.read_text() for path in self._files]
    return subprocess.CompletedProcess(self.pid, code, *said)


class Server:
  """Starts commands for the price of a fork, one at a time.

  Args:
    env: environment of the commands.
    root: the folder that they run in.
  """

  def __init__(self, env: dict[str, str], root: pathlib.Path):
    self._folder = tempfile.TemporaryDirectory(prefix='effllm-said-')
    self._files = [
      pathlib.Path(self._folder.name) / name for name in ('stdout', 'stderr')
    ]
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'tests.fork_server'], cwd=root,
      # Its threads would start with the import of numpy.
      env=env | {'OPENBLAS_NUM_THREADS': '1'},
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

  def start(self, name: str, flags: list[str]) -> Process:
    for path in self._files:
      path.unlink(missing_ok=True)
    stdout, stderr = map(str, self._files)
    request = {
      'name': name, 'flags': flags, 'stdout': stdout, 'stderr': stderr
    }  # fmt: skip
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    pid = int(self._process.stdout.readline())
    while not self._files[1].exists():
      time.sleep(0.001)
    return Process(self._process, pid, self._files)

  def run(self, name: str, flags: list[str]) -> subprocess.CompletedProcess:
    return self.start(name, flags).wait()

  def close(self) -> None:
    self._process.communicate()
    self._folder.cleanup()


def serve() -> None:
  """Until stdin ends."""
  # All that the commands import; each defines flags of its own.
  from effllm_jax import train  # noqa: F401
  from experiments import cli  # noqa: F401

  # A child's collector would walk, and so copy, all that: 0.6 s a command that
  # is refused, 0.2 without.
  gc.freeze()
  gc.set_threshold(*GARBAGE)
  for line in sys.stdin:
    request = json.loads(line)
    assert len(os.listdir('/proc/self/task')) == 1, 'a fork would lose threads'
    pid = os.fork()
    if pid == 0:
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      for number, stream in ((1, 'stdout'), (2, 'stderr')):
        path = os.open(request[stream], os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(path, number)
      module = f'experiments.{request["name"]}'
      step_back()
      sys.argv = [module, *request['flags']]
      runpy.run_module(module, run_name='__main__', alter_sys=True)
      return
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == '__main__':
  serve()
