"""Reward functions by their names on the command line.

To add a reward, write a function or a class with trl's signature in a file of this room, and a case in `load_reward`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..common.errors import InputError, one_line
from ..metrics.tokenized import TokenizedReferences
from ..metrics.tokenizers import Tokenize
from .calls import RewardFunction, Rewards
from .lengths import LengthReward
from .ngrams import NgramReward, run_frequencies
from .user_files import load_function

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
CHOICES = "cider, bleu_4, clip_score[:MODEL], match:MODEL, length:WORDS, or FILE.py:FUNCTION"


@dataclass(kw_only=True)
class RewardContext:
    """Facts of a run that rewards need.

    Args:
        run_folder: folder of the run, where document frequencies are stored.
        train_references: function that returns the reference captions of each training image. Only `cider` of a new run
            calls it.
        tokenize: tokenizer of `cider` and `bleu_4`, as [`References`] takes it.
        device: device of the models of rewards, and of the results.
        eos_token_id: the token ids that end a caption.
    """

    run_folder: Path
    train_references: Callable[[], list[list[str]]]
    eos_token_id: Sequence[int]
    tokenize: str | Tokenize | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def load_rewards(names: Sequence[str], weights: Sequence[float] | None, context: RewardContext) -> Rewards:
    """Load reward functions.

    - `cider`: CIDEr-D against the references, with document frequencies of the training references. The first run
      stores them in its folder.
    - `bleu_4`: BLEU-4 against the references, with the smoothing of Lin and Och 2004.
    - `clip_score`, `clip_score:MODEL`: CLIPScore of the image and the caption.
    - `match:MODEL`: probability of a stage-1 model that the caption describes the image.
    - `length:WORDS`: `-|words - WORDS| / WORDS`.
    - `FILE.py:FUNCTION`: a function of the user with trl's signature.

    Args:
        names: names of rewards.
        weights: weight of each reward in the sum; by default 1 for each.
        context: facts of the run.

    Returns:
        The rewards. Their names are those in front of the colon, or of the user's function. Two rewards with the same
        name keep the whole text.

    Raises:
        InputError: for an unknown reward, a file or model that cannot be loaded, or weights that do not fit.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from qformer_captioner.rewards import RewardContext, load_rewards
    >>> references = [["a dog runs"], ["a cat sleeps"]]
    >>> context = RewardContext(
    ...     run_folder=Path(tempfile.mkdtemp()), train_references=lambda: references, eos_token_id=[2]
    ... )
    >>> rewards = load_rewards(["cider", "length:3"], [1.0, 0.1], context)
    >>> scores = rewards(
    ...     ["", ""], ["a dog runs", "a dog"], references=references[:1] * 2, completion_ids=[[5, 6, 7, 2], [5, 6, 2]]
    ... )
    >>> [round(score, 2) for score in scores.total.tolist()]
    [10.0, 2.72]
    ```
    """
    if not names:
        raise InputError(f"There is no reward: name at least one with --reward_funcs ({CHOICES}).")
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"The reward {duplicates[0]!r} is named twice: use --reward_weights to make it count more.")
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise InputError(
            f"There are {len(names)} rewards but {len(weights)} weights (--reward_weights): give one each."
        )
    if not all(map(math.isfinite, weights)):
        raise InputError(f"The weights of rewards {weights} must be finite numbers.")
    short = [name.rpartition(":")[2] if ".py:" in name else name.partition(":")[0] for name in names]
    numbers = Counter(short)
    keys = [key if numbers[key] == 1 else name for key, name in zip(short, names, strict=True)]
    functions = {key: load_reward(name, context) for key, name in zip(keys, names, strict=True)}
    return Rewards(functions, weights, context.device)


def load_reward(name: str, context: RewardContext) -> RewardFunction:
    """Load one reward function; see [`load_rewards`].

    Args:
        name: name of the reward.
        context: facts of the run.

    Raises:
        InputError: if there is no such reward, or it cannot be loaded.
    """
    if ".py:" in name:
        return load_function(name)
    kind, colon, argument = name.partition(":")
    match kind:
        case "cider" if not colon:
            frequencies = run_frequencies(context.run_folder, context.train_references, context.tokenize)
            return NgramReward(TokenizedReferences.cider, context.tokenize, context.eos_token_id, frequencies)
        case "bleu_4" if not colon:
            return NgramReward(TokenizedReferences.smoothed_bleu, context.tokenize, context.eos_token_id)
        case "clip_score" if argument or not colon:
            from .images import ClipReward  # here, because it imports the classes of CLIP

            return ClipReward(argument or DEFAULT_CLIP, context.device)
        case "match" if argument:
            from .images import MatchReward

            return MatchReward(argument, context.device)
        case "length" if argument.isdecimal() and int(argument):
            return LengthReward(int(argument))
    raise InputError(f"There is no reward {one_line(name, 100)!r}: choose from {CHOICES}.")
