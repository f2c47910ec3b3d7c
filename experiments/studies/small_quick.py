r"""The study of the small Llama in an eighth of the tokens.

    python -m experiments.compare --study=experiments/studies/small_quick.py \
      --workdir=runs/compare --budgets=tokens

33 runs of 250 steps. `ours_a` took 84 s of steps and `scratch_found` 64 s while
other jobs kept both cores busy (load 8).
"""

from experiments import arms
from experiments.studies import small


def get_study() -> arms.Study:
  """Half of all parameters, 256k tokens an arm."""
  return small.study(target=small.CFG.num_params() // 2, tokens=256_000)
