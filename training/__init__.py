"""Training: options, data and model of a run, trainer, callbacks, EMA, bag-of-words loss and run facts."""

import logging

# transformers' Trainer imports peft, and peft imports bitsandbytes. On a CPU, bitsandbytes then warns about a missing
# kernel for 4-bit weights, which most runs do not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
