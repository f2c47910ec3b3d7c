"""Whether what is chosen of a study can be run, before any of it is.

`check_order` and `check_plans` come before there is a folder, or a source, that
takes minutes to make; `check_folder` looks at both.
"""

from collections.abc import Iterable

from effllm_jax import comparison
from effllm_jax import dataset
from effllm_jax import errors
from effllm_jax import inputs
from effllm_jax import plan as plan_lib
from effllm_jax import runlog
from effllm_jax import structure
from effllm_jax import workdir as workdir_lib
from experiments import arms as arms_lib
from experiments import choices
from experiments import study_folder


def check_order(rows: Iterable[comparison.Row], choice: choices.Choice) -> None:
  """Refuses runs that follow from others which are not there.

  Args:
    rows: of the runs that are.
    choice: what is to be run.

  Raises:
    errors.InputError: names the first such run, and what to add.
  """
  there = {row.key for row in rows} | choice.keys
  for arm in choice.arms:
    for seed in choice.seeds:
      ours = ('tokens', arms_lib.OURS, seed)
      if arm.start == 'found' and ours not in there:
        raise errors.InputError(
          f'arm {arm.name} starts from what {arms_lib.OURS} of seed {seed} '
          f'ended as, which has not been run; add {arms_lib.OURS} to --arms '
          'and tokens to --budgets'
        )
      if ('tokens', arm.name, seed) not in there:
        raise errors.InputError(
          f'equal FLOPs of arm {arm.name}, seed {seed}, follow from its run '
          'at equal tokens, which is missing; add tokens to --budgets'
        )


def check_plans(
  study: arms_lib.Study,
  choice: choices.Choice,
  cfg: structure.ModelConfig,
  masks: structure.Groups | None = None,
) -> None:
  """Refuses arms whose run would be refused, or would leave no row.

  Args:
    study: of the arms.
    choice: arms and budgets; of arms that start from another shape, which is
      not known yet, only the log is looked at.
    cfg: architecture of the source.
    masks: what is alive in it; None: everything.

  Raises:
    errors.InputError: names the arm; or the study's own config is refused.
  """
  # Of `ours_a`, and so of the shape made by hand.
  plan_lib.make(study.config, cfg, masks)
  for arm in choice.arms:
    config = arms_lib.config(
      arm, study.config, 0, dict.fromkeys(arms_lib.STARTS, '')
    )
    steps, every = plan_lib.num_steps(config), config.train.log_every
    # A comparison takes the FLOPs of a token from the last two rows of the log.
    before = (steps - 1) // every * every
    if not before:
      raise errors.InputError(
        f'train.log_every {every} leaves one row of the {steps} steps of arm '
        f'{arm.name}, and a comparison needs two; set it lower in the study'
      )
    if arm.start != 'source':
      continue
    try:
      plan = plan_lib.make(config, cfg, masks)
    except errors.InputError as e:
      raise errors.InputError(f'arm {arm.name}: {e}') from e
    if 'flops' in choice.budgets and plan.scores(before + 1):
      raise errors.InputError(
        f'arm {arm.name} still prunes after step {before} of {steps}, the last '
        'but one in its log, from where on a step has to cost what it does in '
        'a longer run; lower prune.end_tokens or train.log_every in the study, '
        'or set --budgets=tokens'
      )


def check_folder(
  folder: study_folder.StudyFolder, choice: choices.Choice
) -> None:
  """Refuses what belongs to other settings, or would have no row.

  Args:
    folder: of the study; gets the shape made by hand, if an arm starts from it.
    choice: what is to be run.

  Raises:
    errors.InputError: as `check_plans`; or rows of the folder are of another
      config, model or text, or of models that can be asked nothing any more.
  """
  names = [arm.name for arm in choice.arms]
  check_plans(folder.study, choice, folder.shape.cfg, folder.shape.masks)
  for arm in choice.arms:
    if arm.start == 'uniform':
      # Makes the shape: what keeps it from being made is told before any run.
      folder.config(arm, 0)
  # Whatever is asked for, the table is of all of them.
  known = {
    arm.name: arm for arm in folder.study.arms + folder.study.sensitivity
  }
  known |= {arm.name: arm for arm in choice.arms}
  for budget, name, seed in folder.rows:
    # What others end as may be gone, for arms that are not asked for.
    if (
      budget == 'tokens'
      and name in known
      and (known[name].start != 'found' or name in names)
    ):
      _check_row(folder, known[name], seed)
  for key in folder.done.keys() & choice.keys:
    missing = choice.unasked(folder.rows[key])
    if missing and not folder.left(key):
      raise errors.InputError(
        f'{", ".join(key[:2])}, seed {key[2]}, was not asked '
        f'{", ".join(missing)} with --limit={choice.limit}, and its model is '
        'gone; set another --workdir, and --keep where more is to be asked '
        'later'
      )


def _check_row(folder, arm, seed) -> None:
  """Refuses a row at equal tokens of other settings than the study's."""
  key = ('tokens', arm.name, seed)
  row = folder.rows[key]
  if arm.start == 'found' and not folder.is_left(seed):
    # It has been run, and needs no start any more.
    starts = dict.fromkeys(arms_lib.STARTS, '')
    config = arms_lib.config(arm, folder.study.config, seed, starts)
  else:
    config = folder.config(arm, seed)
  tokens = plan_lib.num_steps(config) * plan_lib.tokens_per_step(config)
  if row.tokens != tokens:
    raise errors.InputError(
      f'{folder.results} has {arm.name} of seed {seed} after '
      f'{row.tokens:,} tokens, the study says {tokens:,}; set '
      'another --workdir'
    )
  workdir = folder.workdir(key, config.train.tokens)
  # A row is all that the table needs: its run may have been deleted.
  if not workdir.exists():
    return
  workdir_lib.check(workdir, config.to_dict())
  if arm.start == 'source':
    inputs.check_source(config, workdir, folder.shape)
  inputs.check_table(config, workdir)
  inputs.check_eval_text(inputs.eval_text(config), config, workdir)
  dataset.check_same(workdir / runlog.TEXT, folder.text, config.data.text)
