"""README.md of an exported folder: what the model is, and what it was made of.

The front matter is Hugging Face's: licence, task, tags.
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from effllm_jax import agreement
from effllm_jax import amounts
from effllm_jax import environment
from effllm_jax import formats
from effllm_jax import runlog
from effllm_jax import tables
from effllm_jax import weights
from effllm_jax import widths

_USE = {
  'hf': """from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained('.'{trust})
    tokenizer = AutoTokenizer.from_pretrained('.'{trust})""",
  'gguf': 'llama-cli -m {file} -p "Once upon a time"',
  'onnx': """import onnxruntime

    session = onnxruntime.InferenceSession('{file}')""",
  'executorch': """from executorch import runtime

    program = runtime.Runtime.get().load_program('{file}')""",
}
_PRUNED = (
  '{} by pruning-aware pretraining (EfficientLLM, arXiv '
  '2502.06663) with effllm_jax: trained on text, while the least salient '
  'heads, feed-forward channels and channels of the residual stream were taken '
  'out.'
)
_TRAINED = 'Trained on text with effllm_jax, nothing pruned: {}.'
_SAFETY = (
  'Not instruction-tuned again, and not evaluated for safety: what its source '
  'may say, it may say.',
  'Not evaluated for safety.',
)


@dataclasses.dataclass(frozen=True)
class Made:
  """How a model came to be.

  Attributes:
    step: of the run, when the model was as it is.
    params: live parameters, without what an export pads, and without the norms
      of layers that have lost both blocks, which a run's log counts.
    pruning: JSON content of pruning.json.
    run: the record of the run.
  """

  step: int
  params: int
  pruning: dict[str, Any]
  run: runlog.Run

  @property
  def pruned(self) -> bool:
    """Whether anything is gone."""
    return not (self.run.only_trains or self.params == self.run.source_params())

  @property
  def new(self) -> bool:
    """Whether the run began with new weights, in the shape of its source."""
    return self.run.setting('init') == 'random'


def story(model: weights.Source, made: Made) -> tuple[str, str]:
  """What the model may be called, and a sentence on how it came to be."""
  size = amounts.si(made.params)
  if made.pruned:
    begun = 'Trained {}, and pruned' if made.new else 'Pruned from {}'
    name = f'{model.name}, pruned to {size} parameters'
    return name, _PRUNED.format(begun.format(model.description))
  how = 'from scratch' if made.new else 'further'
  name = f'{model.name}, {size} parameters, trained {how}'
  return name, _TRAINED.format(model.description)


def text(
  model: weights.Source,
  made: Made,
  files: Mapping[str, int],
  agreements: Mapping[str, agreement.Agreement | None],
  pad: int = 1,
) -> str:
  """The card; the same inputs give the same bytes.

  Args:
    model: as it is exported.
    made: how it came to be.
    files: name -> bytes.
    agreements: format -> how near its runtime came, None where none was asked.
    pad: its widths are filled up to multiples of this.
  """
  plain = tables.markdown_text
  run = made.run
  name, how = story(model, made)
  parts = [
    _front_matter(model, made, agreements),
    f'# {plain(name)}\n',
    f'{plain(how)} {_SAFETY[made.new]}\n',
    _facts(model, made, pad).markdown(),
    _quality(run, made).markdown(),
    _text(made).markdown(),
    _files(files, agreements).markdown(),
  ]
  measured = {x['step'] for x in run.benchmarks.get('rows', ())}
  if made.step in measured:
    parts.append(tables.benchmarks(run.benchmarks, made.step).markdown())
  if (run.edge.get('step'), run.edge.get('pad')) == (made.step, pad):
    parts.append(tables.edge(run).markdown())
  parts.append(f'## Use\n\n{_use(agreements)}')
  return '\n'.join(parts)


def _front_matter(model, made, names) -> str:
  licence = model.licence or 'unknown'
  lines = [f'license: {licence}'] if _is_word(licence) else ['license: other']
  lines += [
    f'license_{key}: {_quoted(value)}'
    for key, value in (
      ('name', model.licence_name), ('link', model.licence_link),
    )
    if value
  ]  # fmt: skip
  return '\n'.join(
    [
      '---',
      *lines,
      *['library_name: transformers'] * any(x.startswith('hf') for x in names),
      'pipeline_tag: text-generation',
      'tags:',
      *['- pruning'] * made.pruned,
      '- effllm_jax',
      '---',
      '',
    ]
  )


def _is_word(text: str) -> bool:
  return all(c.isalnum() or c in '.-_' for c in text)


def _quoted(text: str) -> str:
  """As YAML reads it, on one line, whatever is in it."""
  return json.dumps(''.join(filter(str.isprintable, text)), ensure_ascii=False)


def _facts(model, made, pad) -> tables.Table:
  run = made.run
  kind, target = run.budget
  # All steps have the same number of tokens.
  last = int(run.train['step'][-1])
  tokens = round(made.step * run.tokens[-1] / last)
  # Of a run that was stopped, the last row is not its end.
  before = made.step < last or not run.finished
  masks = widths.of_layers(model.masks)
  licence = model.licence, model.licence_name, model.licence_link
  span = lambda v: amounts.span([min(v), max(v)])
  filled = f', filled up to multiples of {pad}' if pad > 1 else ''
  settings = dict(tables.config(run).rows)
  # A later start computed nothing that is in this model.
  computed = environment.text(x for x in run.starts if x['step'] < made.step)
  return tables.Table(
    title='Lineage',
    columns=('', ''),
    rows=(
      ('source', f'{model.name}: {model.description}'),
      (
        'its weights, sha256',
        'not used: new ones' if made.new else model.sha256,
      ),
      ('its licence', ', '.join(filter(None, licence)) or 'not stated'),
      (
        'budget',
        'none: training only' if run.only_trains
        else 'not recorded' if target is None
        else f'at most {amounts.costs(kind, target, unit=True)}'
        + ' at the end of the run' * before,
      ),
      ('parameters', f'{made.params:,} of {run.source_params():,}'),
      (
        'training',
        f'{made.step:,}{f" of {last:,}" * (made.step < last)} steps, '
        f'{tokens:,} tokens',
      ),
      ('computed on', computed or 'not recorded'),
      ('saliency', settings.get('prune.saliency', 'not recorded')),
      ('layers', f'{model.cfg.N:,}'),
      ('heads per layer', span(masks['heads'])),
      ('ffn channels per layer', f'{span(masks["ffn"])}{filled}'),
      ('stem width', f'{model.cfg.D:,}{filled}'),
      ('shrink events', f'{len(made.pruning["events"]):,}'),
    ),
  )  # fmt: skip


def _quality(run, made) -> tables.Table:
  """Held-out bits per byte of the source, and of this model if measured."""
  here = [x for x in run.evals if x['step'] == made.step]
  source, here = run.last_eval('source'), here[-1] if here else None
  show = lambda x, domain=None: (
    'not measured'
    if x is None
    else f'{x["domains"][domain] if domain else x["bits_per_byte"]:.4f}'
  )
  domains = sorted({d for x in (source, here) if x for d in x['domains']})
  return tables.Table(
    title='Held-out bits per byte',
    columns=('', 'source', 'this model'),
    rows=(
      ('all text', show(source), show(here)),
      *((d, show(source, d), show(here, d)) for d in domains),
    ),
  )


def _text(made) -> tables.Table:
  """What it was trained on, by domain or by package, with licences."""
  domains = made.run.text.get('domains', {})
  size = lambda d: f'{domains[d]["train"]["bytes"] / 1e6:,.1f} MB'
  licences = {}
  for package in made.run.text.get('packages') or ():
    line = f'{package["name"]} {package["version"]}: {package["licence"]}'
    licences.setdefault(package['domain'], []).append(line)
  rows = tuple(
    (d, size(d), '; '.join(licences.get(d, ['not stated']))) for d in domains
  )
  return tables.Table(
    title='Text',
    columns=('domain', 'training text', 'from, licence'),
    rows=rows or (('not recorded', '', ''),),
  )


def _files(files, agreements) -> tables.Table:
  found = {formats.FORMATS[name].file: x for name, x in agreements.items()}
  cells = lambda x: (
    ('', '', '') if x is None
    else (f'{x.relative:.1e}', f'{x.kl:.1e}', f'{100 * x.top1:.1f}')
  )  # fmt: skip
  return tables.Table(
    title='Files',
    columns=(
      'file', 'size', 'largest difference', 'KL, nats', 'top token equal, %',
    ),
    rows=tuple(
      (name, amounts.size(size), *cells(found.get(name)))
      for name, size in files.items()
    ),
  )  # fmt: skip


def _use(agreements) -> str:
  commands = {}
  for name in agreements:
    kind = name.partition('-')[0]
    trust = ', trust_remote_code=True' if name == 'hf-trimmed' else ''
    file = formats.FORMATS[name].file
    commands.setdefault(kind, _USE[kind].format(file=file, trust=trust))
  return '\n'.join(f'    {x}\n' for x in commands.values())
