"""The model of the server, in a thread of its own: loading, and captions of a batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..captioning.rows import caption_rows
from ..common.errors import InputError
from ..common.logging import get_logger
from ..generation_qformer import resolve_generation_config
from .batching import CaptionedRequest, Result, Row
from .errors import ApiError

if TYPE_CHECKING:
    from ..captioning_qformer import QFormerCaptioningModel

logger = get_logger(__name__)


class ServedModel:
    """A captioner and what requests need to know about it. Its methods run in the thread of the model.

    Args:
        model: the captioner.
        max_new_tokens: largest number of tokens of a caption, or `None` for the captioner's own.

    Raises:
        InputError: if the captioner reads only features.
    """

    def __init__(self, model: "QFormerCaptioningModel", max_new_tokens: int | None = None):
        if not model.config.has_vision_model:
            raise InputError("The captioner reads features and has no vision encoder: serve another captioner.")
        torch.seed()  # torch's own seed is the same in every process, and sampled captions would be, too
        self.model = model.eval()
        assert model.processor is not None  # `load_captioner` has checked it
        self.tokenizer: Any = model.processor.tokenizer
        config, _ = resolve_generation_config(model.config, model.generation_config, None, {})
        # A model of stage 1 reads fewer tokens than other captioners generate.
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        own = config.max_new_tokens if room is None else min(config.max_new_tokens, room)
        self.limit: int = max_new_tokens or own
        self.samples: bool = bool(config.do_sample)  # where a request does not choose
        self.max_images: int = model.processor.num_frames

    def caption(self, rows: Sequence[Row]) -> list[Result]:
        """Caption the rows of a batch. If it fails, each row is tried alone, so that one cannot fail the others.

        Args:
            rows: rows with equal options.
        """
        try:
            return self.caption_together(rows)
        except Exception as error:
            if len(rows) == 1:
                return [api_error(error)]
            if not isinstance(error, ValueError):
                logger.warning("A batch of %d rows failed, and is captioned row by row: %s", len(rows), error)
        return [self.caption([row])[0] for row in rows]

    def caption_together(self, rows: Sequence[Row]) -> list[Result]:
        """Caption the rows of a batch.

        Args:
            rows: rows with equal options.

        Raises:
            Exception: if the model fails.
        """
        first = rows[0]
        images, prompts = [row.image for row in rows], [row.prompt for row in rows]
        with torch.random.fork_rng(enabled=first.seed is not None):
            if first.seed is not None:
                torch.manual_seed(first.seed)
            captioned = caption_rows(self.model, images, prompts, **first.generation)
        results: list[Result] = []
        for row, prompt in zip(captioned, prompts, strict=True):
            if row.error is not None:
                results.append(ApiError(422, row.error, code="invalid_image"))
                continue
            tokens = [self.count_tokens(caption) for caption in row.captions]
            results.append(CaptionedRequest(row.captions, tokens, self.count_tokens(prompt)))
        return results

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        ids: Any = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return len(ids)


def api_error(error: Exception) -> ApiError:
    """Return the answer to a request that the model cannot caption."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):  # the prompt is too long, or options contradict each other
        return ApiError(400, str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return ApiError(503, "The server has no memory left for this request: try again.", code="out_of_memory")
    logger.error("A request failed.", exc_info=error)
    return ApiError(500, "The captioner failed on this request: the log of the server says why.")
