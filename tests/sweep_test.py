"""The real command over a few variants of a small model."""

import concurrent.futures

import pytest

from effllm_jax import errors
from experiments import choices
from experiments.configs import efficientllm_a
from experiments.configs import efficientllm_b
from experiments.configs import ragged
from experiments.configs import smollm2_135m
from tests import conftest
from tests import runs

CONFIG = """
from experiments.configs import smollm2_135m
from tests import conftest

def get_config():
  config = smollm2_135m.get_config()
  config.update_from_flattened_dict(
    conftest.small_run({model!r}, {text!r}, **{{
      'train.tokens': 3 * 64, 'optimizer.warmup_tokens': 64,
      'optimizer.decay_tokens': 64, 'prune.policy': 'none',
    }})
  )
  return config

def sweep():
  yield {{}}
  for seed in (1, 2):
    yield {long!r} | {{'seed': seed}}
"""
# Together longer than a folder may be called. All variants have one program,
# which takes most of the time: what counts is the bookkeeping.
LONG = {
  'prune.floors.heads': 2,
  'prune.floors.ffn': 16,
  'prune.floors.stem': 24,
  'prune.multiple_of.ffn': 4,
  'prune.multiple_of.stem': 4,
  'prune.saliency': 'magnitude',
  'prune.schedule': 'cubic',
  'prune.price_embedding': True,
  'checkpoint.every_steps': 50,
  'checkpoint.keep': 3,
  'train.max_skipped': 5,
  'data.timeout': 60.0,
}


def test_every_variant_runs_in_a_folder_of_its_own(tmp_path):
  model = conftest.write_model_folder(tmp_path / 'model')
  text = conftest.write_text_folder(tmp_path / 'text')
  config = tmp_path / 'swept.py'
  config.write_text(CONFIG.format(model=str(model), text=str(text), long=LONG))
  workdir = tmp_path / 'sweep'
  call = lambda: conftest.command(
    'sweep', f'--config={config}', f'--workdir={workdir}',
    f'--cache={tmp_path / "cache"}',
  )  # fmt: skip
  # They share the variants. A thread has a server of its own to start.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    other = pool.submit(call)
    both = [call(), other.result()]
  for done in both:
    assert done.returncode == 0, done.stderr
  assert both[0].stdout == both[1].stdout
  base, *longer = sorted(workdir.iterdir())
  assert base.name == 'base'
  assert len(longer) == 2
  for folder in (base, *longer):
    *_, last = runs.rows(folder, 'eval')
    assert last['phase'] == 'final'
    assert f'{last["bits_per_byte"]:.4f}' in done.stdout
  # Shortened, and still told apart.
  assert all('...' in x.name for x in longer)
  # What was lost of one log keeps no other out of the table.
  log = base / 'metrics.jsonl'
  lines = log.read_text().splitlines(keepends=True)
  log.write_text(''.join(x for x in lines if '"source"' not in x))
  done = call()
  runs.refused(done, 'variant base: ', "has no 'source' evaluation, as after")
  assert done.stdout.count('->') == 2


def test_a_variant_that_diverges_keeps_no_other_from_running(tmp_path):
  model = conftest.write_model_folder(tmp_path / 'model')
  text = conftest.write_text_folder(tmp_path / 'text')
  config = tmp_path / 'swept.py'
  code = CONFIG.format(model=str(model), text=str(text), long={})
  code = code.partition('def sweep')[0]
  config.write_text(
    f'{code}def sweep():\n'
    "  yield {'optimizer.peak': 1e30, 'train.max_skipped': 1}\n"
    # The rate of all others here, and so their program.
    "  yield {'optimizer.peak': 3e-3}\n"
  )
  done = conftest.command(
    'sweep', f'--config={config}', f'--workdir={tmp_path / "sweep"}',
    f'--cache={tmp_path / "cache"}',
  )  # fmt: skip
  name = 'variant optimizer.peak=1e+30,train.max_skipped=1: '
  runs.refused(done, f'{name}1 steps in a row were skipped')
  (row,) = [x for x in done.stdout.splitlines() if '->' in x]
  assert row.split()[1] == 'optimizer.peak=0.003'


def test_a_config_that_fails_is_refused_in_one_line(tmp_path):
  config = tmp_path / 'swept.py'
  config.write_text(
    'from experiments.configs import smollm2_135m as base\n'
    'get_config = base.get_config\n'
    "def sweep():\n  yield {'data.weights': {'en.wiki': 1.0}}\n"
  )
  done = conftest.command(
    'sweep', f'--config={config}', f'--workdir={tmp_path / "sweep"}'
  )
  runs.refused(done, str(config), "'en.wiki' has a dot")
  assert not (tmp_path / 'sweep').exists()


def test_the_sweep_of_the_recipe_ends_at_what_is_shipped():
  def changed(overrides):
    config = efficientllm_a.get_config()
    config.update_from_flattened_dict(overrides)
    return config.to_dict()

  assert [changed(x) for x in efficientllm_a.sweep()][-4:] == [
    module.get_config().to_dict()
    for module in (smollm2_135m, efficientllm_a, efficientllm_b, ragged)
  ]


SWEPT = """
from experiments.configs.smollm2_135m import get_config
def sweep():
  yield {}
"""


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('a.txt', '', 'is no Python file; set --config'),
    ('a.py', 'def (', 'cannot be read as a sweep, .*: SyntaxError'),
    ('a.py', 'import nothing_of_that_name', 'ModuleNotFoundError'),
    ('a.py', '', r'has no sweep\(\); write one, or use main'),
    ('a.py', 'def sweep(): yield {}', "has no attribute 'get_config'"),
    ('a.py', f"{SWEPT}  yield {{'optimizer.peak': 'high'}}", 'TypeError'),
    ('a.py', f"{SWEPT}  yield {{'optimizer.peek': 1.0}}", 'peek'),
    ('a.py', f'{SWEPT}  yield 7', 'cannot be read as a sweep'),
    ('a.py', f'{SWEPT}  1 / 0', 'ZeroDivisionError.*; correct the file'),
    (
      'a.py', f'{SWEPT}def get_config(): return None',
      'cannot be read as a sweep',
    ),
  ],
)  # fmt: skip
def test_what_is_no_sweep_is_refused(tmp_path, name, text, message):
  """Also in the last variant, before the first one runs."""
  path = tmp_path / name
  path.write_text(text)
  with pytest.raises(errors.InputError, match=message):
    choices.sweep(path)
  with pytest.raises(errors.InputError, match='is not a file; set --config'):
    choices.sweep(tmp_path)


def test_a_value_that_no_run_takes_is_told_before_the_first(tmp_path):
  model = conftest.write_model_folder(tmp_path / 'model')
  config = tmp_path / 'swept.py'
  wrong = {'optimizer.peak': -1.0}
  config.write_text(CONFIG.format(model=str(model), text='text', long=wrong))
  done = conftest.command(
    'sweep', f'--config={config}', f'--workdir={tmp_path / "sweep"}'
  )
  runs.refused(done, 'variant optimizer.peak=-1.0', 'is not positive')
  assert not (tmp_path / 'sweep').exists()
