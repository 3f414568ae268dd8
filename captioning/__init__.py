"""What `train_hf.py` and `eval_captions.py` share and the Hub never sees."""

from huggingface_hub.errors import StrictDataclassError

# What transformers raises for a folder whose configuration or weights cannot be used: each of its parts something else.
UNUSABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,  # also RecursionError: brackets nested thousands deep
    ImportError,
    StrictDataclassError,
)


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one sentence that names it and says what to do."""
