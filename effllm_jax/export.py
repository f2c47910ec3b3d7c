"""A finished model -> one folder of files, each opened again before it is kept.

What PyTorch, llama.cpp and onnxruntime make of a file is compared with our own
masked model: `agreement` says how near is near enough.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib

from effllm_jax import agreement
from effllm_jax import atomic
from effllm_jax import errors
from effllm_jax import formats
from effllm_jax import licences
from effllm_jax import model_card
from effllm_jax import selection
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths


@dataclasses.dataclass(frozen=True)
class Report:
  """What an export wrote.

  Attributes:
    path: of the folder.
    params: parameters of the model; live ones only.
    padding: zeros that a Hugging Face folder of a stock class has beside them.
    agreements: format -> how near its runtime came, None where none was asked
      (a GGUF file without llama.cpp, whose tensors were read back instead).
    notes: what the user should know, a line each.
    files: name -> bytes.
  """

  path: pathlib.Path
  params: int
  padding: int
  agreements: dict[str, agreement.Agreement | None]
  notes: list[str]
  files: dict[str, int]


def write(
  model: weights.Source,
  out: str | os.PathLike,
  names: Sequence[str],
  made: model_card.Made,
  pad: int = 1,
  say: Callable[[str], None] = lambda line: None,
) -> Report:
  """Writes a folder that holds a model in several formats.

  Besides the formats: pruning.json, what the model is made from, and README.md,
  its card. All of it is written beside `out` and renamed to `out` when every
  format has passed its check.

  Args:
    model: params float32, as small as the widest layer allows; the stem is
      alive; heads and ffn may be dead where the arrays of a narrower layer are
      wider than it, also all of a layer.
    out: folder that does not exist yet, or is empty.
    names: of `formats.FORMATS`.
    made: how, for pruning.json and the card.
    pad: stem and ffn are filled up with zeros to multiples of this.
    say: told what is going on.

  Raises:
    errors.InputError: a package is missing, a format cannot hold the model, or
      `out` cannot be written.
    ValueError: the stem or a slot of every layer is dead; shrink first.
    RuntimeError: a runtime computes something else. Nothing is left behind.
  """
  formats.check_names(names)
  widths.check_multiple(pad, model.cfg)
  masks = widths.whole(model.masks, model.cfg)
  # A stock class has no width of 0: one slot stays where all layers lost all.
  if any(
    max(1, getattr(masks, t).sum(-1).max()) < width
    for t, width in model.cfg.widths().items()
  ):
    raise ValueError('dead groups in the masks: shrink before the export')
  structure.check_shapes(model.params, model.cfg)
  # Without links and dots, so that the rename cannot end up elsewhere.
  out = pathlib.Path(out).expanduser().resolve()
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise errors.InputError(f'{out} exists and is not empty; set another --out')
  # Before the minute that the rest takes.
  formats.check_model(model, names)
  formats.check_packages(names)
  notes = _licence_notes(model) + _width_notes(model, masks, pad)
  # Of the model as it is: what is padded must answer like it, and its zeros are
  # no parameters.
  want = agreement.answers(model)
  live = selection.live_params(masks, model.cfg)
  layer_widths = widths.of_layers(masks)
  if pad > 1:
    params, masks, cfg = widths.padded(model.params, masks, model.cfg, pad)
    model = dataclasses.replace(model, params=params, cfg=cfg)
  model = dataclasses.replace(model, masks=masks)
  # A file that holds a name and a description has those of this model.
  name, how = model_card.story(model, made)
  named = dataclasses.replace(model, name=name, description=how)
  with errors.writing(out):
    out.parent.mkdir(parents=True, exist_ok=True)
  agreements = {}
  with errors.writing(out), atomic.scratch(out.parent) as scratch:
    folder = scratch / out.name
    folder.mkdir()
    for name in names:
      say(f'{name}: {formats.FORMATS[name].about}')
      notes += formats.write(named, name, folder)
      agreements[name] = formats.check(named, name, folder, want)
      if agreements[name] is None:
        notes.append(
          f'{formats.FORMATS[name].file}: every tensor was read back, but '
          'llama.cpp was not asked; pip install -r requirements-edge.txt'
        )
    licences.write(model.licence_files, folder)
    _write_pruning(folder, model, layer_widths, made, pad)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    card = model_card.text(model, made, files, agreements, pad)
    (folder / 'README.md').write_text(card, encoding='utf-8')
    os.replace(folder, out)
  return Report(
    path=out,
    params=live,
    padding=model.cfg.num_params() - live,
    agreements=agreements,
    notes=notes,
    files=files,
  )


def _licence_notes(model) -> list[str]:
  """That the text of a licence is beside the source only, where it is."""
  link = model.licence_link
  if not link or '://' in link or link in model.licence_files:
    return []
  return [
    f'the card names {link} as the licence of {model.name}: a file beside its '
    'weights, and none of the export; copy it into the folder'
  ]


def _width_notes(model, masks, pad) -> list[str]:
  """That odd widths are slow, and what would fill them up."""
  odd = widths.odd(masks, model.cfg, widths.MULTIPLE)
  if not odd or pad % widths.MULTIPLE == 0:
    return []
  found = '; '.join(f'{t} {", ".join(map(str, v))}' for t, v in odd.items())
  padded, cfg = widths.padded_shape(masks, model.cfg, widths.MULTIPLE)
  zeros = selection.live_params(padded, cfg) - selection.live_params(
    masks, model.cfg
  )
  return [
    f'widths that are no multiple of {widths.MULTIPLE}: {found}. llama.cpp '
    'prefilled such a model of 61 % of the parameters slower than its dense '
    f'source (196 against 299 tokens/s); --pad={widths.MULTIPLE} adds '
    f'{zeros:,} zeros, and the model stays the same'
  ]


def _write_pruning(folder, model, layer_widths, made, pad):
  """Writes pruning.json: what the model is made from."""
  about = {
    key: getattr(model, key)
    for key in ('name', 'description', 'licence', 'sha256')
  }
  record = {
    'source': about,
    'layer_widths': layer_widths,
    'pad': pad,
  } | made.pruning
  (folder / 'pruning.json').write_text(
    json.dumps(record, indent=2) + '\n', encoding='utf-8'
  )
