"""What a prune may take, and which targets no prune can reach."""

import dataclasses

import pytest

from effllm_jax import budgets
from effllm_jax import errors
from effllm_jax import rules as rules_lib
from tests import conftest


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(target=10**9), '1,000,000,000 parameters is not below the sou'),
    (dict(target=1), r'target 1 parameters is below [\d,]+ parameters, the si'),
    (dict(floors=(0, 1, 1)), 'prune.floors.heads 0 is not between 1 and'),
    (dict(multiple_of=(1, 64, 1)), 'prune.multiple_of.ffn 64 is not between'),
    (dict(multiple_of=(1, 0, 1)), 'prune.multiple_of.ffn 0 is not between 1'),
    (dict(multiple_of=(1, 1, 0)), 'prune.multiple_of.stem 0 is not between'),
    (
      dict(floors=(1, 17, 1), multiple_of=(1, 8, 1)),
      'floors.ffn 17, rounded up to a multiple of 8, is 24, above the source',
    ),
    (
      dict(policy='ragged', multiple_of=(1, 8, 1)),
      "prune.multiple_of.ffn 8 does not divide the source model's 20, as",
    ),
    (
      dict(policy='ragged', floors=(0, 0, 0)),
      'prune.floors.stem 0 is not between 1 and',
    ),
    (dict(policy='ragged', floors=(0, -1, 1)), 'floors.ffn -1 is not betw'),
  ],
)  # fmt: skip
def test_impossible_targets_are_refused(change, message):
  cfg = conftest.make_config()
  arguments = dict(
    policy='uniform',
    target=3000,
    floors=(1, 1, 1),
    multiple_of=(1, 1, 1),
    price_embedding=True,
  )
  cost = budgets.params(cfg)
  target = arguments.pop('target')
  rules = rules_lib.Rules(**arguments)
  rules_lib.check_target(cfg, rules, cost, target)
  target = change.pop('target', target)
  with pytest.raises(errors.InputError, match=message) as e:
    rules_lib.check_target(
      cfg, dataclasses.replace(rules, **change), cost, target
    )
  assert '--config.' in str(e.value) and '\n' not in str(e.value)


def test_a_stem_need_not_be_on_a_multiple_under_ragged():
  """It goes channel by channel, and is on one in the end."""
  cfg = conftest.make_config(K=2, F=20, D=12)
  cost = budgets.params(cfg)
  rules = rules_lib.Rules('ragged', (0, 0, 1), (1, 1, 5), True)
  rules_lib.check_target(cfg, rules, cost, cost.of_config(cfg) - 1)


@pytest.mark.parametrize(
  ('floors', 'multiple_of'),
  [
    ((1, 1, 1), (1, 20, 12)),
    ((2, 1, 1), (2, 1, 1)),
    ((1, 20, 12), (1, 1, 1)),
    # Rounded up to the source's own width.
    ((1, 17, 11), (1, 5, 4)),
  ],
)
def test_a_width_of_the_source_is_not_too_much(floors, multiple_of):
  cfg = conftest.make_config(K=2, F=20, D=12)
  cost = budgets.params(cfg)
  rules = rules_lib.Rules('uniform', floors, multiple_of, True)
  dense = cost.of_config(cfg)
  rules_lib.check_target(cfg, rules, cost, dense - 1)
  with pytest.raises(errors.InputError, match=r'is not below the source'):
    rules_lib.check_target(cfg, rules, cost, dense)


def test_a_target_above_what_is_alive_is_told_that_size():
  """Of a source with dead groups, whose arrays are larger."""
  cfg = conftest.make_config(K=2, F=20, D=12)
  cost = budgets.params(cfg)
  rules = rules_lib.Rules('ragged', (1, 1, 1), (1, 1, 1), True)
  start = cost.of_config(cfg) - 100
  rules_lib.check_target(cfg, rules, cost, start - 1, start=start)
  for target in (start, start + 50, start + 1000):
    with pytest.raises(errors.InputError, match=rf"model's {start:,} param"):
      rules_lib.check_target(cfg, rules, cost, target, start=start)


def test_the_size_at_the_floors_is_within_reach():
  cfg = conftest.make_config(K=2, F=20, D=12)
  cost = budgets.params(cfg)
  rules = rules_lib.Rules('uniform', (1, 3, 5), (1, 4, 2), True)
  least = cost.of_config(dataclasses.replace(cfg, K=1, F=4, D=6))
  rules_lib.check_target(cfg, rules, cost, least)
  with pytest.raises(errors.InputError, match=r'heads 1, ffn 4, stem 6'):
    rules_lib.check_target(cfg, rules, cost, least - 1)


def test_rules_come_from_the_mappings_of_a_config():
  floors = {'ffn': 2, 'heads': 1, 'stem': 3}
  rules = rules_lib.Rules.of('ragged', floors, floors | {'stem': 4}, False)
  assert rules == rules_lib.Rules('ragged', (1, 2, 3), (1, 2, 4), False)
  assert rules.smallest() == (1, 2, 4)
