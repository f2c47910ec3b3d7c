"""What a user says of many runs, read: study, arms, seeds, sweep."""

from collections.abc import Sequence
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import types
from typing import Any

import ml_collections

from effllm_jax import comparison
from effllm_jax import errors
from experiments import arms as arms_lib
from experiments import cli


@dataclasses.dataclass(frozen=True)
class Choice:
  """What of a study is to be run.

  Attributes:
    arms: in an order in which `ours_a` stands before what starts from it.
    seeds: one run of every arm each.
    budgets: of `comparison.BUDGETS`; equal FLOPs come after equal tokens.
    tasks: public benchmarks that every model is asked.
    limit: first items of each; 0: all.
    keep: what finished runs ended as stays on disk.
  """

  arms: tuple[arms_lib.Arm, ...]
  seeds: tuple[int, ...]
  budgets: tuple[str, ...]
  tasks: tuple[str, ...] = ()
  limit: int = 100
  keep: bool = False

  @property
  def keys(self) -> set[tuple[str, str, int]]:
    """Of the rows that it asks for: budget, arm, seed."""
    names = [arm.name for arm in self.arms]
    return {*itertools.product(self.budgets, names, self.seeds)}

  def unasked(self, row: comparison.Row) -> list[str]:
    """Tasks that the model of a row has not been asked, so many items of."""
    asked = {x['task'] for x in row.tasks if x['limit'] == self.limit}
    return sorted({*self.tasks} - asked)


def load(path: str | os.PathLike) -> arms_lib.Study:
  """The study of a file.

  Raises:
    errors.InputError: no such file, or it has no `get_study`, or that fails, or
      one of its configs is none that a run takes.
  """
  module, path = _module(path, '--study')
  with cli.reading(path, 'a study, see experiments/studies'):
    study = _run(module).get_study()
  if not isinstance(study, arms_lib.Study):
    raise errors.InputError(
      f'{path}: get_study() gives a {type(study).__name__}, not a Study; see '
      'experiments/studies'
    )
  cli.check(study.config, path)
  if study.pretrained:
    cli.check(study.pretrained.config, path)
  starts = dict.fromkeys(arms_lib.STARTS, '')
  for arm in study.arms + study.sensitivity:
    if not isinstance(arm, arms_lib.Arm):
      raise errors.InputError(
        f'{path}: {arm!r} is no Arm of the study; see experiments/studies'
      )
    with cli.reading(path, f'a study, its arm {arm.name}'):
      made = arms_lib.config(arm, study.config, 0, starts)
    cli.check(made, path)
  return study


def sweep(
  path: str | os.PathLike,
) -> list[tuple[dict[str, Any], ml_collections.ConfigDict]]:
  """The variants of a file: what each overrides, and the whole config.

  Raises:
    errors.InputError: no such file, or it has no `sweep` or no `get_config`, or
      one of them fails, or what they give is no config that a run takes.
  """
  module, path = _module(path, '--config')
  what = 'a sweep, see experiments/configs/efficientllm_a.py'
  with cli.reading(path, what):
    _run(module)
  if not hasattr(module, 'sweep'):
    raise errors.InputError(f'{path} has no sweep(); write one, or use main')
  found = []
  with cli.reading(path, what):
    for overrides in module.sweep():
      config = module.get_config()
      config.update_from_flattened_dict(overrides)
      found.append((dict(overrides), config))
  for _, config in found:
    cli.check(config, path)
  return found


def _module(path, flag) -> tuple[types.ModuleType, pathlib.Path]:
  """A Python file of the user's, not run yet."""
  path = cli.program(path, flag)
  spec = importlib.util.spec_from_file_location('of_the_user', path)
  if spec is None:
    raise errors.InputError(f'{path} is no Python file; set {flag}')
  return importlib.util.module_from_spec(spec), path


def _run(module: types.ModuleType) -> types.ModuleType:
  module.__spec__.loader.exec_module(module)
  return module


def arms(
  study: arms_lib.Study, names: Sequence[str]
) -> tuple[arms_lib.Arm, ...]:
  """The arms of these names, in the study's order; 'all' and 'sensitivity'.

  Raises:
    errors.InputError: no name, or one that the study does not have.
  """
  groups = {'all': study.arms, 'sensitivity': study.sensitivity}
  known = {arm.name: arm for group in groups.values() for arm in group}
  wanted = set()
  for name in names:
    if name not in groups and name not in known:
      all_ = [*groups, *known]
      raise errors.InputError(
        f'arm {name!r} is not one of {", ".join(all_)}; set --arms'
        f'{cli.suggestion(name, all_)}'
      )
    if name in groups and not groups[name]:
      raise errors.InputError(f'the study has no arms for {name!r}; set --arms')
    wanted |= {arm.name for arm in groups.get(name, ())} or {name}
  if not wanted:
    raise errors.InputError('no arm is named; set --arms')
  return tuple(arm for name, arm in known.items() if name in wanted)


def seeds(words: Sequence[str]) -> tuple[int, ...]:
  """Numbers from words, each once.

  Raises:
    errors.InputError: none, or one that is no number from 0 on.
  """
  for word in words:
    if not (word.isascii() and word.isdecimal() and int(word) < 2**31):
      raise errors.InputError(
        f'seed {word!r} is not a number from 0 to 2147483647; set --seeds'
      )
  if not words:
    raise errors.InputError('no seed is given; set --seeds=1,2,3')
  return tuple(dict.fromkeys(map(int, words)))


def budgets(words: Sequence[str]) -> tuple[str, ...]:
  """Those of `comparison.BUDGETS` that are named, equal tokens first.

  Raises:
    errors.InputError: none, or an unknown one.
  """
  for word in words:
    if word not in comparison.BUDGETS:
      raise errors.InputError(
        f'budget {word!r} is not one of {", ".join(comparison.BUDGETS)}; set '
        '--budgets'
      )
  if not words:
    raise errors.InputError('no budget is named; set --budgets=tokens,flops')
  return tuple(x for x in comparison.BUDGETS if x in words)
