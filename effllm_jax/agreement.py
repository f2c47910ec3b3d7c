"""How far a runtime may be from our own logits, and how far it is."""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from effllm_jax import model as model_lib
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths

NEW_TOKENS = 32
# Digits, capitals, punctuation and runs of white space on purpose: it also
# compares the tokenizers.
TEXT = """The lighthouse at Skerryvore was first lit in 1844. It stands on a
reef some 12 miles (19 km) south-west of Tiree, and took 150 men six summers:
"two of blasting, four of building." Its 4,308 tons of granite    were cut on
the island of Mull \u2013 each block fitted by hand before it was shipped."""
# What rules of splitting words differ in; composed, since llama.cpp does not
# normalise.
_NASTY = (
  "I'LL don't we've x=1,000.50;y=3e-10 0x1F\r\n\r\n\t\t  def f(x):\n    return "
  'x**2  # ½ ² Ⅳ naïve 日本語 🤷🏽   '
)


@dataclasses.dataclass(frozen=True)
class Level:
  """What is asked of a format.

  Attributes:
    relative: largest difference of a log-probability, as a share of the largest
      logit.
    kl: mean divergence of its distributions from ours, nats per token.
    top1: share of tokens after which the most likely one is the same.
    greedy: whether its greedy continuation, through its cache, is ours.
  """

  relative: float = float('inf')
  kl: float = float('inf')
  top1: float = 0.0
  greedy: bool = False


# Runtimes round activations of 8-bit products too, so greedy tokens part ways
# there. A model in 4 bits is compared with its own dequantised weights: what
# the rounding of the weights costs is measured in bits per byte.
LEVELS = {
  'f32': Level(relative=1e-4, greedy=True),
  'f16': Level(kl=1e-3, top1=0.98),
  'q8_0': Level(kl=0.02, top1=0.9),
  'q4_0': Level(kl=0.02, top1=0.9),
}


@dataclasses.dataclass(frozen=True)
class Reference:
  """A text, and our own model to be asked about it.

  Attributes:
    prompt: token ids of the text.
    logits: float32 [T, V] after each of T token ids, in one plain pass.
  """

  prompt: list[int]
  logits: Callable[[list[int]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How near a runtime came; the fields of `Level`, measured."""

  relative: float
  kl: float
  top1: float
  greedy: bool


def reference(
  params: structure.Params,
  masks: structure.Groups | None,
  cfg: structure.ModelConfig,
  prompt: list[int],
) -> Reference:
  """The masked model in float32, to be asked about a prompt."""
  masks = widths.whole(masks, cfg)

  def logits(tokens):
    tokens_BT = jnp.asarray([tokens], jnp.int32)
    return np.asarray(_forward(params, masks, tokens_BT, cfg)[0])

  return Reference(list(prompt), logits)


@functools.partial(jax.jit, static_argnames='cfg')
def _forward(params, masks, tokens_BT, cfg):
  """Logits [B, T, V]."""
  compute = model_lib.Compute(remat='none')
  # What a TPU or a GPU rounds float32 to by default is coarser than `LEVELS`.
  with jax.default_matmul_precision('highest'):
    return model_lib.forward(params, masks, tokens_BT, cfg, compute)[0]


def hard_text(model: weights.Source) -> str:
  """A text in which tokenizers would differ, ends of a text included."""
  # An id may be a row of the embedding that no token has.
  ends = [model.tokenizer.id_to_token(i) or '' for i in model.eos_ids]
  return TEXT + _NASTY + ''.join(ends)


def answers(model: weights.Source) -> Reference:
  """`reference` of a model and `TEXT`, as much of it as its context holds."""
  prompt = model.tokenizer.encode(TEXT).ids
  return reference(
    model.params,
    model.masks,
    model.cfg,
    prompt[: max(model.cfg.context - NEW_TOKENS, 1)],
  )


def greedy(
  read: Callable[[list[int]], np.ndarray], prompt: list[int]
) -> list[int]:
  """The `NEW_TOKENS` most likely tokens after a prompt, one by one.

  Args:
    read: goes on with tokens and returns the logits after the last one, [V].
    prompt: token ids.
  """
  found, new = [], prompt
  for _ in range(NEW_TOKENS):
    new = [int(read(new).argmax())]
    found += new
  return found


def compare(
  want: Reference, have_TV: np.ndarray, continuation: list[int]
) -> Agreement:
  """Measures a runtime against the reference.

  Its continuation is ours if each of its tokens is our most likely one after
  those before it, which one pass of ours over all of them tells. To make our
  own takes one for each, 0.6 s with SmolLM2-135M on 2 cores.

  Args:
    want: our model and the prompt.
    have_TV: its logits or log-probabilities after every token of prompt and
      continuation.
    continuation: its own `NEW_TOKENS` greedy tokens after the prompt.
  """
  logits_TV = want.logits([*want.prompt, *continuation])
  # In float32 the rounding of a divergence below 1e-7 would leave its sign.
  ours, theirs = (
    special.log_softmax(np.asarray(x, np.float64), axis=-1)
    for x in (logits_TV, have_TV)
  )
  likely = logits_TV[len(want.prompt) - 1 : -1].argmax(-1).tolist()
  return Agreement(
    relative=float(np.abs(ours - theirs).max() / np.abs(logits_TV).max()),
    kl=float((np.exp(ours) * (ours - theirs)).sum(-1).mean()),
    top1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    greedy=len(continuation) == NEW_TOKENS and continuation == likely,
  )


def check(found: Agreement, level: Level, what: str) -> None:
  """Raises RuntimeError, naming `what`, where a format is further away."""
  # Written so that a NaN is refused as well.
  for name, value, bound, ok in (
    ('log-probability, relative', found.relative, level.relative,
     found.relative <= level.relative),
    ('KL divergence', found.kl, level.kl, found.kl <= level.kl),
    ('share of equal top tokens', found.top1, level.top1,
     found.top1 >= level.top1),
    ('greedy tokens', found.greedy, True, found.greedy or not level.greedy),
  ):  # fmt: skip
    if not ok:
      raise RuntimeError(
        f'{what} differs from the model: {name} {value:.3g}, asked for '
        f'{bound:.3g}; the export is not kept'
      )
