"""A finished model -> one folder of files, each opened again before it is kept.

What PyTorch, llama.cpp and onnxruntime make of a file is compared with our own
masked model: `agreement` says how near is near enough.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile

import safetensors

from effllm_jax import agreement
from effllm_jax import errors
from effllm_jax import executorch_export
from effllm_jax import gguf_export
from effllm_jax import hf_export
from effllm_jax import model_card
from effllm_jax import onnx_export
from effllm_jax import selection
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths

_TRACED = {'onnx': onnx_export, 'executorch': executorch_export}
# Format -> what it is. 'hf' and 'hf-trimmed' are both the folder itself.
FORMATS = {
  'hf': 'Hugging Face folder of a stock class, zeros where layers are narrower',
  'hf-trimmed': 'Hugging Face folder as small as the model, with its own class',
  'gguf-f32': 'llama.cpp, float32',
  'gguf-f16': 'llama.cpp, float16',
  'gguf-q8_0': 'llama.cpp, 8.5 bits per weight',
  'gguf-q4_0': 'llama.cpp, 4.5 bits per weight',
  'onnx': 'ONNX with a key/value cache, float32',
  'executorch': 'ExecuTorch (XNNPACK) with a key/value cache, float32',
}


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


def check_formats(formats: Sequence[str]) -> None:
  """Raises InputError where a list of formats makes no sense."""
  unknown = [x for x in formats if x not in FORMATS]
  if unknown or not formats:
    raise errors.InputError(
      f'format {unknown[0] if unknown else ""!r} is not known; set --formats '
      f'to some of {",".join(FORMATS)}'
    )
  if {'hf', 'hf-trimmed'} <= set(formats):
    raise errors.InputError(
      'formats hf and hf-trimmed are one folder each; export them to two --out'
    )


def write(
  model: weights.Source,
  out: str | os.PathLike,
  formats: Sequence[str],
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
    formats: keys of `FORMATS`.
    made: how, for pruning.json and the card.
    pad: stem and ffn are filled up with zeros to multiples of this.
    say: told what is going on.

  Raises:
    errors.InputError: a package is missing, a format cannot hold the model, or
      `out` cannot be written.
    ValueError: the stem or a slot of every layer is dead; shrink first.
    RuntimeError: a runtime computes something else. Nothing is left behind.
  """
  check_formats(formats)
  if pad < 1:
    raise errors.InputError(f'pad {pad} is not at least 1; set --pad')
  masks = widths.whole(model.masks, model.cfg)
  live = {t: getattr(masks, t).sum(-1).max() for t in structure.TYPES}
  # A stock class has no width of 0: one slot stays where all layers lost all.
  if any(max(1, live[t]) < w for t, w in model.cfg.widths().items()):
    raise ValueError('dead groups in the masks: shrink before the export')
  structure.check_shapes(model.params, model.cfg)
  # Without links and dots, so that the rename cannot end up elsewhere.
  out = pathlib.Path(out).expanduser().resolve()
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise errors.InputError(f'{out} exists and is not empty; set another --out')
  if any(x.startswith('hf') for x in formats):
    hf_export.import_transformers()
  notes = _notes(model, masks, pad)
  say('our own answers, to compare with')
  prompt = model.tokenizer.encode(agreement.TEXT).ids
  # Of the model as it is: what is padded must answer like it.
  want = agreement.reference(model.params, masks, model.cfg, prompt)
  params, filled, cfg = widths.padded(model.params, masks, model.cfg, pad)
  padded = dataclasses.replace(model, params=params, masks=filled, cfg=cfg)
  with _one_line(out):
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(
      dir=out.parent, prefix=f'.{out.name}-'
    )
  agreements = {}
  with scratch as tmp, _one_line(out):
    folder = pathlib.Path(tmp) / out.name
    folder.mkdir()
    for name in formats:
      say(f'{name}: {FORMATS[name]}')
      agreements[name] = _format(name, padded, folder, want, notes)
    _about(folder, padded, made, pad)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    live = selection.live_params(filled, cfg)
    report = Report(
      path=out,
      params=live,
      padding=cfg.num_params() - live,
      agreements=agreements,
      notes=notes,
      files=files,
    )
    card = model_card.text(padded, made, report.files, agreements)
    (folder / 'README.md').write_text(card, encoding='utf-8')
    os.replace(folder, out)
  return report


def _format(name, model, folder, want, notes) -> agreement.Agreement | None:
  """Writes and checks one format."""
  if name.startswith('hf'):
    hf_export.write(model, folder, trimmed=name == 'hf-trimmed')
    return hf_export.check(model, folder, want)
  if name in ('onnx', 'executorch'):
    path, to = folder / model_card.FILES[name], _TRACED[name]
    to.write(model, path)
    return to.check(model, path, want)
  kind = name.removeprefix('gguf-')
  path = folder / model_card.FILES[name]
  written = gguf_export.write(model, path, kind)
  if written.fell_back:
    notes.append(
      f'{path.name}: {len(written.fell_back)} tensors, '
      f'{next(iter(written.fell_back))} among them, have rows that are no '
      'multiple of 32 and stay in F16; --pad=64 fills them up'
    )
  checked = gguf_export.check(model, path, kind, want)
  if not checked.runtime:
    notes.append(
      f'{path.name}: every tensor was read back, but llama.cpp was not asked; '
      'pip install -r requirements-edge.txt'
    )
  return checked.agreement


def _notes(model, masks, pad) -> list[str]:
  """What the user should know before any file is written."""
  odd = widths.odd(masks, model.cfg, widths.MULTIPLE)
  if not odd or pad % widths.MULTIPLE == 0:
    return []
  found = '; '.join(f'{t} {", ".join(map(str, v))}' for t, v in odd.items())
  _, filled, cfg = widths.padded(
    model.params, masks, model.cfg, widths.MULTIPLE
  )
  zeros = selection.live_params(filled, cfg) - selection.live_params(
    masks, model.cfg
  )
  return [
    f'widths that are no multiple of {widths.MULTIPLE}: {found}. llama.cpp '
    'prefilled such a model of 61 % of the parameters slower than its dense '
    f'source (196 against 299 tokens/s); --pad={widths.MULTIPLE} adds '
    f'{zeros:,} zeros, and the model stays the same'
  ]


def _about(folder, model, made, pad):
  """pruning.json."""
  about = {
    key: getattr(model, key)
    for key in ('name', 'description', 'licence', 'sha256')
  }
  record = {
    'source': about,
    'layer_widths': widths.of_layers(model.masks),
    'pad': pad,
  } | made.pruning
  (folder / 'pruning.json').write_text(
    json.dumps(record, indent=2) + '\n', encoding='utf-8'
  )


@contextlib.contextmanager
def _one_line(out):
  """A full or read-only disk, told in one line."""
  try:
    yield
  except (OSError, safetensors.SafetensorError) as e:
    reason = getattr(e, 'strerror', None) or e
    raise errors.InputError(
      f'cannot write {out}: {reason}; free some space or set another --out'
    ) from e
