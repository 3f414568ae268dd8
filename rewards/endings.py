"""Captions that break off, as rewards of n-grams teach them to if the end of a caption is not rewarded."""

import re

# Words after which English goes on, as in the count of "bad endings" in the evaluation of Luo's self-critical.pytorch.
# Words that also end whole captions are left out, except for "on" and "in": pronouns ("with a dog beside her") and
# adverbs ("cars drive by", "with trees around", "a cup with a spoon inside").
ARTICLES = ("a", "an", "the", "this", "these", "those", "its", "his", "their", "my", "our", "your", "some", "every")
PREPOSITIONS = (
    *("against", "alongside", "amid", "among", "amongst", "as", "at", "atop", "beside", "between", "beyond"),
    *("during", "for", "from", "in", "into", "like", "near", "of", "on", "onto", "per", "than", "throughout"),
    *("to", "toward", "towards", "upon", "via", "with", "within", "without"),
)
CONJUNCTIONS = (
    *("and", "or", "but", "nor", "if", "because", "although", "unless", "whereas", "while", "until"),
    *("that", "which", "who", "whose", "where", "when"),
)
FORMS_OF_BE = ("am", "is", "are", "was", "were", "be", "being", "been")
OPEN_WORDS = frozenset((*ARTICLES, *PREPOSITIONS, *CONJUNCTIONS, *FORMS_OF_BE))
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*|\d+")


def bad_ending(caption: str) -> bool:
    """Return whether a caption breaks off: its last word is an article, a preposition, a conjunction or a form of "be".

    Punctuation and letter case are ignored. An empty caption has no bad ending. The words are English. Of the human
    captions of COCO's test images, 0.5 % have such an ending, most of them "on".

    Args:
        caption: the caption.

    Example:

    ```python
    >>> from qformer_captioner.rewards import bad_ending
    >>> bad_ending("a man riding a wave on a."), bad_ending("a man riding a wave.")
    (True, False)
    ```
    """
    words = _WORD.findall(caption.lower())
    return bool(words) and words[-1] in OPEN_WORDS
