"""A run from its config: what it reads and writes, checked, then the loop."""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from effllm_jax import atomic
from effllm_jax import checkpoint_writer
from effllm_jax import checkpoints
from effllm_jax import config_checks
from effllm_jax import console
from effllm_jax import corpus
from effllm_jax import data
from effllm_jax import dataset
from effllm_jax import errors
from effllm_jax import heldout as heldout_lib
from effllm_jax import inputs
from effllm_jax import kernels
from effllm_jax import loop
from effllm_jax import model
from effllm_jax import plan as plan_lib
from effllm_jax import resume
from effllm_jax import runlog
from effllm_jax import sharding
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import teacher as teacher_lib
from effllm_jax import text_folder
from effllm_jax import workdir as workdir_lib

# What a workdir says of a teacher that is not the source.
_TEACHER = 'teacher.json'


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  cache: str | os.PathLike,
  profiled: range = range(0),
) -> None:
  """Trains and prunes until the config's end; resumes what is there.

  Args:
    config: as in `experiments/configs`.
    workdir: everything that the run writes; the same config resumes it.
    cache: downloaded sources and texts, shared by all runs.
    profiled: steps whose trace is written to `<workdir>/profile`, those of them
      that this call runs; no bit of the run depends on it.

  Raises:
    errors.InputError: something that the user can put right.
    interrupts.Stopped: SIGTERM or SIGINT came; everything is saved.
  """
  workdir = pathlib.Path(workdir)
  # Everything that can be refused is checked before anything is written.
  workdir_lib.check(workdir, config.to_dict())
  resume.check_there(workdir)
  begun = checkpoints.any_left(workdir)
  source = sources.load(config.source, cache, params=False)
  if begun:
    inputs.check_source(config, workdir, source)
  mesh = sharding.make(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  plan = plan_lib.make(config, source.cfg, source.masks, mesh)
  if begun:
    inputs.check_table(config, workdir)
  if profiled and profiled[-1] > plan.steps:
    raise errors.InputError(
      f'the run has no step {profiled[-1]} to profile, it ends with '
      f'{plan.steps}; set --profile to steps before that'
    )
  _use_blocks(
    config.model.blocks,
    plan.recipe.compute,
    config_checks.device_tokens(config, mesh),
    config.data.seq_len,
    source.cfg,
  )
  # Before the other text is built, which may take hours.
  evaluated = inputs.eval_text(config)
  if begun:
    inputs.check_eval_text(evaluated, config, workdir)
  text = corpus.prepare(config.data.text, cache)
  if begun:
    dataset.check_same(workdir / runlog.TEXT, text, config.data.text)
  eval_record = None
  if evaluated and not begun:
    eval_record = inputs.eval_record(evaluated, text)
  batches = train_batches(config, text, source, *sharding.reader(mesh))
  heldout = heldout_text(config, evaluated or text, source)
  teacher, named = _teacher(config, workdir, cache, plan, source, begun)
  if config.init == 'random':
    source = dataclasses.replace(
      source, description=f'from scratch, in the shape of {source.description}'
    )
    initial = lambda: _random(source.cfg, config.seed)
  else:
    # Read once and not held on to: the state has its own copy.
    initial = lambda: sources.load(config.source, cache).params
  with _claimed(workdir, config.to_dict()), _told(config):
    if jax.process_index() == 0 and not begun:
      sources.save(source, workdir / 'source')
      atomic.write_json(workdir / runlog.TEXT, dataset.manifest(text))
      if eval_record:
        atomic.write_json(workdir / runlog.EVAL_TEXT, eval_record)
      if named:
        atomic.write_json(workdir / _TEACHER, named)
      if config.budget.table:
        atomic.write_json(workdir / inputs.TABLE, inputs.table(config))
    loop.Loop(
      config, workdir, plan, source, initial, teacher, batches, heldout
    ).train(profiled)


def _teacher(
  config, workdir, cache, plan, source, begun
) -> tuple[teacher_lib.Teacher | None, dict[str, Any] | None]:
  """The teacher of a run, if it has one.

  Returns:
    The teacher, and what tells it from other models, where it is not the
    source.
  """
  if not plan.recipe.distill:
    return None, None
  name, record = config.distill.teacher, None
  model = sources.load(
    name or config.source, cache, flag='--config.distill.teacher'
  )
  if name:
    record = sources.record(model)
    if begun:
      sources.check_same(workdir / _TEACHER, record, 'distill.teacher')
  model = teacher_lib.fitted(model, source, config.data.seq_len)
  return teacher_lib.Teacher(model, plan.recipe), record


@contextlib.contextmanager
def _told(config: ml_collections.ConfigDict) -> Iterator[None]:
  """Tells the user what to do about a full disk or too little memory."""
  try:
    yield
  except OSError as e:
    raise checkpoint_writer.write_error(e) from e
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    if isinstance(e, MemoryError) or 'RESOURCE_EXHAUSTED' in str(e):
      raise errors.InputError(
        f'out of memory with micro-batches of {config.data.batch_size} x '
        f'{config.data.seq_len} tokens ({str(e)[:200]}); lower '
        '--config.data.batch_size and raise --config.train.accumulate, or '
        'set --config.model.remat=full'
      ) from e
    raise


@contextlib.contextmanager
def _claimed(workdir: pathlib.Path, config: dict[str, Any]) -> Iterator[None]:
  """Holds the workdir for this run alone.

  If the first process is refused, all processes stop.

  Raises:
    errors.InputError: as `workdir.claimed`.
  """
  refusal = None
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        stack.enter_context(workdir_lib.claimed(workdir, config))
      except errors.InputError as e:
        refusal = e
    # The others would wait for it for ever.
    if not sharding.of_the_first(refusal is None):
      raise refusal or errors.InputError(
        f'the first process is refused {workdir}; see what it says'
      )
    yield


def train_batches(
  config: ml_collections.ConfigDict,
  text: pathlib.Path,
  source: sources.Source,
  process_index: int = 0,
  process_count: int = 1,
) -> data.TrainIterator:
  """The batches of a run, all micro-batches of an update in one.

  Args:
    config: as in `experiments/configs`.
    text: of `corpus.prepare`.
    source: whose tokenizer reads it.
    process_index, process_count: which rows of every batch.
  """
  return data.train_iterator(
    text,
    source.tokenizer,
    source.separator_id,
    seq_len=config.data.seq_len,
    batch_size=config.train.accumulate * config.data.batch_size,
    seed=config.seed,
    weights=config.data.weights.to_dict(),
    workers=config.data.workers,
    timeout=config.data.timeout,
    recent=config.repair.batches if config.repair.enabled else 1,
    process_index=process_index,
    process_count=process_count,
  )


def heldout_text(
  config: ml_collections.ConfigDict,
  text: text_folder.Documents | pathlib.Path,
  source: sources.Source,
) -> dict[str, heldout_lib.HeldOut]:
  """What a run is evaluated on, by domain.

  Args:
    config: as in `experiments/configs`.
    text: of `inputs.eval_text`, or else of `corpus.prepare`.
    source: whose tokenizer reads it.
  """
  return heldout_lib.windows(
    text,
    source.tokenizer,
    source.separator_id,
    seq_len=config.data.seq_len,
    tokens_per_domain=config.eval.tokens_per_domain,
  )


def _random(cfg: structure.ModelConfig, seed: int) -> structure.Params:
  """New weights on the host, as those of a file would be."""
  return jax.tree.map(np.asarray, model.init(jax.random.key(seed), cfg))


def _use_blocks(
  path: str,
  compute: model.Compute,
  tokens: int,
  seq_len: int,
  cfg: structure.ModelConfig,
) -> None:
  """Has a file's blocks used; says where a run begins without any of them.

  Args:
    path: a file of `experiments.bench_kernels`; '': none.
    compute: of the run.
    tokens: of a micro-batch on one device.
    seq_len: of a text.
    cfg: what the arrays are before the first shrink; narrower ones are other
      products, for which the default blocks hold.
  """
  name, dtype = compute.kernels, compute.dtype
  try:
    kernels.autotune.use(path or None)
  except (OSError, ValueError) as e:
    raise errors.InputError(
      f'model.blocks {path!r} cannot be used: {e}; set --config.model.blocks '
      'to a file of experiments.bench_kernels'
    ) from e
  if not path:
    return
  wanted = {f'{cfg.D} x {cfg.F}': (name, 'nn', tokens, cfg.F, cfg.D)}
  if name in kernels.PLATFORMS:
    wanted[f'attention in texts of {seq_len:,} tokens'] = (
      f'{name}_attention', 'forward', seq_len, seq_len, cfg.H,
    )  # fmt: skip
  missing = [
    what
    for what, key in wanted.items()
    if not kernels.autotune.choice(*key, dtype)
  ]
  used = 'not used'
  if name in ('xla', 'bucket'):
    why = f'model.kernels {name} has no blocks in a model'
  elif missing:
    if len(missing) < len(wanted):
      used = 'used in part'
    shape = 'x'.join(map(str, (cfg.D, cfg.F, cfg.K, cfg.G, cfg.H)))
    why = (
      f'it has no row for {name}, {" or ".join(missing)} in {dtype}, '
      f'{tokens:,} tokens of a micro-batch on one device, and '
      f'{jax.devices()[0].device_kind}; make them with '
      f'experiments.bench_kernels --model={shape} --tokens={tokens} '
      f'--seq_len={seq_len} --dtype={dtype} --tune={path}'
    )
  else:
    return
  said = console.plain(stderr=True, quiet=jax.process_index() > 0)
  said.print(
    f'model.blocks {path} is {used}: {why}', highlight=False, soft_wrap=True
  )
