"""The formats that a model can be exported in, in one table."""

from collections.abc import Sequence
import dataclasses
import pathlib
import types

from effllm_jax import agreement
from effllm_jax import errors
from effllm_jax import executorch_export
from effllm_jax import gguf_export
from effllm_jax import gguf_layout
from effllm_jax import hf_export
from effllm_jax import llama_cpp
from effllm_jax import onnx_export
from effllm_jax import weights


@dataclasses.dataclass(frozen=True)
class Format:
  """A format.

  Attributes:
    file: that holds the weights.
    about: for people.
    runtime: the module of `timing` that a file is measured in; None: none here.
  """

  file: str
  about: str
  runtime: types.ModuleType | None = None


# The two of Hugging Face are both the folder itself.
FORMATS = {
  'hf': Format(
    'model.safetensors',
    'Hugging Face folder of a stock class, zeros where layers are narrower',
  ),
  'hf-trimmed': Format(
    'model.safetensors',
    'Hugging Face folder as small as the model, with its own class',
  ),
  'gguf-f32': Format('model-f32.gguf', 'llama.cpp, float32', llama_cpp),
  'gguf-f16': Format('model-f16.gguf', 'llama.cpp, float16', llama_cpp),
  'gguf-q8_0': Format(
    'model-q8_0.gguf', 'llama.cpp, 8.5 bits per weight', llama_cpp
  ),
  'gguf-q4_0': Format(
    'model-q4_0.gguf',
    'llama.cpp, 4.5 bits per weight, 8.5 in the output matrix',
    llama_cpp,
  ),
  'onnx': Format(
    'model.onnx', 'ONNX with a key/value cache, float32', onnx_export
  ),
  'executorch': Format(
    'model.pte', 'ExecuTorch (XNNPACK) with a key/value cache, float32'
  ),
}


def check_names(names: Sequence[str]) -> None:
  """Raises InputError where a list of formats makes no sense."""
  unknown = [x for x in names if x not in FORMATS]
  if unknown or not names:
    raise errors.InputError(
      f'format {unknown[0] if unknown else ""!r} is not known; set --formats '
      f'to some of {",".join(FORMATS)}'
    )
  if {'hf', 'hf-trimmed'} <= set(names):
    raise errors.InputError(
      'formats hf and hf-trimmed are one folder each; export them to two --out'
    )


def check_runtimes(names: Sequence[str]) -> None:
  """Raises InputError where a format has no runtime, or it is not installed."""
  for name in names or ['']:
    if name not in FORMATS or FORMATS[name].runtime is None:
      known = ','.join(x for x, f in FORMATS.items() if f.runtime)
      raise errors.InputError(
        f'format {name!r} has no runtime here; set --formats to some of {known}'
      )
  for name in names:
    FORMATS[name].runtime.require()


def check_model(model: weights.Source, names: Sequence[str]) -> None:
  """Raises InputError where a format is known not to hold a model."""
  if any(name.startswith('gguf') for name in names):
    gguf_layout.check(model)


def check_packages(names: Sequence[str]) -> None:
  """Raises InputError where a package that writes or checks one is missing.

  Without llama.cpp a GGUF file is read back only; see `check`.
  """
  if any(name.startswith('hf') for name in names):
    hf_export.import_transformers()
  if 'onnx' in names:
    onnx_export.require()
  if 'executorch' in names:
    executorch_export.require()


def write(model: weights.Source, name: str, folder: pathlib.Path) -> list[str]:
  """Writes one format into a folder.

  Returns:
    What the user should know of the file, a line each.

  Raises:
    errors.InputError: a package is missing, the format cannot hold the model,
      or the file cannot be written.
  """
  path = folder / FORMATS[name].file
  if name.startswith('hf'):
    hf_export.write(model, folder, trimmed=name == 'hf-trimmed')
  elif name == 'onnx':
    onnx_export.write(model, path)
  elif name == 'executorch':
    executorch_export.write(model, path)
    context, chunk = executorch_export.limits(model)
    return [
      f'{path.name}: takes texts of at most {context:,} tokens, of which a '
      f'call reads at most {chunk:,}; read a longer prompt in pieces'
    ]
  else:
    return _notes(
      path.name, gguf_export.write(model, path, name.removeprefix('gguf-'))
    )
  return []


def check(
  model: weights.Source,
  name: str,
  folder: pathlib.Path,
  want: agreement.Reference,
) -> agreement.Agreement | None:
  """Compares what a runtime makes of one format with the model.

  Args:
    model: as given to `write`.
    name: of the format.
    folder: as given to `write`.
    want: our answers.

  Returns:
    How near it is; None for a GGUF file where llama.cpp is not installed, which
    is read back only.

  Raises:
    RuntimeError: it is further away than the format allows.
  """
  path = folder / FORMATS[name].file
  if name.startswith('hf'):
    return hf_export.check(model, folder, want)
  if name == 'onnx':
    return onnx_export.check(path, want)
  if name == 'executorch':
    return executorch_export.check(model, path, want)
  kind = name.removeprefix('gguf-')
  gguf_export.read_back(model, path, kind)
  if not llama_cpp.available():
    return None
  return gguf_export.check(model, path, kind, want)


def _notes(file, written) -> list[str]:
  """What of a GGUF file is not as one would expect."""
  notes = []
  if written.fell_back:
    # Of all rows only those of the output of attention are no stem or ffn.
    padded = any('attn_output' not in x for x in written.fell_back)
    notes.append(
      f'{file}: {len(written.fell_back)} tensors, '
      f'{written.fell_back[0]} among them, have rows that are no '
      'multiple of 32 and stay in F16'
      + ('; --pad=64 fills up those of stem and ffn' if padded else '')
    )
  if written.padding:
    notes.append(
      f'{file}: {written.padding:,} zeros fill narrower layers up; llama.cpp '
      'has no layers of different widths with norms of q and k'
    )
  if written.homeless_ends:
    notes.append(
      f'{file}: llama.cpp does not end a generation at '
      f'{", ".join(written.homeless_ends)}, a file has places for three ids; '
      'give it as a stop string'
    )
  return notes
