"""Texts as the Q-Former reads them in stage 1: `[CLS] text [SEP]`, one or several of each image.

Shapes: B images, K texts of an image, M texts in all, T tokens of a text. Dq is the width of the Q-Former, and V the
size of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_qformer import QFormerConfig
from .features_qformer import bool_mask
from .objectives_qformer import gather_rows, num_processes, right_pairs


@dataclass
class TextBatch:
    """Texts as tokens, `[CLS] text [SEP]`, padded on the right.

    Args:
        ids (`[M, T]`, long): tokens.
        mask (`[M, T]`, bool): `True` for a token.
        image_of_text (`[M]`, long): image of each text.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    image_of_text: torch.Tensor

    def select(self, index: torch.Tensor, image_of_text: torch.Tensor) -> "TextBatch":
        """Return some of the texts, with their images."""
        return TextBatch(self.ids[index], self.mask[index], image_of_text)

    def gather(self, first_image: int) -> "TextBatch":
        """Return the texts of all processes, where the images of this process begin with `first_image`."""
        if num_processes() == 1:
            return self
        parts = self.ids, self.mask.long(), self.image_of_text + first_image
        ids, mask, image_of_text = (torch.cat(gather_rows(part)) for part in parts)
        return TextBatch(ids, mask.bool(), image_of_text)

    def right_pairs(self, num_images: int) -> torch.Tensor:
        """Return which texts are right for which image, bool `[N, M]`. Equal texts are right for the same images."""
        _, numbers = self.ids.masked_fill(~self.mask, -1).unique(dim=0, return_inverse=True)
        return right_pairs(num_images, self.image_of_text, numbers)

    def decoder_inputs(self, bos_token_id: int) -> "TextBatch":
        """Return all tokens of the texts but the last, with the start token in place of the first."""
        ids = self.ids[:, :-1].clone()
        ids[:, 0] = bos_token_id
        return TextBatch(ids, self.mask[:, 1:], self.image_of_text)

    def decoder_targets(self) -> torch.Tensor:
        """Return the token that each decoder input predicts, without padding, `[tokens]`."""
        return self.ids[:, 1:][self.mask[:, 1:]]


def check_texts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_images: int, config: QFormerConfig
) -> TextBatch:
    """Check texts, and return those that are not padding.

    Args:
        input_ids (`[B, T]` or `[B, K, T]`, long): one text or K texts of each image.
        attention_mask (same shape, *optional*): 1 for a token, 0 for padding.
        num_images: number of images, B.
        config: configuration of the Q-Former that reads the texts.

    Raises:
        ValueError: for a shape that does not fit the images, an image without texts, or padding on the left. Also for
            texts that are too long, or of another vocabulary.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape or input_ids.ndim not in (2, 3) or len(input_ids) != num_images:
        raise ValueError(
            f"`input_ids` of shape {list(input_ids.shape)} and `attention_mask` of shape {list(mask.shape)} do not "
            f"fit {num_images} images: give one text of each image ([B, T]) or K texts of each image ([B, K, T])."
        )
    if 0 in input_ids.shape or input_ids.is_floating_point():
        raise ValueError(
            f"`input_ids` of shape {list(input_ids.shape)} and type {input_ids.dtype} are not texts as tokens: let "
            "`model.processor(text=...)` prepare them."
        )
    mask = bool_mask("`attention_mask`", mask, input_ids.device)
    has_text = mask.any(dim=-1).view(num_images, -1)  # [B, K]
    if not has_text.any(dim=1).all():
        raise ValueError(
            f"Row {int(has_text.any(dim=1).int().argmin())} of the batch has no text: its mask is 0 everywhere. "
            "Leave out rows without texts."
        )
    image_of_text, _ = has_text.nonzero(as_tuple=True)
    is_text = has_text.flatten()
    ids, mask = input_ids.flatten(0, -2)[is_text], mask.flatten(0, -2)[is_text]
    lengths = mask.sum(dim=1)
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    ids, mask = ids[:, :longest], mask[:, :longest]
    if not torch.equal(mask, torch.arange(longest, device=mask.device) < lengths[:, None]):
        raise ValueError("Texts must be padded on the right: set `tokenizer.padding_side = 'right'`.")
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"A text has {longest} tokens, but the Q-Former reads at most {config.max_position_embeddings}: "
            "shorten it, or let the processor cut it (`max_length`)."
        )
    if shortest < 2:
        raise ValueError(
            "A text has a single token: texts are `[CLS] text [SEP]`, so let `model.processor(text=...)` prepare them."
        )
    lowest, highest = torch.stack(ids.aminmax()).tolist()
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(
            f"A text has the token {min(lowest, 0) or highest}, but the vocabulary of the Q-Former has "
            f"{config.vocab_size} tokens: use the tokenizer that it was trained with (`model.processor.tokenizer`)."
        )
    return TextBatch(ids, mask, image_of_text)


class QFormerLMHead(nn.Module):
    """Head of masked language models as BERT has it: `[n, Dq]` -> logits `[n, V]`.

    The weights of `decoder` are those of the word embeddings.
    """

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.LayerNorm(self.activation(self.dense(hidden_states))))
