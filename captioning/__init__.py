"""What `train_hf.py` and `eval_captions.py` share and the Hub never sees."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one sentence that names it and says what to do."""
