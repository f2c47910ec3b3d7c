import json

import pytest

from effllm_jax import dataset
from effllm_jax import documents as documents_lib
from effllm_jax import errors

SPLITS = {
  'train': [
    documents_lib.Document('law', 'ß/1', 'One.\n\nTwo, ünd\u2028more.'),
    documents_lib.Document('drama', '1', 'A' * 5000),
    documents_lib.Document('law', '0', 'Three.'),
  ],
  'heldout': [documents_lib.Document('law', '2', '語')],
}


@pytest.mark.parametrize('block', [1, 2**18])
def test_what_is_written_is_read_in_its_order(tmp_path, monkeypatch, block):
  monkeypatch.setattr(dataset, '_BLOCK', block)
  dropped = []

  def train():
    yield from SPLITS['train']
    dropped.append('law/3')

  splits = SPLITS | {'train': train()}
  dataset.write(tmp_path, splits, {'text': 'pleas', 'dropped': dropped})
  for split, documents in SPLITS.items():
    assert [*dataset.documents(tmp_path, split)] == documents
    records = dataset.source(tmp_path, split)
    assert [dataset.as_document(record) for record in records] == documents
  assert dataset.domains(tmp_path) == ['drama', 'law']
  manifest = dataset.manifest(tmp_path)
  assert manifest['domains'] == {
    'drama': {'train': {'documents': 1, 'bytes': 5000}},
    'law': {
      'train': {'documents': 2, 'bytes': 29},
      'heldout': {'documents': 1, 'bytes': 3},
    },
  }
  assert manifest['text'] == 'pleas'
  # It is known when the documents have been read.
  assert manifest['dropped'] == ['law/3']


def test_a_digest_is_of_documents_and_their_order(tmp_path):
  def digest(name, splits):
    dataset.write(tmp_path / name, splits, {'text': name})
    return dataset.manifest(tmp_path / name)['digest']

  first = digest('first', SPLITS)
  assert digest('again', SPLITS) == first
  turned = SPLITS | {'train': SPLITS['train'][::-1]}
  swapped = {'train': SPLITS['heldout'], 'heldout': SPLITS['train']}
  others = [digest('turned', turned), digest('swapped', swapped)]
  assert len({first, *others}) == 3


def test_another_text_is_not_gone_on_with(tmp_path):
  built, copy = tmp_path / 'built', tmp_path / 'text.json'
  dataset.write(built, SPLITS, {})
  copy.write_text(json.dumps(dataset.manifest(built)))
  dataset.check_same(copy, built, 'pleas')
  copy.write_text(json.dumps({'digest': 'f' * 64}))
  with pytest.raises(
    errors.InputError, match=r"'pleas' is not .*'ffffffffffff'"
  ):
    dataset.check_same(copy, built, 'pleas')


def test_half_a_dataset_is_none(tmp_path):
  def broken():
    yield SPLITS['train'][0]
    raise ValueError('unreadable')

  with pytest.raises(ValueError, match='unreadable'):
    dataset.write(tmp_path, {'train': broken()}, {})
  assert not dataset.is_built(tmp_path)
  with pytest.raises(errors.InputError, match=r'build one with corpus\.prep'):
    dataset.manifest(tmp_path)
