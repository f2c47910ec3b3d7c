"""A model's tokenizer on plain text, and the files of the tokens of a text."""

import hashlib
import json
import os
import pathlib

import numpy as np
import tokenizers

from effllm_jax import atomic
from effllm_jax import dataset
from effllm_jax import documents as documents_lib
from effllm_jax import errors
from effllm_jax import untrusted

# Documents that are tokenised at a time, on all cores, and bytes of them unless
# one alone has more: while it is, a byte takes a hundred bytes of memory.
_CHUNK = 256
_CHUNK_BYTES = 2**22


def encoder(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """A copy that adds, cuts and looks for nothing: all of a text is text."""
  plain = tokenizers.Tokenizer.from_str(_plain(tokenizer))
  # "<|endoftext|>" in a text is text. The JSON does not keep this setting.
  plain.encode_special_tokens = True
  return plain


def digest(tokenizer: tokenizers.Tokenizer) -> str:
  """Of what `encoder` makes of a text, in hexadecimal digits."""
  return hashlib.sha256(_plain(tokenizer).encode()).hexdigest()


def unknown(tokenizer: tokenizers.Tokenizer) -> int | None:
  """The token of all text that has no other; None: there is no such token."""
  model = json.loads(tokenizer.to_str())['model']
  token = model.get('unk_token')
  # One kind of model has its id instead of its name.
  return model.get('unk_id') if token is None else tokenizer.token_to_id(token)


def tokenize(
  data_dir: str | os.PathLike,
  tokenizer: tokenizers.Tokenizer,
  separator_id: int,
) -> dict[str, pathlib.Path]:
  """Tokenises the training text once; returns the token file of each domain.

  A file is a one-dimensional .npy array, uint16 where the ids allow it, else
  uint32: each document after a separator, and a separator at the end. Files
  are keyed by the tokenizer, so that two models can share a dataset. One
  process makes them, a few documents at a time; others wait.

  Args:
    data_dir: folder of `corpus.prepare`.
    tokenizer: its special tokens are not looked for in the text.
    separator_id: token between documents.

  Raises:
    errors.InputError: the folder cannot be written.
  """
  data_dir = pathlib.Path(data_dir)
  key = hashlib.sha256(f'{separator_id} {_plain(tokenizer)}'.encode())
  folder = data_dir / f'tokens-{key.hexdigest()[:16]}'
  domains = dataset.domains(data_dir)
  if not folder.is_dir():
    with atomic.in_turn(data_dir / '.lock'):
      if not folder.is_dir():
        _build(folder, data_dir, domains, encoder(tokenizer), separator_id)
  return {d: _token_file(folder, d, domains) for d in domains}


def read(path: str | os.PathLike) -> np.ndarray:
  """A file of `tokenize`, mapped and not read: processes share its pages.

  Raises:
    errors.InputError: it is missing, too short or something else.
  """
  path = pathlib.Path(path)
  remedy = f'delete the folder {path.parent}, it is made again'
  with untrusted.parsing(f'{path} is not a file of tokens', remedy):
    ids = np.load(path, mmap_mode='r', allow_pickle=False)
    if ids.ndim != 1 or ids.dtype.kind != 'u':
      raise ValueError(f'an array of {ids.dtype}{ids.shape}')
    return ids


def _build(
  folder: pathlib.Path,
  data_dir: pathlib.Path,
  domains: list[str],
  plain: tokenizers.Tokenizer,
  separator_id: int,
) -> None:
  """Writes the folder of the tokens, at once."""
  # Not of their number: there may be gaps, and the separator may be a row of
  # the embedding that no token has.
  largest = max([separator_id, *plain.get_vocab().values()])
  dtype = np.uint16 if largest < 2**16 else np.uint32

  def write(new):
    paths = {domain: _token_file(new, domain, domains) for domain in domains}
    name = dataset.manifest(data_dir)['text']
    every = dataset.passing(data_dir, 'train', f'tokenising {name}')
    for documents in documents_lib.in_blocks(every, _CHUNK, _CHUNK_BYTES):
      texts = [document.text for document in documents]
      pieces = {}
      for document, encoding in zip(
        documents, plain.encode_batch_fast(texts), strict=True
      ):
        ids = np.array([separator_id, *encoding.ids], dtype)
        pieces.setdefault(document.domain, []).append(ids)
      for domain, arrays in pieces.items():
        _append(paths[domain], np.concatenate(arrays))
    for path in paths.values():
      _append(path, np.array([separator_id], dtype))

  remedy = 'free some space, or set --cache'
  with errors.writing(f'tokens to {data_dir}', remedy):
    atomic.once(folder, write)


def _append(path: pathlib.Path, ids: np.ndarray) -> None:
  """Adds to a one-dimensional .npy file, which need not be there."""
  with open(path, 'ab') as file:
    if not file.tell():
      np.save(file, ids)
      return
    file.write(ids.tobytes())
    size = file.tell()
  with open(path, 'r+b') as file:
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    shape = ((size - file.tell()) // ids.itemsize,)
    file.seek(0)
    # As long as the one before: numpy leaves room for the shape to grow.
    header = np.lib.format.header_data_from_array_1_0(ids)
    np.lib.format.write_array_header_1_0(file, header | {'shape': shape})


def _token_file(folder, domain, domains) -> pathlib.Path:
  # By position: a domain of a user's own may not be a file name.
  return folder / f'{domains.index(domain)}.npy'


def _plain(tokenizer: tokenizers.Tokenizer) -> str:
  """The tokenizer's JSON without what would add, cut or re-place tokens.

  A post-processor adds special tokens and trims the offsets of leading spaces.
  """
  parts = json.loads(tokenizer.to_str())
  return json.dumps(
    parts | {'post_processor': None, 'truncation': None, 'padding': None}
  )
