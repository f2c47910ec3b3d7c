"""lm-eval on our models: its prompts and metrics, our arithmetic.

The only module that imports lm_eval. It is not needed for anything else, and
takes seconds to import: import this module where it is used.

Raises:
  errors.InputError: on import, where lm-eval is not installed.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import logging
import os
import pathlib
from typing import Any

import jax

from effllm_jax import atomic
from effllm_jax import benchmark_items
from effllm_jax import errors
from effllm_jax import hf_export
from effllm_jax import kernels
from effllm_jax import likelihood
from effllm_jax import model as model_lib
from effllm_jax import runlog
from effllm_jax import weights
from effllm_jax import widths

with errors.installed('lm-eval', '-r requirements-eval.txt'):
  # Read on import: nothing goes online, no bars but our own, and no fork of a
  # process with threads of XLA (for the standard error of a perplexity).
  for _name in (
    'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TQDM_DISABLE',
    'DISABLE_MULTIPROC',
  ):  # fmt: skip
    os.environ.setdefault(_name, '1')
  import datasets
  import lm_eval
  from lm_eval import evaluator
  from lm_eval import tasks as lm_eval_tasks
  from lm_eval import utils
  from lm_eval.api import model as lm_eval_model

VERSION = f'lm-eval {lm_eval.__version__}'
_FOLDER = pathlib.Path(lm_eval_tasks.__file__).parent
_MMLU = _FOLDER / 'mmlu' / 'default'
# The file of each task, in which its prompt and its metrics are.
_CONFIGS = {
  'arc_easy': 'arc/arc_easy.yaml',
  'arc_challenge': 'arc/arc_challenge.yaml',
  'boolq': 'super_glue/boolq/default.yaml',
  'hellaswag': 'hellaswag/hellaswag.yaml',
  'openbookqa': 'openbookqa/openbookqa.yaml',
  'piqa': 'piqa/piqa.yaml',
  'winogrande': 'winogrande/default.yaml',
  'lambada_openai': 'lambada/lambada_openai.yaml',
}
# Draws for the standard error of a perplexity; others have a formula.
_DRAWS = 1000


class Model(lm_eval_model.TemplateLM):
  """A model of ours, masks included, that lm-eval can ask.

  A text is tokenized as transformers does for an export of the model, and a
  context that is too long loses its start, as there.
  """

  def __init__(
    self,
    source: weights.Source,
    batch_tokens: int,
    say: Callable[[int, int], None] = lambda done, total: None,
  ):
    """Takes a model with weights; the rest is as in `likelihood.score`."""
    super().__init__()
    self._source, self._batch_tokens, self._say = source, batch_tokens, say
    self._params, self._masks = jax.device_put(
      (source.params, widths.whole(source.masks, source.cfg))
    )

  @property
  def eot_token_id(self) -> int:
    """What ends a text; the model's own end of a turn, if it has one."""
    end = self._source.eos_id
    return self._source.separator_id if end is None else end

  @property
  def prefix_token_id(self) -> int:
    """What stands for an empty context."""
    bos = self._source.bos_id
    return self.eot_token_id if bos is None else bos

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs
  ) -> list[int]:
    """Token ids; with what the tokenizer adds, unless that is False."""
    del kwargs
    special = add_special_tokens is not False
    return self._source.tokenizer.encode(string, add_special_tokens=special).ids

  def loglikelihood(self, requests, disable_tqdm=True):
    """As lm-eval has it, without a bar beside our own."""
    self._tasks = [request.task_name for request in requests]
    return super().loglikelihood(requests, disable_tqdm=True)

  def _loglikelihood_tokens(self, requests, **kwargs):
    del kwargs
    return likelihood.score(
      self._params,
      self._masks,
      self._source.cfg,
      [(context, continuation) for _, context, continuation in requests],
      compute=model_lib.Compute(remat='none', kernels=kernels.resolve(None)),
      batch_tokens=self._batch_tokens,
      tasks=self._tasks,
      say=self._say,
    )

  def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
    """Log-probability of whole texts, nats, in windows as long as the model."""
    del disable_tqdm
    windows, owners, self._tasks = [], [], []
    for i, request in enumerate(requests):
      for pair in utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self._source.cfg.context,
        context_len=1,
      ):
        windows.append((None, *utils.make_disjoint_window(pair)))
        owners.append(i)
        self._tasks.append(request.task_name)
    totals = [0.0] * len(requests)
    found = self._loglikelihood_tokens(windows)
    for i, (nats, _) in zip(owners, found, strict=True):
      totals[i] += nats
    return totals

  def generate_until(self, requests, disable_tqdm=False):
    """Raises InputError: there is no sampling here."""
    raise errors.InputError(
      'this task generates text, which is not offered here; export the model '
      'and run lm-eval on the folder'
    )


def in_transformers(folder: str | os.PathLike) -> lm_eval_model.LM:
  """An exported model, asked by lm-eval's own code: PyTorch, float32, the CPU.

  Args:
    folder: a Hugging Face folder; its own class is run where it has one.

  Raises:
    errors.InputError: it is none, or a package is missing.
  """
  path = pathlib.Path(folder).expanduser()
  if not (path / 'config.json').is_file():
    raise errors.InputError(
      f'{path} is no Hugging Face folder, which PyTorch could open; write one '
      'with experiments.export --formats=hf'
    )
  hf_export.import_transformers()
  with errors.installed(
    "lm-eval's backend for transformers", '-r requirements-torch.txt'
  ):
    from lm_eval.models import huggingface
  try:
    lm = huggingface.HFLM(
      pretrained=str(path), device='cpu', dtype='float32', batch_size=8,
      trust_remote_code=True,
    )  # fmt: skip
  except (OSError, ValueError) as e:
    raise errors.InputError(
      f'transformers cannot open {path}: {e}; write it again with '
      'experiments.export --formats=hf'
    ) from e
  if lm.prefix_token_id is None:
    raise errors.InputError(
      f'the tokenizer of {path} names no token that starts or ends a text; set '
      'bos_token or eos_token in its tokenizer_config.json'
    )
  return lm


@contextlib.contextmanager
def prepared(
  names: Iterable[str], cache: str | os.PathLike
) -> Iterator[lm_eval_tasks.TaskManager]:
  """Benchmarks whose items are files of this machine; the rest is lm-eval's.

  Args:
    names: keys of `benchmark_items.BENCHMARKS`.
    cache: folder of the downloads, and of the items while they are in use.

  Yields:
    What `run` takes.

  Raises:
    errors.InputError: as `benchmark_items.write`, or the cache cannot be
      written.
  """
  cache = pathlib.Path(cache).expanduser()
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  datasets.disable_progress_bars()
  with contextlib.ExitStack() as stack:
    with errors.writing(f'the cache {cache}', 'set --cache'):
      cache.mkdir(parents=True, exist_ok=True)
      folder = stack.enter_context(atomic.scratch(cache))
      for name in names:
        for task, path in benchmark_items.write(name, cache, folder).items():
          config = json.dumps(_config(task, path))
          # JSON is YAML.
          path.with_suffix('.yaml').write_text(config, encoding='utf-8')
    # The later folder wins: of MMLU's own only the groups are left.
    yield lm_eval_tasks.TaskManager(
      include_path=[_MMLU, folder], include_defaults=False
    )


def _config(task, path):
  """Prompt and metrics of lm-eval's own file, items of ours."""
  own = _CONFIGS.get(task, f'mmlu/default/{task}.yaml')
  return {
    'include': str(_FOLDER / own),
    'dataset_path': 'json',
    'dataset_name': None,
    'dataset_kwargs': {
      'data_files': {'test': str(path)},
      'cache_dir': str(path.parent / 'datasets'),
    },
    # There is nothing to learn from, and one split to be asked.
    'training_split': None,
    'validation_split': None,
    'test_split': 'test',
    'fewshot_split': None,
    'num_fewshot': 0,
  }


def run(
  model: lm_eval_model.LM,
  manager: lm_eval_tasks.TaskManager,
  names: Iterable[str],
  limit: int,
) -> list[dict[str, Any]]:
  """Asks a model all items, without examples before them.

  Args:
    model: of any backend.
    manager: of `prepared`.
    names: of tasks and groups.
    limit: the first items of a task, or of a subject of MMLU; 0: all.

  Returns:
    A row for each task and metric: task, metric, items, limit, value, stderr
    (None where one item gives none).
  """
  names = list(names)
  # It prints while it draws for a standard error.
  with contextlib.redirect_stdout(None):
    found = evaluator.evaluate(
      model,
      manager.load(names),
      limit=limit or None,
      bootstrap_iters=_DRAWS,
      log_samples=False,
    )
  rows = []
  for name in names:
    members = [
      x for x in found['n-samples'] if x == name or x.startswith(f'{name}_')
    ]
    for key, value in found['results'][name].items():
      metric, _, kind = key.partition(',')
      stderr = found['results'][name].get(f'{metric}_stderr,{kind}')
      if kind and not metric.endswith('_stderr'):
        rows.append(
          {
            'task': name,
            'metric': metric,
            'items': sum(found['n-samples'][x]['effective'] for x in members),
            'limit': limit,
            'value': float(value),
            # lm-eval says 'N/A', or nothing that is a number.
            'stderr': stderr
            if isinstance(stderr, float) and stderr == stderr
            else None,
          }
        )
  return rows


def added(
  record: Mapping[str, Any], step: int | None, rows: Iterable[dict[str, Any]]
) -> dict[str, Any]:
  """A record of benchmarks with rows of `run`; what they measure anew goes.

  Args:
    record: `runlog.Run.benchmarks`; of another version, whose prompts may be
      others, nothing is taken.
    step: of the model that was asked; None: the source.
    rows: of `run`.
  """
  rows = list(rows)
  if record.get('harness') != VERSION:
    record = {'harness': VERSION, 'rows': []}
  replaced = {(step, x['task'], x['limit']) for x in rows}
  kept = [
    x
    for x in record['rows']
    if (x['step'], x['task'], x['limit']) not in replaced
  ]
  return {**record, 'rows': kept + [{'step': step, **x} for x in rows]}


def keep(
  folder: pathlib.Path, step: int | None, rows: Iterable[dict[str, Any]]
) -> dict[str, Any]:
  """Adds to what a workdir has now, which another command may add to as well.

  Returns:
    The record as it is written.

  Raises:
    errors.InputError: what is there is damaged, or cannot be written.
  """
  path = folder / runlog.BENCHMARKS
  with (
    atomic.locked(path.with_name(f'{path.name}.lock')),
    errors.writing(path),
  ):
    record = added(runlog.benchmarks(folder), step, rows)
    atomic.write_json(path, record)
  return record
