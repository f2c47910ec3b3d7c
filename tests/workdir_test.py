import concurrent.futures
import json
import os
import pathlib
import threading

import pytest

from effllm_jax import atomic
from effllm_jax import corpus
from effllm_jax import errors
from effllm_jax import sources
from effllm_jax import workdir
from experiments.configs import smollm2_135m

CONFIG = {'seed': 0, 'prune': {'every': 2, 'floors': {'ffn': 1}}}


def claim(folder, config):
  with workdir.claimed(folder, config):
    pass


def test_a_workdir_belongs_to_one_config(tmp_path):
  folder = tmp_path / 'a' / 'b'
  claim(folder, CONFIG)
  claim(folder, CONFIG)
  other = {'seed': 0, 'prune': {'every': 4, 'floors': {'ffn': 1}}}
  with pytest.raises(
    errors.InputError, match=r'prune\.every=2 there, 4 now; use the same'
  ):
    claim(folder, other)
  assert json.loads((folder / 'config.json').read_text()) == CONFIG


def test_what_no_weight_depends_on_may_change(tmp_path):
  config = CONFIG | {
    'mesh': {'data': 1}, 'checkpoint': {'keep': 2}, 'data': {'timeout': 300.0}
  }  # fmt: skip
  claim(tmp_path, config)
  other = {
    'mesh': {'data': 8}, 'checkpoint': {'keep': 5}, 'data': {'timeout': 600.0}
  }  # fmt: skip
  claim(tmp_path, config | other)
  assert json.loads((tmp_path / 'config.json').read_text()) == config
  with pytest.raises(errors.InputError, match=r"data\.text='absent' there"):
    workdir.check(tmp_path, config | other | {'data': {'text': 'pypi'}})


def test_a_config_of_before_there_was_a_key_had_no_such_text(tmp_path):
  old = CONFIG | {'eval': {'every_tokens': 9}}
  new = lambda text: CONFIG | {'eval': {'every_tokens': 9, 'text': text}}
  claim(tmp_path, old)
  claim(tmp_path, new(''))
  assert json.loads((tmp_path / 'config.json').read_text()) == old
  with pytest.raises(errors.InputError, match=r"eval\.text='' there, 'a' now"):
    claim(tmp_path, new('a'))


def test_a_model_and_a_text_may_lie_elsewhere(tmp_path):
  """What they are is compared where they have been read."""
  config = lambda source, text, rest='a/b': {
    'source': source, 'data': {'text': text, 'seed': 0}, 'rest': rest
  }  # fmt: skip
  claim(tmp_path, config('runs/a/events/3', 'texts/a'))
  claim(tmp_path, config('/mnt/a/events/3', 'texts/a'))
  claim(tmp_path, config('/mnt/a/events/3', 'a'))
  moved = config('3', 'text/../a')
  claim(tmp_path, moved)
  known = json.loads((tmp_path / 'config.json').read_text())
  assert known == moved
  for other in (
    # No path: a name.
    config('smollm2-135m', 'texts/a'),
    config('runs/a/events/3', 'pypi'),
    config('runs/a/events/3', None),
    config('runs/a/events/3', 'texts/a', 'a//b'),
  ):
    with pytest.raises(errors.InputError, match='another config'):
      claim(tmp_path, other)
  assert json.loads((tmp_path / 'config.json').read_text()) == moved


def test_what_is_no_path_is_what_the_readers_know_by_name():
  names = workdir._PATHS
  assert names['source'] == (sources.DEFAULT,)
  # Without a path the source teaches.
  assert names['distill.teacher'] == ('', sources.DEFAULT)
  assert names['data.text'] == tuple(corpus._packages())
  config = smollm2_135m.get_config()
  for key, known in names.items():
    assert workdir._flat(config.to_dict())[key] in known


def test_a_check_writes_nothing(tmp_path):
  workdir.check(tmp_path / 'new' / 'run', CONFIG)
  assert not os.listdir(tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(errors.InputError, match='holds other files'):
    claim(tmp_path, CONFIG)
  assert sorted(os.listdir(tmp_path)) == ['thesis.tex']


def test_a_run_at_work_keeps_its_config(tmp_path):
  """Whoever is refused has written nothing, also where only paths differ."""
  config = lambda source: {'source': source, 'seed': 0}
  with workdir.claimed(tmp_path / 'a', config('runs/a')):
    with pytest.raises(atomic.HeldError, match='another run is at work in'):
      claim(tmp_path / 'a', config('runs/b'))
    known = json.loads((tmp_path / 'a' / 'config.json').read_text())
    assert known == config('runs/a')
  claim(tmp_path / 'a', config('runs/b'))


def test_a_claim_that_went_no_further_than_its_lock_is_made_again(tmp_path):
  (tmp_path / workdir.LOCK).touch()
  claim(tmp_path, CONFIG)
  assert json.loads((tmp_path / 'config.json').read_text()) == CONFIG


def test_many_claim_a_new_workdir_at_once(tmp_path):
  """One gets it, and the others hear of a lock, whatever is there by then."""
  several = 8
  barrier = threading.Barrier(several, timeout=60)

  def attempt(folder):
    barrier.wait()
    try:
      with workdir.claimed(folder, CONFIG):
        barrier.wait()
        return 'held'
    except atomic.HeldError:
      barrier.wait()
      return 'refused'

  with concurrent.futures.ThreadPoolExecutor(several) as pool:
    for i in range(20):
      found = [*pool.map(attempt, [tmp_path / str(i)] * several)]
      assert sorted(found) == ['held'] + ['refused'] * (several - 1)


def test_a_config_that_comes_while_the_folder_is_listed(tmp_path, monkeypatch):
  """That of a run which begins meanwhile: nothing else is there yet."""
  listed = pathlib.Path.iterdir

  def late(folder):
    atomic.write_json(tmp_path / 'config.json', CONFIG)
    return listed(folder)

  monkeypatch.setattr(pathlib.Path, 'iterdir', late)
  workdir.check(tmp_path, CONFIG)


def test_a_path_that_is_a_file_is_refused(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(errors.InputError, match='choose another --workdir'):
    claim(tmp_path / 'file' / 'run', CONFIG)


def test_a_broken_config_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(errors.InputError, match=r'config\.json is not JSON'):
    claim(tmp_path, CONFIG)


def test_rows_of_a_lost_future_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  log = workdir.Log(path, -1)
  for step in range(5):
    log.write({'step': step})
  log.close()
  with path.open('a') as f:
    f.write('{"step": 5, "lo')
  assert [r['step'] for r in workdir.read(path)] == [0, 1, 2, 3, 4]
  log = workdir.Log(path, 2)
  log.write({'step': 3})
  log.close()
  assert [r['step'] for r in workdir.read(path)] == [0, 1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
  with pytest.raises(
    errors.InputError, match=r'line 2 is not JSON.*; take that line out$'
  ):
    list(workdir.read(path))
  path.write_text('{"step": 0}\n{"stop": 1}\n{"step": 2}\n')
  with pytest.raises(errors.InputError, match=r'row 2 has .*; take that line'):
    workdir.Log(path, 2)
  # What is told to do loses nothing else.
  path.write_text('{"step": 0}\n{"step": 2}\n')
  workdir.Log(path, 2).close()
  assert [r['step'] for r in workdir.read(path)] == [0, 2]
