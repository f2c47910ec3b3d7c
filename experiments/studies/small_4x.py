r"""The small Llama, compressed to a quarter of all its parameters.

    python -m experiments.compare \
      --study=experiments/studies/small_4x.py --workdir=runs/compare
"""

from experiments import arms
from experiments.studies import small


def get_study() -> arms.Study:
  """As `small`; here the stem has to go too."""
  return small.study(
    target=small.CFG.num_params() // 4, tokens=2_048_000, price_embedding=True
  )
