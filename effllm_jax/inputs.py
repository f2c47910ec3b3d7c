"""What a run reads besides its config, and whether it began with the same."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
from typing import Any

import ml_collections

from effllm_jax import atomic
from effllm_jax import dataset
from effllm_jax import digests
from effllm_jax import errors
from effllm_jax import ngrams
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import text_folder
from effllm_jax import untrusted

# A workdir's copy of the table of a budget.
TABLE = 'budget.json'
# Of a domain that is scored, the share that stands in the training text by
# chance or by quotation.
_MOST_SHARED = 0.01


def check_source(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  source: sources.Source,
) -> None:
  """Checks that `source` is the model that a run was started with.

  Args:
    config: of the run; what never reads the weights may have others.
    workdir: of the run.
    source: the model that lies now where the config says.

  Raises:
    errors.InputError: it has other weights or another shape, or the workdir's
      record of it is missing.
  """
  known = sources.record(source)
  if config.init == 'random' and (
    config.distill.teacher or not config.distill.weight
  ):
    known |= {'sha256': None, 'saved': None}
  path = pathlib.Path(workdir, 'source', 'source.json')
  sources.check_same(path, known, 'source')


def check_table(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> None:
  """Checks that a run's `budget.table` is what it was when the run began.

  Args:
    config: of the run, that of the workdir but for paths.
    workdir: of the run. One from before it kept a copy of its table is known to
      have the same one by its path alone.

  Raises:
    errors.InputError: it is another table.
  """
  path, copy = config.budget.table, pathlib.Path(workdir, TABLE)
  if not path:
    return
  remedy = 'restore it or choose another --workdir'
  if copy.exists():
    then, now = (
      hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()[:12]
      for x in (untrusted.read_json(copy, remedy), table(config))
    )
    changed = f'digest={then!r} there, {now!r} now'
    old = f'the old one back, of which {copy} is a copy'
  else:
    known = untrusted.read_json(copy.with_name('config.json'), remedy)
    then, now = known['budget']['table'], path
    changed = f'it was {then!r}, of which the workdir has no copy'
    old = 'the old one back there'
  if then != now:
    raise errors.InputError(
      f'budget.table {path!r} is not known to be the table that the run was '
      f'started with: {changed}; put {old}, or choose another --workdir'
    )


def eval_text(
  config: ml_collections.ConfigDict,
) -> text_folder.Documents | None:
  """The text of a run's own that it is scored on; None: what is held out.

  Raises:
    errors.InputError: there is no text at `eval.text`, or it is trained on.
  """
  own, text = map(os.path.expanduser, (config.eval.text, config.data.text))
  if not own:
    return None
  found = text_folder.read(config.eval.text, 'set --config.eval.text')
  # Of a named text there is no folder.
  if os.path.isdir(text):
    own, text = os.path.realpath(own), os.path.realpath(text)
    if os.path.commonpath([own, text]) in (own, text):
      raise errors.InputError(
        f'eval.text {config.eval.text!r} and data.text {config.data.text!r} '
        'have files in common, which would be trained on; move them apart'
      )
  next(iter(found))  # Refuses one without a word.
  return found


def check_eval_text(
  text: text_folder.Documents | None,
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
) -> None:
  """Checks that a run's `eval.text` is what it was when the run began.

  Args:
    text: of `eval_text`.
    config: of the run, that of the workdir but for paths.
    workdir: of the run.

  Raises:
    errors.InputError: it is another text, or the workdir's record of it is
      missing.
  """
  if text:
    path = pathlib.Path(workdir, runlog.EVAL_TEXT)
    now = text.record['digest']
    digests.check_same(path, now, 'eval.text', config.eval.text)


def eval_record(
  text: text_folder.Documents, trained: pathlib.Path
) -> dict[str, Any]:
  """What a run keeps of its `eval.text`.

  A domain that the training text has much of is told in a warning: a run looks
  better on it than on a text that it does not know.

  Args:
    text: of `eval_text`.
    trained: folder of `corpus.prepare`.

  Returns:
    What tells it from other texts, and `shared`.

  Raises:
    errors.InputError: as `shared`.
  """
  found = shared(text, trained)
  for domain, share in found.items():
    if share > _MOST_SHARED:
      logging.warning(
        'eval.text: of the runs of %d words of domain %r, %.1f %% stand in the '
        'training text too, so that bits per byte look better than they are; '
        'take them out of either',
        ngrams.N, domain, 100 * share,
      )  # fmt: skip
  return text.record | {'shared': found}


def shared(
  text: text_folder.Documents, trained: pathlib.Path
) -> dict[str, float]:
  """How much of a text is trained on.

  The two are compared once, at some 7 MB of training text a second, by one of
  the processes that share a cache; the others wait.

  Args:
    text: that is to be scored.
    trained: folder of `corpus.prepare`.

  Returns:
    By domain, the share that is in the training split (`ngrams.shared`).

  Raises:
    errors.InputError: a file of the text has changed, or what the cache has of
      it cannot be read.
  """
  path = trained / f'shared-{text.record["digest"][:16]}.json'
  with atomic.in_turn(path.with_suffix('.lock')):
    if path.exists():
      known = untrusted.read_shaped(
        path, {'shared': {str: float}}, 'delete it, it is written again'
      )
    else:
      what = f'looking for {text.label} in the training text'
      documents = dataset.passing(trained, 'train', what)
      known = {'shared': ngrams.shared(text, documents)}
      # A cache that cannot be written is read all the same.
      with contextlib.suppress(OSError):
        atomic.write_json(path, known)
  return known['shared']


def table(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What lies at `budget.table`.

  Raises:
    errors.InputError: it cannot be read, or is no JSON.
  """
  path = pathlib.Path(config.budget.table).expanduser()
  return untrusted.read_json(path, 'set --config.budget.table')
