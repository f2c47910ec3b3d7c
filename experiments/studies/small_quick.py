r"""The study of the small Llama in an eighth of the tokens.

    python -m experiments.compare --study=experiments/studies/small_quick.py \
      --workdir=runs/compare --budgets=tokens

63 runs of 250 steps, 45 to 100 s each on one core of 2; at equal FLOPs as many
again, of up to 530 steps, 1 to 2 minutes each.
"""

from experiments import arms
from experiments.studies import small


def get_study() -> arms.Study:
  """Half of all parameters, 256k tokens an arm."""
  return small.study(target=small.CFG.num_params() // 2, tokens=256_000)
