r"""The small Llama to a quarter of its parameters, in an eighth of the text.

    python -m experiments.compare --workdir=runs/compare --budgets=tokens \
      --study=experiments/studies/small_quick_4x.py
"""

from experiments import arms
from experiments.studies import small


def get_study() -> arms.Study:
  """A quarter of all parameters, 256k tokens an arm."""
  return small.study(
    target=small.CFG.num_params() // 4, tokens=256_000, price_embedding=True
  )
