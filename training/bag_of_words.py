"""An auxiliary loss that makes the queries look at the image: which words is it captioned with?

A frozen language model predicts most of a caption from the caption's own earlier words, so at first the Q-Former hardly
learns anything from it. This loss asks the soft prompt alone, without the language model and without word order: each
query speaks for words by its likeness to their embeddings, and the loudest query counts.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn


class BagOfWordsLoss:
    """Multi-label cross-entropy between a soft prompt and the words of its image's captions.

    The score of word v is `log P(v) / P(not v) + log mean_q exp(scale * prompt_q . embedding_v)`: its frequency in the
    training captions, corrected by what the queries say. Nothing in it is learned but the soft prompt.

    Training makes soft prompts many times as loud as words are. This loss turns them down to the words' loudness, and
    hears what they say and not how loud.

    Args:
        captions: token ids of all training captions, to count words in.
        embeddings (`[V, D]`): the language model's word embeddings.
        fewest: leave out words that fewer captions than this have.

    Example:

    ```python
    >>> words = BagOfWordsLoss([[7, 2], [7, 3, 2]] * 5, torch.randn(10, 4))
    >>> words(torch.zeros(1, 8, 4), torch.tensor([[7, 2, -100]])).shape
    torch.Size([])
    ```
    """

    def __init__(self, captions: Iterable[list[int]], embeddings: torch.Tensor, fewest: int = 5):
        captions = [set(caption) for caption in captions]
        counts = Counter(word for caption in captions for word in caption)
        self.words = torch.tensor(sorted(word for word, count in counts.items() if count >= fewest))
        share = torch.tensor([counts[word] / len(captions) for word in self.words.tolist()])
        self.prior = torch.logit(share.clamp(1e-4, 1 - 1e-4))
        self.loudness = embeddings.detach().float().norm(dim=-1).mean()
        self.embeddings = embeddings.detach()[self.words.to(embeddings.device)].float()
        # A query that says a word as loud as its embedding is raises that word's score by about 10.
        self.scale = 10 / self.embeddings.square().sum(dim=-1).mean()

    def __call__(self, soft_prompt: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed over words, averaged over images.

        Args:
            soft_prompt (`[B, Q, D]`): of the images.
            labels (`[B, T]` or `[B, K, T]`): their captions, padded with -100.
        """
        device = soft_prompt.device
        captions = labels.reshape(len(labels), -1, labels.shape[-1])  # [B, K, T]
        said = (captions[..., None] == self.words.to(device)).any(dim=2).float()  # [B, K, W]
        real = (captions != -100).any(dim=2).float()  # [B, K], 0 for an image with fewer captions than others
        target = (said * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True).clamp(min=1)  # [B, W]
        soft_prompt = self.loudness.to(device) * nn.functional.normalize(soft_prompt.float(), dim=-1)
        likeness = self.scale.to(device) * soft_prompt @ self.embeddings.to(device).T  # [B, Q, W]
        score = self.prior.to(device) + likeness.logsumexp(dim=1) - likeness.new_full((), likeness.shape[1]).log()
        return nn.functional.binary_cross_entropy_with_logits(score, target, reduction="none").sum(dim=-1).mean()
