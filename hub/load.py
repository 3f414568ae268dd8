"""Open a captioner, or an adapter on one, by folder or Hub id."""

from typing import TYPE_CHECKING

from ..common.errors import UNUSABLE, InputError

if TYPE_CHECKING:
    import torch

    from ..modeling_qformer import QFormerCaptioner


def load_captioner(model: str, revision: str | None = None, dtype: "str | torch.dtype" = "auto") -> "QFormerCaptioner":
    """Open a captioner, or an adapter on one, by folder or Hub id.

    Args:
        model: folder or Hub id.
        revision: its branch, tag or commit on the Hub. Of an adapter: the captioner that it is on has others.
        dtype: of the weights; "auto" is as they were saved.

    Raises:
        InputError: if there is none, or it is something else; the message names it.
    """
    from transformers import AutoModel
    from transformers.utils import ADAPTER_CONFIG_NAME, cached_file

    from ..modeling_qformer import QFormerCaptioner

    try:
        found = cached_file(model, ADAPTER_CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        at = {"revision": revision} if found is None else {"adapter_kwargs": {"revision": revision}}
        captioner = AutoModel.from_pretrained(model, dtype=dtype, **(at if revision is not None else {}))
    except (OSError, *UNUSABLE) as error:
        why = " ".join(str(error).split())[:500]
        raise InputError(f"The captioner {model!r} cannot be loaded, from a folder or the Hub: {why}") from error
    if not isinstance(captioner, QFormerCaptioner):
        raise InputError(f"{model!r} holds a {type(captioner).__name__} and no captioner of this package.")
    if captioner.processor is None:
        raise InputError(f"The captioner {model!r} has no processor beside it.")
    return captioner
