"""What a config says of a run before it begins."""

import pytest

from effllm_jax import accounting
from effllm_jax import forecast
from effllm_jax import plan as plan_lib
from effllm_jax import repair
from experiments.configs import smollm2_135m
from tests import conftest
from tests import runs

CFG = conftest.make_config(
  V=512, D=32, N=2, K=2, G=2, H=8, F=64, context=128, tied=False
)
SMALL = {'data.text': 'pypi', 'repair.batches': 2, 'budget.target': 30_000.0}


def make_plan(**changes):
  config = smollm2_135m.get_config()
  settings = conftest.small_run('smollm2-135m', 'pypi') | SMALL | changes
  config.update_from_flattened_dict(settings)
  return plan_lib.make(config, CFG)


def spent(plan, taught=lambda step: False):
  """Step by step, as a run that never shrinks counts them."""
  meter = accounting.Meter(32, plan.tokens_per_step, plan.recipe.compute.remat)
  for step in range(1, plan.steps + 1):
    meter.step(CFG, plan.scores(step), CFG if taught(step) else None)
    if plan.prunes(step):
      if plan.calibrate:
        meter.calibrate(CFG)
      if plan.damping is not None:
        layers = dict.fromkeys(('attn_in', 'heads', 'ffn_in', 'ffn'), CFG.N)
        tried = 0 if plan.damping else len(repair.CANDIDATES)
        meter.repair(CFG, layers | {'final': 1}, 2, tried)
  return meter.spent


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'prune.policy': 'none'},
    {'repair.enabled': True, 'repair.damping': 0.0},
    {'repair.enabled': True, 'repair.damping': 1.0, 'prune.calibrate': True},
    {'distill.weight': 0.5},
    {'distill.weight': 0.5, 'distill.when': 'recovery'},
    {'prune.schedule': 'oneshot', 'model.remat': 'none'},
  ],
)
def test_what_a_run_spends_that_never_gets_narrower(changes):
  plan = make_plan(**changes)
  teacher = CFG if plan.recipe.distill else None
  found = forecast.of(
    plan, CFG, seq_len=32, accumulate=2, batches=2, teacher=teacher
  )
  assert found.flops == spent(plan, plan.teaches)
  assert found.prunes == tuple(
    step for step in range(1, 25) if plan.prunes(step)
  )
  assert found.taught == sum(plan.teaches(step) for step in range(1, 25))
  assert found.steps == 24 and found.state == 12 * CFG.num_params()
  of_teacher = 4 * CFG.num_params() if found.taught else 0
  assert found.teacher == of_teacher


@pytest.mark.parametrize(
  'saliency, accumulate, trees',
  [('fisher', 1, 1), ('fisher', 4, 2), ('taylor2_micro', 4, 3)],
)
def test_what_a_step_holds_beside_the_state(saliency, accumulate, trees):
  """Trees of float32 as large as the weights."""
  plan = make_plan(
    **{'prune.saliency': saliency, 'train.accumulate': accumulate}
  )
  found = forecast.of(plan, CFG, seq_len=32, accumulate=accumulate, batches=2)
  assert found.gradients == 4 * trees * CFG.num_params()


def test_a_teacher_of_bfloat16_takes_half_the_memory():
  plan = make_plan(**{'distill.weight': 0.5, 'model.dtype': 'bfloat16'})
  found = forecast.of(
    plan, CFG, seq_len=32, accumulate=2, batches=2, teacher=CFG
  )
  assert found.teacher == 2 * CFG.num_params()
  row = dict(forecast.table(found, plan, 'toy', 49_000).rows)['teacher']
  assert row == f'in {found.taught} steps, 0.00 GB'


def test_the_table_says_what_there_is_to_say():
  plan = make_plan()
  found = forecast.of(plan, CFG, seq_len=32, accumulate=2, batches=2)
  rows = dict(forecast.table(found, plan, 'toy', 49_000).rows)
  assert rows['source'] == 'toy, 49,000 parameters'
  assert rows['to'] == '30k parameters'
  assert rows['run'] == '1,536 tokens in 24 steps'
  first, last = found.prunes[0], found.prunes[-1]
  assert rows['prunes'] == f'{len(found.prunes)}, after steps {first} to {last}'
  assert rows['recovery'].endswith(f'in {24 - found.scored} steps')
  assert 'teacher' not in rows and 'repair, at most' not in rows
  plan = make_plan(**{'prune.policy': 'none'})
  found = forecast.of(plan, CFG, seq_len=32, accumulate=2, batches=2)
  rows = dict(forecast.table(found, plan, 'toy', 49_000).rows)
  assert not {'to', 'prunes', 'recovery', 'scoring, at most'} & {*rows}


def test_the_command_writes_nothing(tmp_path):
  folder = conftest.write_model_folder(tmp_path / 'model')
  flags = conftest.flags_of(conftest.small_run(folder, tmp_path / 'no-text'))
  config = '--config=experiments/configs/smollm2_135m.py'
  done = conftest.command('forecast', config, *flags)
  assert done.returncode == 0, done.stderr
  assert '1,536 tokens in 24 steps' in done.stdout
  assert 'training, at most' in done.stdout
  assert [x.name for x in tmp_path.iterdir()] == ['model']
  runs.refused(
    conftest.command('forecast', config, *flags, '--config.budget.target=10'),
    'budget.target 10 parameters is below',
  )
  runs.refused(conftest.command('forecast'), '--config is not given')
