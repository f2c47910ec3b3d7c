r"""SmolLM2-135M pruned from 134.5M to at most 105M parameters on a CPU.

The embedded default: source model and text come from PyPI packages. What
`make quickstart` runs:

    python -m experiments.main \
      --config=experiments/configs/smollm2_135m.py --workdir=runs/a
    python -m experiments.export --workdir=runs/a --out=out/smollm2-a
    python -m experiments.report --workdir=runs/a

The recipe is the best that was found for 61,440 tokens, one change at a time
(HYPOTHESES.md). Layers end with different widths, which an export as a stock
Hugging Face model fills up with zeros. For a plain Llama of one width take
efficientllm_b.py.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """All settings of a run. Lengths are in tokens where no unit is named."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  # 'smollm2-135m', a .gguf file, a Hugging Face folder of safetensors, or an
  # event or checkpoint of a run.
  config.source = 'smollm2-135m'
  # 'source' goes on from its weights; 'random' keeps shape, masks and tokenizer
  # and draws new weights from the seed.
  config.init = 'source'

  config.data = ml_collections.ConfigDict()
  # 'pypi', 'debian' (needs apt-get), or a folder of .txt, .jsonl or .parquet
  # files.
  config.data.text = 'pypi'
  config.data.seq_len = 256
  config.data.batch_size = 1  # sequences per micro-batch
  config.data.workers = 0  # processes; 0 reads in a thread of this one
  # Seconds that a worker may take for a batch, its start included: the run
  # stops when a worker hangs, instead of hanging too.
  config.data.timeout = 300.0
  # Sampling weight by domain, as in {'drama': 2.0, 'wiki': 1.0} (a flag takes
  # all of them as one value). Domains that are not named are not read; a name
  # must not contain a dot. Empty: every window of the text once per epoch.
  config.data.weights = ml_collections.ConfigDict()

  config.model = ml_collections.ConfigDict()
  # Of activations: 'float32', or 'bfloat16' on accelerators and CPUs with AMX.
  config.model.dtype = 'float32'
  # What a layer keeps for its backward pass; the rest is recomputed: 'none'
  # recomputes next to nothing, 'dots' keeps products with weights and the
  # output of attention, 'full' recomputes all, in the least memory.
  config.model.remat = 'none'
  # How matrix products skip what is dead: 'auto' (what was measured best on
  # this platform), or one of xla, xla_loop, bucket, pallas_tpu, pallas_hopper.
  config.model.kernels = 'auto'
  # Their block sizes (`xla` and `bucket` have none in a model): a file that
  # experiments.bench_kernels made, for as many tokens as a micro-batch has on
  # one device, and texts of this length; '': the defaults.
  config.model.blocks = ''

  # Devices along each axis of the mesh, of all processes together; -1: all that
  # are left. The batch is split over data and fsdp, weights and moments over
  # fsdp and tensor. A run may be resumed on another mesh.
  config.mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1})

  config.train = ml_collections.ConfigDict()
  config.train.tokens = 61_440
  config.train.accumulate = 2  # micro-batches per optimizer update
  config.train.log_every = 1  # steps
  # A step whose loss or gradient is not finite changes nothing; this many in a
  # row stop the run, with a checkpoint behind them.
  config.train.max_skipped = 10

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.schedule = 'wsd'  # or 'cosine'
  config.optimizer.peak = 1.5e-4  # learning rate
  config.optimizer.end = 3e-5  # learning rate at the last step
  config.optimizer.warmup_tokens = 2_560
  config.optimizer.decay_tokens = 20_480  # of 'wsd'
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip = 1.0  # global gradient norm
  # Share of that rate for the embedding and the unembedding, 0 to 1. Adam moves
  # rows of tokens that a batch does not have about as far as of those it has:
  # with a few hundred tokens an update, a trained embedding is better kept.
  config.optimizer.embedding = 0.0

  config.budget = ml_collections.ConfigDict()
  # What the model may cost in the end, and what saliency is divided by:
  # 'params', 'bytes', 'flops' (of a token's forward pass) or 'ms'.
  config.budget.kind = 'params'
  config.budget.target = 105_000_000.0  # at most; 78 % of the source
  config.budget.format = 'q8_0'  # of 'bytes': f32, bf16, f16, q8_0 or q4_0
  config.budget.context = 2048  # of 'flops', tokens
  config.budget.table = ''  # of 'ms': a file of experiments.latency

  config.prune = ml_collections.ConfigDict()
  # 'uniform': all layers keep one width, the result is a plain Llama; 'ragged':
  # the cheapest group anywhere, widths differ from layer to layer; 'none':
  # training only, target and schedule are not read.
  config.prune.policy = 'ragged'
  # How the size falls from begin to end: 'linear', 'cubic' or 'oneshot'. The
  # fall is cut into stages; `rest` is the share of each in which nothing is
  # pruned, so that the model recovers.
  config.prune.schedule = 'linear'
  config.prune.stages = 1
  config.prune.rest = 0.0
  config.prune.begin_tokens = 2_560
  config.prune.end_tokens = 20_480
  config.prune.every = 4  # steps; N in the paper's Figure 2
  # taylor1, taylor1_momentum, taylor1_group, taylor2, taylor2_micro, obd,
  # fisher, magnitude, activation or random: see effllm_jax/saliency.py.
  config.prune.saliency = 'fisher'
  config.prune.ema = 0.95  # of scores; 0 keeps the last batch only
  # Before a prune, remove the lowest groups of each type on trial, and scale
  # the scores of the type to the rise of the loss: 4 forward passes.
  config.prune.calibrate = False
  # Whether the embedding counts in the price of a stem channel. Counted, the
  # stem looks cheap and goes first, which costs this small model dearly. Where
  # the embedding is most of the target, count it: the stem has to go then.
  config.prune.price_embedding = False
  # The fewest groups left: heads and ffn per layer, stem in the model. Under
  # 'ragged' heads and ffn may be 0, and a layer may then lose the whole block;
  # for a small model that was worse at a half and at a quarter of its size
  # (STUDIES.md). This model comes near these floors only below 70M.
  config.prune.floors = ml_collections.ConfigDict(
    {'heads': 1, 'ffn': 64, 'stem': 64}
  )
  # The final widths. Edge runtimes and tensor cores want multiples of 64.
  config.prune.multiple_of = ml_collections.ConfigDict(
    {'heads': 1, 'ffn': 64, 'stem': 64}
  )

  config.repair = ml_collections.ConfigDict()
  # Variant B: after a prune, refit every matrix that lost inputs, so that the
  # survivors compute what all did before, on activations of recent batches.
  config.repair.enabled = True
  # How many updates, the newest ones, these batches are of: together some
  # thousand tokens; 1 where an update has that many.
  config.repair.batches = 8
  # Added to the Gram matrix, as a share of its mean diagonal. 0: every matrix
  # chooses, by fitting the older three quarters of these tokens and testing on
  # the newest; it mostly chooses 1 here. This takes half as much arithmetic
  # again as a given number.
  config.repair.damping = 0.0

  config.distill = ml_collections.ConfigDict()
  # Weight of the divergence from the teacher in the loss; 0: no teacher.
  config.distill.weight = 0.0
  # 'always', or 'recovery': only after the last prune, so that groups are
  # scored on the plain loss, and no teacher runs while pruning.
  config.distill.when = 'always'
  config.distill.teacher = ''  # as config.source; '' is the source itself
  config.distill.temperature = 1.0
  config.distill.top_k = 64  # probabilities stored per token

  config.shrink = ml_collections.ConfigDict()
  # Make the arrays smaller once this share of their parameters is dead.
  config.shrink.threshold = 0.08
  # Widths are rounded up to these until the end: 1 on a CPU, 128 (ffn 256) on
  # accelerators.
  config.shrink.quantum = ml_collections.ConfigDict(
    {'heads': 1, 'ffn': 1, 'stem': 1}
  )

  config.eval = ml_collections.ConfigDict()
  # A file or a folder of your own to score on, all of it; '': what data.text
  # holds out. Nothing of it is taken out of the text that is trained on.
  config.eval.text = ''
  config.eval.every_tokens = 1_000_000  # besides start, last prune and end
  config.eval.tokens_per_domain = 2_048  # 0: all

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every_steps = 40
  config.checkpoint.keep = 2  # rolling ones; events are permanent
  return config
