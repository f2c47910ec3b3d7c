"""Starts the real command again and again without importing it each time.

    python -m tests.fork_server

Reads a line of JSON from stdin, `{"module", "flags", "output"}`, forks, and
runs `python -m <module> <flags>` in the child, what it says going to the file
`output`. Answers with the child's process id, and once the child has ended with
its exit code (negative: the signal that killed it). Nothing but imports happens
before the fork: no thread and no jax backend exists yet.
"""

import json
import os
import runpy
import sys

# All that the commands import. Named in this order: flags are defined once.
from effllm_jax import train  # noqa: F401


def main() -> None:
  """Serves until stdin ends."""
  for line in sys.stdin:
    request = json.loads(line)
    assert len(os.listdir('/proc/self/task')) == 1, 'a fork would lose threads'
    pid = os.fork()
    if pid == 0:
      output = os.open(
        request['output'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
      )
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      os.dup2(output, 1)
      os.dup2(output, 2)
      sys.argv = [request['module'], *request['flags']]
      runpy.run_module(request['module'], run_name='__main__', alter_sys=True)
      return
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == '__main__':
  main()
