"""The model of a run -> what an export and an edge report work on."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from effllm_jax import checkpoints
from effllm_jax import corpus
from effllm_jax import dataset
from effllm_jax import digests
from effllm_jax import errors
from effllm_jax import events
from effllm_jax import heldout as heldout_lib
from effllm_jax import model_card
from effllm_jax import runlog
from effllm_jax import selection
from effllm_jax import shrink
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import tables
from effllm_jax import text_folder
from effllm_jax import weights
from effllm_jax import widths

_kept_indices = jax.jit(shrink.kept_indices, static_argnames='cfg')


def tight(
  model: weights.Source, scores: structure.Groups | None = None
) -> weights.Source:
  """Takes dead groups out of a model, as far as the widest layer allows; numpy.

  Survivors of a layer come first, in the order of their scores, if given. A
  layer that has lost both blocks is left out.
  """
  masks = widths.whole(model.masks, model.cfg)
  cfg = shrink.shrunk_config(masks, model.cfg, structure.Groups(1, 1, 1))
  if scores is None:
    scores = jax.tree.map(lambda m: np.zeros(m.shape, np.float32), masks)
  kept = jax.device_get(_kept_indices(masks, scores, cfg=cfg))
  params, origin = jax.device_get((model.params, model.origin))
  params = shrink.take_params(params, kept)
  masks, origin = (
    tree and shrink.take_groups(tree, kept) for tree in (masks, origin)
  )
  layers = widths.occupied(masks)
  take = lambda letters, x: x[layers] if letters[0] == 'N' else x
  masks, origin = (
    tree and jax.tree.map(take, structure.GROUP_AXES, tree)
    for tree in (masks, origin)
  )
  return dataclasses.replace(
    model,
    params=structure.map_axes(take, params),
    masks=masks,
    cfg=dataclasses.replace(cfg, N=len(layers)),
    origin=origin,
  )


def read(
  workdir: str | os.PathLike, event: int | None = None
) -> tuple[weights.Source, model_card.Made]:
  """The model as it was last saved, or right after one shrink.

  What is masked but still in the arrays is taken out, as far as the widest
  layer allows.

  Args:
    workdir: of a run.
    event: the number of a shrink; None: as it was last saved.

  Returns:
    The model, and how it came to be, for its card.

  Raises:
    errors.InputError: there is no such run or event, or it cannot be read.
  """
  workdir = pathlib.Path(workdir)
  params, prune, cfg, step = checkpoints.restore_params(workdir, event)
  first = sources.load_saved(workdir / 'source')
  model = tight(
    dataclasses.replace(
      first,
      params=params,
      masks=prune.masks,
      cfg=cfg,
      origin=events.compose(first.origin, prune.origin),
    ),
    prune.scores,
  )
  run = runlog.read(workdir)
  pruning = {
    'step': step,
    'widths': model.cfg.widths(),
    'events': shrinks(run, step),
    # In the model that the run started from: one that lost both blocks is none.
    'layers': widths.occupied(prune.masks),
    # For every slot, the index of its group in the model that the first run of
    # the family started from; -1 is padding.
    'origin': {
      t: np.where(
        getattr(model.masks, t), getattr(model.origin, t), -1
      ).tolist()
      for t in structure.TYPES
    },
  }
  return model, model_card.Made(
    step=step,
    params=selection.live_params(model.masks, model.cfg),
    pruning=pruning,
    run=run,
  )


def source(
  workdir: str | os.PathLike,
  made: model_card.Made,
  cache: str | os.PathLike,
) -> weights.Source:
  """What a run was made from, to be measured beside its own model.

  Args:
    workdir: of the run.
    made: of `read`.
    cache: as in `sources.load`.

  Raises:
    errors.InputError: as `sources.load`, or another model lies there now.
  """
  flag = f'source in {workdir}/config.json'
  found = sources.load(made.run.config['source'], cache, flag=flag)
  now = sources.record(found)
  if made.new:
    # The run has taken nothing but its shape.
    now |= {'sha256': None, 'saved': None}
  path = pathlib.Path(workdir, 'source', 'source.json')
  sources.check_same(path, now, 'source')
  return tight(found)


def heldout(
  workdir: str | os.PathLike,
  made: model_card.Made,
  model: weights.Source,
  cache: str | os.PathLike,
  tokens: int,
) -> dict[str, heldout_lib.HeldOut]:
  """What a run was scored on, by domain.

  Args:
    workdir: of the run.
    made: of `read`.
    model: of `read`; its tokenizer reads the text.
    cache: as in `corpus.prepare`.
    tokens: at most so many of every domain; 0: all.

  Raises:
    errors.InputError: there is no such text, or another one lies there now.
  """
  # Runs of older versions have no such key.
  own = dict(tables.config(made.run).rows).get('eval.text')
  if own:
    text = text_folder.read(own, 'put the text that the run was scored on back')
    now, then = text.record['digest'], pathlib.Path(workdir, runlog.EVAL_TEXT)
    digests.check_same(then, now, 'eval.text', own)
  else:
    text = training_text(workdir, made, cache)
  return heldout_lib.windows(
    text,
    model.tokenizer,
    model.separator_id,
    seq_len=made.run.config['data']['seq_len'],
    tokens_per_domain=tokens,
  )


def training_text(
  workdir: str | os.PathLike,
  made: model_card.Made,
  cache: str | os.PathLike,
) -> pathlib.Path:
  """The dataset that a run was trained on, of which a part was held out.

  Args:
    workdir: of the run.
    made: of `read`.
    cache: as in `corpus.prepare`.

  Raises:
    errors.InputError: the config names no text, there is no such text, or
      another one lies there now.
  """
  named = dict(tables.config(made.run).rows).get('data.text')
  if named is None:
    raise errors.InputError(
      f'{workdir}/config.json has no data.text, which says what the run was '
      'trained on; restore it'
    )
  remedy = 'put the folder that the run was trained on back'
  text = corpus.prepare(named, cache, remedy)
  dataset.check_same(pathlib.Path(workdir, runlog.TEXT), text, named)
  return text


def shrinks(run: runlog.Run, step: int) -> list[dict[str, Any]]:
  """What pruning.json says of the shrinks of a run up to a step.

  As logged: of a finished run the events themselves may have been deleted.
  """
  return [
    {
      'index': x['event'],
      'step': x['step'],
      'tokens': x['tokens'],
      'widths': x['widths_after'],
    }
    for x in run.shrinks
    if x['step'] <= step
  ]
