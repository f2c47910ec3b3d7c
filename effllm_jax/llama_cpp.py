"""llama.cpp on this machine: what it answers, and how fast it is.

The library is the one inside the xllamacpp wheel, called through its C
interface: its own Python interface is that of a server, which gives the
log-probabilities of one position per request and no times of its own.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import ctypes
import os

import numpy as np

from effllm_jax import errors

try:
  import xllamacpp
except ImportError:
  xllamacpp = None

_F16, _F32 = 1, 0  # Values of `enum ggml_type`.
_ERROR = 4  # Of `enum ggml_log_level`.


def available() -> str | None:
  """Name and version of the runtime, or None where it is not installed."""
  return xllamacpp and f'xllamacpp {xllamacpp.__version__}'


def require() -> None:
  """Raises InputError where the runtime is not installed."""
  if not available():
    raise errors.InputError(
      'llama.cpp is not installed; pip install -r requirements-edge.txt'
    )


def tokenize(path: str | os.PathLike, text: str) -> list[int]:
  """Token ids of a text, special tokens in it and the leading one included."""
  with _opened(path) as (lib, model):
    raw = text.encode()
    # At most one token per byte, and those at both ends.
    ids = (ctypes.c_int32 * (len(raw) + 2))()
    vocab = lib.llama_model_get_vocab(model)
    n = lib.llama_tokenize(vocab, raw, len(raw), ids, len(ids), True, True)
    return list(ids[:n])


def logits(
  path: str | os.PathLike, sequences: Iterable[list[int]]
) -> Iterator[np.ndarray]:
  """Yields float32 [T, V] for each sequence, read with an empty cache.

  Raises:
    errors.InputError: no runtime, or one that cannot open the file.
  """
  with _opened(path) as (lib, model):
    for tokens in sequences:
      yield _logits_of(lib, model, tokens)


def _logits_of(lib, model, tokens):
  with _context(lib, model, len(tokens)) as ctx:
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    try:
      batch.n_tokens = len(tokens)
      for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = True
      _decode(lib, ctx, batch)
      return np.stack([_logits(lib, model, ctx, i) for i in range(len(tokens))])
    finally:
      lib.llama_batch_free(batch)


@contextlib.contextmanager
def reading(
  path: str | os.PathLike, tokens: int
) -> Iterator[Callable[[list[int]], np.ndarray]]:
  """A function that goes on with tokens and returns the last logits, [V].

  Args:
    path: of the file.
    tokens: most that the cache must hold.
  """
  with _opened(path) as (lib, model), _context(lib, model, tokens) as ctx:

    def read(new):
      _read(lib, ctx, new)
      return _logits(lib, model, ctx, -1)

    yield read


@contextlib.contextmanager
def opened(
  path: str | os.PathLike, threads: int, tokens: int
) -> Iterator['_Decoder']:
  """A runtime of `timing` for so many tokens."""
  with (
    _opened(path) as (lib, model),
    _context(lib, model, tokens, False) as ctx,
  ):
    lib.llama_set_n_threads(ctx, threads, threads)
    yield _Decoder(lib, model, ctx)


class _Decoder:
  """See `opened`."""

  def __init__(self, lib, model, ctx):
    self._lib, self._ctx = lib, ctx
    self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

  def clear(self):
    self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), True)

  def read(self, tokens):
    _read(self._lib, self._ctx, tokens)


class _Params(ctypes.Structure):
  """Any struct of parameters that the library passes by value.

  They grow from version to version. A larger one is passed in the same way
  under the calling conventions of 64-bit x86 and ARM, so their size need not be
  known, and defaults are used except where stated.
  """

  _fields_ = (('words', ctypes.c_int32 * 256),)


class _Batch(ctypes.Structure):
  _fields_ = (
    ('n_tokens', ctypes.c_int32),
    ('token', ctypes.POINTER(ctypes.c_int32)),
    ('embd', ctypes.POINTER(ctypes.c_float)),
    ('pos', ctypes.POINTER(ctypes.c_int32)),
    ('n_seq_id', ctypes.POINTER(ctypes.c_int32)),
    ('seq_id', ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
    ('logits', ctypes.POINTER(ctypes.c_int8)),
  )


_POINTER, _INT, _BOOL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
_IDS = ctypes.POINTER(_INT)
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)
# Function -> type of its result and of its arguments.
_FUNCTIONS = {
  'llama_backend_init': (None,),
  'llama_log_set': (None, _LOG, _POINTER),
  'llama_model_default_params': (_Params,),
  'llama_context_default_params': (_Params,),
  'llama_model_load_from_file': (_POINTER, ctypes.c_char_p, _Params),
  'llama_model_free': (None, _POINTER),
  'llama_init_from_model': (_POINTER, _POINTER, _Params),
  'llama_free': (None, _POINTER),
  'llama_set_n_threads': (None, _POINTER, _INT, _INT),
  'llama_get_memory': (_POINTER, _POINTER),
  'llama_memory_clear': (None, _POINTER, _BOOL),
  'llama_model_get_vocab': (_POINTER, _POINTER),
  'llama_vocab_n_tokens': (_INT, _POINTER),
  'llama_tokenize': (
    _INT, _POINTER, ctypes.c_char_p, _INT, _IDS, _INT, _BOOL, _BOOL,
  ),
  'llama_batch_init': (_Batch, _INT, _INT, _INT),
  'llama_batch_get_one': (_Batch, _IDS, _INT),
  'llama_batch_free': (None, _Batch),
  'llama_decode': (_INT, _POINTER, _Batch),
  'llama_synchronize': (None, _POINTER),
  'llama_get_logits_ith': (ctypes.POINTER(ctypes.c_float), _POINTER, _INT),
}  # fmt: skip
_complaints = []


@_LOG
def _log(level, text, _):
  """Keeps what goes wrong and is silent about the rest."""
  if level == _ERROR:
    _complaints.append(text.decode(errors='replace').strip())


def _library():
  """The C functions of llama.cpp."""
  require()
  lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
  for name, (result, *arguments) in _FUNCTIONS.items():
    try:
      function = getattr(lib, name)
    except AttributeError as e:
      raise errors.InputError(
        f'{available()} does not give access to {name}; install the version '
        'in requirements-edge.txt'
      ) from e
    function.restype, function.argtypes = result, arguments
  lib.llama_log_set(_log, None)
  lib.llama_backend_init()
  return lib


@contextlib.contextmanager
def _opened(path):
  """The library and a model in it."""
  lib = _library()
  _complaints.clear()
  model = lib.llama_model_load_from_file(
    os.fsencode(path), lib.llama_model_default_params()
  )
  if not model:
    raise errors.InputError(
      f'llama.cpp cannot open {path} ({_why()}); export it again'
    )
  try:
    yield lib, model
  finally:
    lib.llama_model_free(model)


@contextlib.contextmanager
def _context(lib, model, tokens, exact=True):
  """An empty cache for so many tokens.

  With `exact`, in single precision and without flash attention: the latter
  costs three digits of a log-probability (1e-3 instead of 3e-6, relative).
  """
  params = lib.llama_context_default_params()
  words = params.words
  words[0] = words[1] = tokens  # Of the context, of one batch.
  if exact:
    # RoPE scaling, pooling, attention, flash attention: as the model says.
    words[_place(words, [-1] * 4) + 3] = 0
    # Types of the cached k and v, between two null pointers and two.
    at = _place(words, [0] * 4 + [_F16] * 2 + [0] * 4) + 4
    words[at] = words[at + 1] = _F32
  ctx = lib.llama_init_from_model(model, params)
  if not ctx:
    raise errors.InputError(
      f'llama.cpp has no context for {tokens} tokens ({_why()}); ask for fewer'
    )
  try:
    yield ctx
  finally:
    lib.llama_free(ctx)


def _place(words, sought):
  """Where defaults stand among the parameters, which is a matter of version."""
  size = len(sought)
  found = [i for i in range(64) if words[i : i + size] == sought]
  if len(found) != 1:
    raise errors.InputError(
      f'{available()} has parameters that are laid out otherwise; install the '
      'version in requirements-edge.txt'
    )
  return found[0]


def _why():
  """What llama.cpp complained of first, in one line."""
  return ' '.join((_complaints or ['it does not say why'])[0].split())


def _read(lib, ctx, tokens):
  """Goes on with tokens; logits are there for the last of them."""
  ids = (ctypes.c_int32 * len(tokens))(*tokens)
  _decode(lib, ctx, lib.llama_batch_get_one(ids, len(tokens)))
  lib.llama_synchronize(ctx)


def _decode(lib, ctx, batch):
  status = lib.llama_decode(ctx, batch)
  if status:
    raise RuntimeError(f'llama.cpp failed with status {status} ({_why()})')


def _logits(lib, model, ctx, i):
  """Float32 [V], a copy."""
  size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
  return np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, i), (size,)).copy()
