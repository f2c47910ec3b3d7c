"""The command that measures how a text is built."""

import os
import re
import signal
import time

from tests import conftest
from tests import fork_server
from tests import runs


def test_times_both_parts_and_leaves_nothing(tmp_path):
  source = conftest.write_model_folder(tmp_path / 'model')
  scratch = tmp_path / 'scratch'
  scratch.mkdir()
  done = conftest.command(
    'bench_text', f'--source={source}', f'--cache={tmp_path / "cache"}',
    '--documents=6', '--size=4000', env=os.environ | {'TMPDIR': str(scratch)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert '6 documents, 0.0 MB' in done.stdout
  rows = re.findall(
    r'(dataset|tokens) +│ +([\d.]+) +│ +([\d.]+) +│ +([\d.]+) +│ +([\d.]+)',
    done.stdout,
  )
  assert [row[0] for row in rows] == ['dataset', 'tokens'], done.stdout
  for *_, before, peak in rows:
    assert 0 < float(before) <= float(peak) < 4
  assert not [*scratch.iterdir()]


def test_ends_at_a_signal_and_leaves_nothing(tmp_path):
  source = conftest.write_model_folder(tmp_path / 'model')
  scratch = tmp_path / 'scratch'
  scratch.mkdir()
  env = os.environ | {'TMPDIR': str(scratch)}
  server = fork_server.Server(env, conftest.ROOT)
  running = server.start(
    'bench_text',
    [f'--source={source}', f'--cache={tmp_path / "cache"}',
     '--documents=1000000'],
  )  # fmt: skip
  while not [*scratch.glob('.*/text/0000009.txt')]:
    assert running.alive(), running.wait()
    time.sleep(0.01)
  os.kill(running.pid, signal.SIGTERM)
  done = running.wait()
  server.close()
  assert done.returncode == 128 + signal.SIGTERM, done.stderr
  assert not [*scratch.iterdir()]


def test_a_source_that_is_none_is_refused(tmp_path):
  done = conftest.command('bench_text', f'--source={tmp_path}')
  runs.refused(done, f'{tmp_path}/config.json', 'give a complete')
