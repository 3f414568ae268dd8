"""Auxiliary loss that asks the soft prompt for the words of the caption.

A frozen language model predicts most of a caption from its earlier tokens, so the Q-Former receives little gradient at
first. This loss uses only the soft prompt, without the language model and without word order.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn


class BagOfWordsLoss:
    """Multi-label cross-entropy between a soft prompt and the tokens of the captions of its image.

    The logit of token `v` is `logit(P(v)) + log mean_q exp(scale * prompt_q . embedding_v)`. `P(v)` is the share of
    training captions that contain the token. The second term is a soft maximum over the query tokens `q`: one query
    that resembles the embedding is enough. The loss has no parameters, so it trains only the soft prompt.

    Training makes the norm of soft prompts many times larger than that of token embeddings. The loss therefore rescales
    each soft-prompt vector to the mean embedding norm, and depends on its direction only.

    Args:
        captions: token ids of all training captions.
        embeddings (`[V, D]`): input embeddings of the language model.
        min_count: minimum number of captions that contain a token. Rarer tokens are ignored.

    Example:

    ```python
    >>> bag_of_words_loss = BagOfWordsLoss([[7, 2], [7, 3, 2]] * 5, torch.randn(10, 4))
    >>> bag_of_words_loss(torch.zeros(1, 8, 4), torch.tensor([[7, 2, -100]])).shape
    torch.Size([])
    ```
    """

    def __init__(self, captions: Iterable[list[int]], embeddings: torch.Tensor, min_count: int = 5):
        token_sets = [set(caption) for caption in captions]
        counts = Counter(token for tokens in token_sets for token in tokens)
        frequent = sorted(token for token, count in counts.items() if count >= min_count)
        self.tokens = torch.tensor(frequent, dtype=torch.long)  # [W], empty if there are few captions
        frequency = torch.tensor([counts[token] / len(token_sets) for token in self.tokens.tolist()])
        self.prior = torch.logit(frequency.clamp(1e-4, 1 - 1e-4))  # [W]
        self.embedding_norm = embeddings.detach().float().norm(dim=-1).mean()
        self.embeddings = embeddings.detach()[self.tokens.to(embeddings.device)].float()  # [W, D]
        # A query equal to the embedding of a token raises its exponent by about 10.
        # Without frequent tokens the mean would be NaN, and so would the gradients.
        self.scale = (10 / self.embeddings.square().sum(dim=-1).mean()).nan_to_num()

    def __call__(self, soft_prompt: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss, summed over tokens and averaged over images.

        Args:
            soft_prompt (`[B, Q, D]`): soft prompts of the images.
            labels (`[B, T]` or `[B, K, T]`): token ids of their captions. Positions labelled -100 are ignored.
        """
        device = soft_prompt.device
        target = self._token_shares(labels, self.tokens.to(device))  # [B, W]
        soft_prompt = self.embedding_norm.to(device) * nn.functional.normalize(soft_prompt.float(), dim=-1)
        similarity = self.scale.to(device) * soft_prompt @ self.embeddings.to(device).T  # [B, Q, W]
        num_queries = similarity.new_full((), similarity.shape[1])
        logits = self.prior.to(device) + similarity.logsumexp(dim=1) - num_queries.log()  # [B, W]
        return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=-1).mean()

    @staticmethod
    def _token_shares(labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the share of each image's captions that contain each token: `[B, W]`."""
        captions = labels.reshape(len(labels), -1, labels.shape[-1])  # [B, K, T]
        contains = (captions[..., None] == tokens).any(dim=2).float()  # [B, K, W]
        exists = (captions != -100).any(dim=2).float()  # [B, K]; 0 for an image with fewer captions than others
        return (contains * exists[..., None]).sum(dim=1) / exists.sum(dim=1, keepdim=True).clamp(min=1)
