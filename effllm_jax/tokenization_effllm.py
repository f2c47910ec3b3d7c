"""A tokenizer that is what its tokenizer.json says.

Copied into a folder whose model would get the tokenizer of another family.
"""

import transformers


class EffllmTokenizer(transformers.PreTrainedTokenizerFast):
  """As its base; transformers asks for a class in a file beside the model."""
