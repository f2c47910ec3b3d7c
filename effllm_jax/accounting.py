"""What a run spends: floating-point operations by purpose.

Counted are the matrix products, two operations per multiply-add, so that runs
can be compared at equal arithmetic and not only at equal tokens. Masked groups
cost what live ones cost, until the next shrink, but for a training step whose
kernels stop at the last live group of a layer:

    train    forward and backward pass, 3 times a forward pass; what
             rematerialisation computes again; 12 per parameter for Adam
    score    3 per parameter and update (a product, an absolute value, a sum),
             also where a kind takes a term of every micro-batch; where trials
             calibrate scores, 4 forward passes of a batch a prune
    repair   a forward pass through the layers of the batch; for I inputs and O
             outputs the Gram matrix 2 T I^2, its product with the removed rows
             2 I^2 O, a Cholesky factor I^3 / 3 and two solves 2 I^2 O; where
             the damping is chosen that product once more, and with each of
             them factor, solves and another product (of all O outputs, also
             where few inputs go and `repair.choose` needs fewer columns)
    teacher  its forward pass

A forward pass is `budgets.flops` at the sequence length of the run. Selecting,
shrinking, evaluating and the check of the loss at a shrink are not counted, nor
the scores of attention, which a backward pass computes again whatever is kept:
0.5 % of a step of SmolLM2-135M on sequences of 256 tokens.
"""

from collections.abc import Mapping

import numpy as np

from effllm_jax import budgets
from effllm_jax import structure

PURPOSES = ('train', 'score', 'repair', 'teacher')


class Meter:
  """Adds up what a run spends; `spent` is an int by purpose."""

  def __init__(
    self,
    seq_len: int,
    tokens_per_step: int,
    remat: str,
    spent: Mapping[str, int] | None = None,
  ):
    """Goes on from `spent`, or from nothing."""
    self._seq_len, self._tokens, self._remat = seq_len, tokens_per_step, remat
    self.spent = dict(spent or dict.fromkeys(PURPOSES, 0))

  def step(
    self,
    cfg: structure.ModelConfig,
    scores: bool,
    teacher: structure.ModelConfig | None,
    extents: Mapping[str, np.ndarray] | None = None,
  ) -> None:
    """Counts one optimizer update on arrays of `cfg`.

    Args:
      cfg: architecture of the arrays.
      scores: whether every group is scored.
      teacher: architecture of the teacher, if there is one.
      extents: by type, where the kernels stop; None: at the end.
    """
    forward = self._forward(cfg, extents)
    passes = 3 * forward
    if self._remat == 'full':
      passes += forward - self._output(cfg)
    self.spent['train'] += passes + 12 * cfg.num_params()
    self.spent['score'] += 3 * cfg.num_params() * scores
    if teacher:
      self.spent['teacher'] += self._forward(teacher)

  def calibrate(
    self,
    cfg: structure.ModelConfig,
    extents: Mapping[str, np.ndarray] | None = None,
  ) -> None:
    """Counts the trials before a prune; arguments as for `step`."""
    self.spent['score'] += 4 * self._forward(cfg, extents)

  def repair(
    self,
    cfg: structure.ModelConfig,
    repaired: Mapping[str, int],
    batches: int,
    tried: int = 0,
  ) -> None:
    """Counts one repair, on the tokens of so many batches.

    Args:
      cfg: architecture of the arrays.
      repaired: in how many layers the matrices that read an input were
        refitted, by the names of inputs in `model_repair.repair_model`.
      batches: how many were read, each as large as that of an update.
      tried: among how many dampings every matrix chose; 0: it was given one.
    """
    tokens = batches * self._tokens
    head = cfg.G * cfg.H
    matrices = {
      'attn_in': (cfg.D, cfg.K * (head + 2 * cfg.H)),
      'heads': (cfg.K * head, cfg.D),
      'ffn_in': (cfg.D, 2 * cfg.F),
      'ffn': (cfg.F, cfg.D),
      'final': (cfg.D, cfg.V),
    }
    total = batches * (self._forward(cfg) - self._output(cfg))
    for name, layers in repaired.items():
      inputs, outputs = matrices[name]
      product = 2 * inputs**2 * outputs
      solve = inputs**3 // 3 + product
      choice = product + tried * (solve + product) if tried else 0
      total += layers * (2 * tokens * inputs**2 + product + solve + choice)
    self.spent['repair'] += total

  def _forward(self, cfg, extents=None) -> int:
    heads, ffn = cfg.N * cfg.K, cfg.N * cfg.F
    if extents is not None:
      heads, ffn = int(extents['heads'].sum()), int(extents['ffn'].sum())
    # The stem is not skipped: every layer reads all of it.
    return self._tokens * budgets.flops(cfg, self._seq_len).size(
      heads, ffn, cfg.D
    )

  def _output(self, cfg) -> int:
    return self._tokens * 2 * cfg.V * cfg.D
