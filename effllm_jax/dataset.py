"""A text as a TFDS dataset: ArrayRecord files and a manifest.

Written and read without TensorFlow.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import hashlib
import json
import os
import pathlib

import tensorflow_datasets as tfds

from effllm_jax import console
from effllm_jax import digests
from effllm_jax import documents as documents_lib
from effllm_jax import errors
from effllm_jax import untrusted

Document = documents_lib.Document

_MANIFEST = 'manifest.json'
_NAME, _VERSION = 'text', tfds.core.Version('1.0.0')
# Documents of a file.
_SHARD = 2**18
# Bytes of text that are read at a time, or about as many.
_BLOCK = 2**18


def write(
  folder: pathlib.Path, splits: dict[str, Iterable[Document]], notes: dict
) -> None:
  """Writes the records, and then the manifest of a dataset.

  One after another: TFDS's builder sorts them, in memory or, from 1 GB on, with
  TensorFlow, which is not installed.

  Args:
    folder: an empty one, or one to be made.
    splits: documents by split, in the order in which they are to be read.
    notes: what more the manifest is to say. Read when the documents have been
      written: what was dropped is known then.

  Raises:
    OSError: the folder cannot be written.
  """
  place = _records(folder)
  place.mkdir(parents=True)
  identity = tfds.core.DatasetIdentity(
    name=_NAME, version=_VERSION, data_dir=str(place), module_name=__name__
  )
  features = {name: tfds.features.Text() for name in Document._fields}
  info = tfds.core.DatasetInfo(
    builder=identity, features=tfds.features.FeaturesDict(features)
  )
  writer = tfds.core.SequentialWriter(
    info, _SHARD, file_format=tfds.core.FileFormat.ARRAY_RECORD
  )
  try:
    writer.initialize_splits([*splits])
    for split, found in splits.items():
      for block in documents_lib.in_blocks(found, 4096, 2**22):
        writer.add_examples({split: [document._asdict() for document in block]})
    writer.close_all()
  except RuntimeError as e:  # So ArrayRecord says that a disk is full.
    raise OSError(str(e).splitlines()[0]) from e
  counts, content = {}, hashlib.sha256()
  for split in splits:
    for row in documents(folder, split):
      content.update(json.dumps([split, *row]).encode())
      of_domain = counts.setdefault(row.domain, {}).setdefault(
        split, {'documents': 0, 'bytes': 0}
      )
      of_domain['documents'] += 1
      of_domain['bytes'] += row.size
  by_domain = dict(sorted(counts.items()))
  facts = {'digest': content.hexdigest(), 'domains': by_domain, **notes}
  (folder / _MANIFEST).write_text(
    json.dumps(facts, indent=2, ensure_ascii=False) + '\n', encoding='utf-8'
  )


def is_built(folder: pathlib.Path) -> bool:
  """Whether there is a whole dataset: its manifest is written last."""
  return (folder / _MANIFEST).is_file()


def manifest(data_dir: str | os.PathLike) -> dict:
  """What a built dataset holds and where it comes from.

  `digest` names its exact content; two builds of the same text share it.

  Raises:
    errors.InputError: there is no dataset, or its manifest cannot be read.
  """
  folder = pathlib.Path(data_dir)
  if not is_built(folder):
    raise errors.InputError(
      f'{data_dir} is not a dataset of this project; build one with '
      'corpus.prepare'
    )
  return untrusted.read_json(
    folder / _MANIFEST, 'delete the folder, it is built again'
  )


def check_same(path: pathlib.Path, data_dir: pathlib.Path, text: str) -> None:
  """Checks that a dataset is of the text that a run was started with.

  Args:
    path: of the run's copy of its manifest.
    data_dir: folder of `corpus.prepare`, of what lies where the config says.
    text: what the config says.

  Raises:
    errors.InputError: it is another text, or the record is missing.
  """
  digests.check_same(path, manifest(data_dir)['digest'], 'data.text', text)


def domains(data_dir: str | os.PathLike) -> list[str]:
  """Names of the domains, sorted."""
  return list(manifest(data_dir)['domains'])


def source(data_dir: str | os.PathLike, split: str):
  """Random access to the records of a split, through TFDS."""
  builder = tfds.builder_from_directory(_records(data_dir))
  return builder.as_data_source(split=split)


def _records(data_dir: str | os.PathLike) -> pathlib.Path:
  """Where TFDS has the records of a dataset."""
  return pathlib.Path(data_dir, _NAME, str(_VERSION))


def documents(data_dir: str | os.PathLike, split: str) -> Iterator[Document]:
  """All documents of a split in their order, of which some are in memory."""
  records = source(data_dir, split)
  start, count = 0, 1
  while start < len(records):
    # Read one by one they take five times as long.
    stop = min(start + count, len(records))
    block = records.__getitems__([*range(start, stop)])
    yield from map(as_document, block)
    size = sum(len(record['text']) for record in block)
    start, count = stop, min(2 * count, 256) if size < _BLOCK else 1


def passing(
  data_dir: str | os.PathLike, split: str, what: str
) -> Iterator[Document]:
  """As `documents`; shows how many bytes have gone by.

  Args:
    data_dir, split: of `documents`.
    what: is done with them: 'reading tales'.
  """
  sizes = manifest(data_dir)['domains'].values()
  return console.passing(
    what,
    documents(data_dir, split),
    lambda document: document.size,
    sum(domain[split]['bytes'] for domain in sizes),
  )


def as_document(record: dict[str, bytes]) -> Document:
  """A record as TFDS gives it, which is in bytes."""
  return Document(**{name: record[name].decode() for name in Document._fields})
