r"""The small Llama to one shape, which is not left to the arms.

    python -m experiments.compare --workdir=runs/compare \
      --study=experiments/studies/small_quick_shape.py \
      --arms=dense,ours_a,oneshot_activation,oneshot_taylor

The shape is what one cut by activations finds under the floors of
small_quick.py, where it wins at equal FLOPs. What is left of its lead here is
the criterion's; what is gone was the shape's.
"""

from experiments import arms
from experiments.studies import small


def get_study() -> arms.Study:
  """Heads 3, ffn 192, stem 144 (1,587,024 parameters), 256k tokens an arm."""
  return small.study(
    target=small.CFG.num_params() // 2,
    tokens=256_000,
    floors={'heads': 3, 'ffn': 192, 'stem': 144},
  )
