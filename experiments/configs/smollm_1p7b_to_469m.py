r"""SmolLM-1.7B to at most 469M parameters: the paper's own scale.

    python -m experiments.main \
      --config=experiments/configs/smollm_1p7b_to_469m.py \
      --workdir=runs/469m --config.data.text=<folder of .parquet files> \
      --distributed

What would run on a pod; not run by us. What is checked, by abstract evaluation
(no array is ever made), is that the plan is valid for this source and what it
needs (tests/configs_test.py):

    parameters          1,711,376,384 -> at most 469,000,000
    updates             47,684 of 1,048,576 tokens; 7,666 prunes
    state               20.54 GB: parameters 6.85, moments 13.69 (float32), and
                        masks, scores and origins 1.8 MB
    of one device       2.57 GB of it on the mesh below, with fsdp 8
    temporaries         3.8 GB a device for one sequence of 2048 tokens there on
                        H100s, 5.6 on v5e (experiments.aot_slice)
    architecture        16 shrinks x (30 s to compile and check + 4 s to save)
                        + 190 saves x 2 s = 930 s, 0.14 % of 680,000 s of steps
    selection           7,666 prunes x 0.07 s of a CPU core, 7,324 moves one
                        after another at the first = 540 s more
    disk                12 bytes a parameter for each of 16 events, some 200 GB,
                        and `checkpoint.keep` checkpoints of up to 20.54 GB
    text                some 200 GB, which one process of those that share a
                        cache splits and tokenises at 2 MB a second the first
                        time: rather a fourth of it, which the run then reads
                        four times over

The share of the shrinks is an estimate for one device at 400 TFLOP/s: 30 s is
what SmolLM2-135M took on 2 cores (layers are scanned, so that depth does not
count), and a save waits for a copy to the host at 5 GB/s. On 8 devices it is
1.1 %. The selections, here of random scores, are loops on the devices, and not
timed there: a move is 4 to 6 kernels of an H100 and a copy of one bit to the
host. On 64 devices, whose steps take 10,600 s in all, a larger `prune.every` is
worth a thought.

So 64 devices of 16 GB take an update in 8 micro-batches, one sequence a device
each; 8 devices with --config.data.batch_size=8 --config.train.accumulate=64.
With mesh.fsdp=1 a device needs 20.54 GB for the state alone.

Sizes, tokens and batch were digitised from the paper's Figure 2 (our
inference); the peak rate is that of the source's own training.
"""

import ml_collections

from experiments.configs import efficientllm_a


def get_config() -> ml_collections.ConfigDict:
  """Variant A at the scale of the paper's Figure 2."""
  config = efficientllm_a.get_config()
  # A Hugging Face folder: hidden 2048, ffn 8192, 32 heads of 64, 24 layers.
  config.source = 'models/SmolLM-1.7B'

  config.data.seq_len = 2048
  config.data.batch_size = 64
  config.mesh.fsdp = 8
  config.data.workers = 8
  config.model.dtype = 'bfloat16'
  config.model.remat = 'full'
  # 512 sequences an update: 1,048,576 tokens, as digitised from the figure.
  config.train.accumulate = 8
  config.train.tokens = 50_000_000_000
  config.train.log_every = 10

  config.optimizer.peak = 5e-4  # of the source's own training
  config.optimizer.end = 5e-5
  config.optimizer.warmup_tokens = 524_288_000
  config.optimizer.decay_tokens = 10_000_000_000
  config.optimizer.embedding = 1.0  # a million tokens have every word

  config.budget.target = 469_000_000.0
  # Figure 2(c): from 0.5B to 16.6B tokens with N = 2.
  config.prune.begin_tokens = 524_288_000
  config.prune.end_tokens = 16_600_000_000
  config.prune.every = 2
  config.prune.floors.ffn = 256
  config.prune.floors.stem = 256
  config.shrink.quantum.heads = 1
  config.shrink.quantum.ffn = 256
  config.shrink.quantum.stem = 128

  config.eval.every_tokens = 1_048_576_000
  # All of a text as large as this would be half of the training once more.
  config.eval.tokens_per_domain = 262_144
  config.checkpoint.every_steps = 250
  return config
