"""Every arm of every shipped study is a run that the plan accepts."""

import dataclasses
import pathlib

import pytest

from effllm_jax import errors
from effllm_jax import plan as plan_lib
from experiments import arms
from experiments import choices
from experiments import cli
from experiments import same_budget
from experiments.studies import small
from experiments.studies import small_quick_shape
from tests import configs_test

FOLDER = pathlib.Path(__file__).parents[1] / 'experiments' / 'studies'
STUDIES = sorted(FOLDER.glob('*.py'))


def shape_of(study):
  return study.pretrained.cfg if study.pretrained else configs_test.SMOLLM2


@pytest.mark.parametrize('path', STUDIES, ids=lambda p: p.stem)
def test_arms_are_valid_plans_of_equal_length(path):
  study = choices.load(path)
  cfg = shape_of(study)
  ours = plan_lib.make(study.config, cfg)
  uniform = arms.uniform_shape(cfg, ours)
  shapes = {'source': cfg, 'found': uniform, 'uniform': uniform}
  starts = {x: f'model/{x}' for x in arms.STARTS}
  names = [arm.name for arm in (*study.arms, *study.sensitivity)]
  assert len({*names}) == len(names)
  for arm in (*study.arms, *study.sensitivity):
    config = arms.config(arm, study.config, 1, starts)
    cli.check(config, path)
    assert config.seed == 1
    assert config.source == starts[arm.start]
    made = plan_lib.make(config, shapes[arm.start])
    assert made.tokens(made.steps) == study.config.train.tokens, arm.name
    if arm.name != 'ours_a_other_price':
      assert made.unpriced(cfg.D) < 0.5, arm.name
    prunes = any(made.prunes(s) for s in range(1, made.steps + 1))
    assert prunes == (config.prune.policy != 'none'), arm.name
    for field in ('data', 'optimizer', 'train'):
      if arm.name != 'ours_a_batch_2x':
        same = config[field].to_dict() == study.config[field].to_dict()
        assert same, arm.name
    if arm.name == 'distill_scratch':
      assert config.distill.teacher == starts['source']
  if study.pretrained:
    cli.check(study.pretrained.config, path)
    made = plan_lib.make(study.pretrained.config, cfg)
    assert not any(made.scores(s) for s in range(1, made.steps + 1))


@pytest.mark.parametrize('path', STUDIES, ids=lambda p: p.stem)
def test_the_uniform_shape_is_the_largest_of_its_proportions(path):
  study = choices.load(path)
  cfg = shape_of(study)
  plan = plan_lib.make(study.config, cfg)
  found = arms.uniform_shape(cfg, plan)
  size = lambda f: dataclasses.replace(
    cfg,
    **{
      name: max(int(f * getattr(cfg, name) / m + 0.5), 1) * m
      for name, m in zip('KFD', plan.rules.multiple_of, strict=True)
    },
  )
  # Off the grid of the factors where a width changes.
  every = [size((i + 0.5) / 20_000) for i in range(20_000)]
  fits = [x for x in every if x.num_params() <= study.config.budget.target]
  assert found == max(fits, key=lambda x: x.num_params())
  assert found.N == cfg.N


def test_in_the_study_of_one_shape_no_other_one_is_final():
  plan = plan_lib.make(small_quick_shape.get_study().config, small.CFG)
  floors, blocks = plan.rules.smallest(), plan.rules.multiple_of
  assert floors == (3, 192, 144)

  def size(widths):
    shape = dict(zip('KFD', widths, strict=True))
    return plan.cost.of_config(dataclasses.replace(small.CFG, **shape))

  assert size(floors) <= plan.schedule.target
  for i, block in enumerate(blocks):
    wider = [w + block * (i == j) for j, w in enumerate(floors)]
    assert size(wider) > plan.schedule.target


def test_a_longer_run_is_pruned_at_the_same_tokens():
  config = small.get_study().config
  longer = arms.lengthened(config, 3 * config.train.tokens)
  assert longer.optimizer.decay_tokens == 3 * config.optimizer.decay_tokens
  assert longer.prune.to_dict() == config.prune.to_dict()
  assert config.train.tokens * 3 == longer.train.tokens
  # 1,024 tokens a step.
  for tokens, steps in ((10_751.5, 10), (10_752.5, 11)):
    assert arms.lengthened(config, tokens).train.tokens == 1024 * steps


def test_arms_are_chosen_by_name_and_run_in_the_order_of_the_study():
  study = small.get_study()
  found = choices.arms(study, ['scratch_found', 'ours_a'])
  assert [x.name for x in found] == ['ours_a', 'scratch_found']
  assert choices.arms(study, ['all']) == study.arms
  assert choices.arms(study, ['sensitivity']) == study.sensitivity
  plain = dataclasses.replace(study, sensitivity=())
  with pytest.raises(
    errors.InputError, match=r"no arms for 'sensitivity'; set"
  ):
    choices.arms(plain, ['ours_a', 'sensitivity'])
  assert choices.seeds(['2', '0', '2']) == (2, 0)
  assert choices.budgets(['flops', 'tokens']) == ('tokens', 'flops')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ("'prune.evry': 4", r'its arm x: KeyError: .*evry'),
    ("'prune.every': 'often'", r'its arm x: TypeError: .*often'),
    ("'prune.every': 4, 'prune.floors.heads': -1", None),
  ],
)
def test_a_mistake_in_an_arm_is_told_before_anything_is_made(
  tmp_path, change, message
):
  path = tmp_path / 'mine.py'
  path.write_text(
    'import dataclasses\n'
    'from experiments import arms\n'
    'from experiments.studies import small\n'
    'def get_study():\n'
    f"  arm = arms.Arm('x', {{{change}}})\n"
    '  return dataclasses.replace(small.get_study(), sensitivity=(arm,))\n'
  )
  if message:
    with pytest.raises(errors.InputError, match=message):
      choices.load(path)
  else:
    # A value that no run takes is told of by its plan, which needs the source.
    (arm,) = choices.load(path).sensitivity
    choice = choices.Choice((arm,), (1,), ('tokens',))
    with pytest.raises(errors.InputError, match=r'arm x: prune\.floors'):
      same_budget.run(choices.load(path), 'm', tmp_path / 'w', tmp_path, choice)
  assert not (tmp_path / 'w').exists()


def test_the_arms_of_a_file_may_be_a_list(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from experiments import arms\n'
    'from experiments.studies import small\n'
    'def get_study():\n'
    '  made = [arms.Arm("ours_a", {}), arms.Arm("x", {"seed": 2})]\n'
    '  return arms.Study(small.get_study().config, made)\n'
  )
  assert [arm.name for arm in choices.load(path).arms] == ['ours_a', 'x']
  path.write_text(path.read_text().replace('arms.Arm("x", {"seed": 2})', '"x"'))
  with pytest.raises(errors.InputError, match="'x' is no Arm of the study"):
    choices.load(path)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda s: choices.arms(s, ['ours_c']), "arm 'ours_c' is not one of all"),
    (
      lambda s: choices.arms(s, ['oneshot_activations']),
      r"; set --arms; did you mean 'oneshot_activation'\?$",
    ),
    (lambda s: choices.arms(s, ['dark']), 'ours_a_batch_2x; set --arms$'),
    (lambda s: choices.arms(s, []), 'no arm is named; set --arms'),
    (lambda _: choices.seeds(['one']), "seed 'one' is not a number"),
    (lambda _: choices.budgets(['hours']), "'hours' is not one of tokens, fl"),
    (lambda _: choices.load('none.py'), 'none.py is not a file; set --study'),
    (
      lambda _: choices.load(FOLDER / 'smal.py'),
      r'smal.py is not a file; set --study; did you mean .*/small.py\?',
    ),
    (lambda _: choices.load(FOLDER), 'is not a file'),
    (lambda _: choices.load(__file__), 'cannot be read as a study'),
  ],
)
def test_choices_that_make_no_sense_are_refused(call, message):
  with pytest.raises(errors.InputError, match=message):
    call(small.get_study())
