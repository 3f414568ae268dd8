"""Recall of retrieval between images and texts, by the protocol of Karpathy and Fei-Fei (arXiv 1412.2306)."""

from collections.abc import Sequence

import torch

DIRECTIONS = ("image_to_text", "text_to_image")


def ranks(similarity: torch.Tensor, image_of_text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many wrong candidates have at least the score of the right one, for each image and each text.

    The right candidate of an image is its text with the highest score. Ties count against it, so that constant scores
    do not look good.

    Args:
        similarity: scores `[N, M]` of N images and M texts.
        image_of_text: index of the image of each text, int64 `[M]`.

    Returns:
        The rank of each image among the texts, int64 `[N]`, and of each text among the images, int64 `[M]`. Ranks begin
        at 0. Images without a text have the rank -1: they are only candidates.

    Raises:
        ValueError: if a score is NaN, the shapes do not fit, or a text has no image.

    Example:

    ```python
    >>> import torch
    >>> from qformer_captioner.evaluation.recall import ranks
    >>> ranks(torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.2, 0.1]]), torch.tensor([0, 0, 1]))
    (tensor([0, 2]), tensor([0, 1, 1]))
    ```
    """
    _check(similarity, image_of_text)
    image_of_text = image_of_text.to(similarity.device, torch.int64)
    num_images, num_texts = similarity.shape
    own = similarity[image_of_text, torch.arange(num_texts, device=similarity.device)]
    best = own.new_full((num_images,), -torch.inf).scatter_reduce(0, image_of_text, own, "amax")
    num_own = torch.zeros_like(best, dtype=torch.int64).scatter_add(
        0, image_of_text, (own == best[image_of_text]).to(torch.int64)
    )
    image_ranks = (similarity >= best[:, None]).sum(dim=1) - num_own
    text_ranks = (similarity >= own).sum(dim=0) - 1
    has_text = torch.zeros_like(num_own, dtype=torch.bool).index_fill(0, image_of_text, True)
    return image_ranks.masked_fill(~has_text, -1), text_ranks


def recalls(similarity: torch.Tensor, image_of_text: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return the recall among the first k candidates in both directions.

    An image counts if at least one of its texts is among the first k texts. A text counts if its image is among the
    first k images. Ties count against the right candidate. This is the protocol of Karpathy and Fei-Fei (arXiv
    1412.2306).

    Args:
        similarity: scores `[N, M]` of N images and M texts, of any floating dtype.
        image_of_text: index of the image of each text, int64 `[M]`.
        ks: the numbers of candidates.

    Returns:
        `image_to_text_r1` and so on for each k, `text_to_image_r1` and so on, and `mean_recall`, the mean of all of
        them. Values are from 0 to 1.

    Raises:
        ValueError: if a score is NaN, the shapes do not fit, or there are no texts.

    Example:

    ```python
    >>> import torch
    >>> from qformer_captioner.evaluation.recall import recalls
    >>> recalls(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), ks=[1])
    {'image_to_text_r1': 0.5, 'text_to_image_r1': 1.0, 'mean_recall': 0.75}
    ```
    """
    image_ranks, text_ranks = ranks(similarity, image_of_text)
    return recalls_of_ranks(image_ranks, text_ranks, ks)


def recalls_of_ranks(
    image_ranks: torch.Tensor, text_ranks: torch.Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return the recall of ranks that [`ranks`] returns, as [`recalls`] names it.

    Args:
        image_ranks: rank of each image among the texts, int64 `[N]`; -1 for an image without a text.
        text_ranks: rank of each text among the images, int64 `[M]`.
        ks: the numbers of candidates.

    Raises:
        ValueError: if no image has a text.
    """
    image_ranks = image_ranks[image_ranks >= 0]
    if not len(image_ranks) or not len(text_ranks):
        raise ValueError("There is no text with its image, and recall needs at least one.")
    values = {
        f"{direction}_r{k}": (found < k).double().mean().item()
        for direction, found in zip(DIRECTIONS, (image_ranks, text_ranks), strict=True)
        for k in ks
    }
    return {**values, "mean_recall": sum(values.values()) / len(values)}


def _check(similarity: torch.Tensor, image_of_text: torch.Tensor) -> None:
    """Refuse scores of which no recall can be computed."""
    if similarity.dim() != 2 or image_of_text.shape != similarity.shape[1:]:
        raise ValueError(
            f"Recall needs scores [images, texts] and the image of each text [texts], and got "
            f"{list(similarity.shape)} and {list(image_of_text.shape)}."
        )
    if similarity.isnan().any():
        raise ValueError("A score of an image and a text is NaN: the model or its input is damaged.")
    if len(image_of_text) and not 0 <= image_of_text.min() <= image_of_text.max() < len(similarity):
        raise ValueError(f"A text names an image that is not one of the {len(similarity)} images.")
