"""Loading of captioners, and of adapters on captioners, from a folder or the Hub."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UNUSABLE, InputError, cannot_use, one_line

if TYPE_CHECKING:
    import torch

    from ..captioning_qformer import QFormerCaptioningModel
    from ..modeling_qformer import QFormerCaptioner


def load_captioner(
    model: str,
    revision: str | None = None,
    dtype: "str | torch.dtype" = "auto",
    device: "torch.device | None" = None,
) -> "QFormerCaptioningModel":
    """Load a captioner with its processor. An adapter is loaded on the captioner that it belongs to.

    A Q-Former of stage 1 is a captioner, too: it captions by its own head.

    Args:
        model: folder or Hub id of a captioner, an adapter, or a model of stage 1.
        revision: branch, tag or commit on the Hub. For an adapter, it does not apply to the base captioner.
        dtype: dtype of the weights, such as `"bfloat16"`; `"auto"` keeps the dtype in which each part was saved.
        device: device of the weights; by default the CPU.

    Raises:
        InputError: if the model cannot be loaded, or is not a captioner with a processor.

    Example:

    ```python
    >>> model = load_captioner("outputs/own_images")  # doctest: +SKIP
    >>> model.caption("dog.jpg")  # doctest: +SKIP
    'a dog runs over the grass'
    ```
    """
    from transformers import AutoModel
    from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file

    from ..captioning_qformer import QFormerCaptioningModel

    try:
        adapter_config = cached_file(
            model, ADAPTER_CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        hub_kwargs: dict[str, Any] = {}
        if revision is not None:
            hub_kwargs = {"revision": revision}
            if adapter_config is not None:
                hub_kwargs = {"adapter_kwargs": hub_kwargs}
        if adapter_config is not None and not Path(model, CONFIG_NAME).is_file():
            check_base(adapter_config)
        captioner = AutoModel.from_pretrained(model, dtype=dtype, **hub_kwargs)
    except (OSError, *UNUSABLE) as error:
        raise InputError(
            f"The captioner {model!r} cannot be loaded from a folder or the Hub: {one_line(error)}"
        ) from error
    if not isinstance(captioner, QFormerCaptioningModel):
        raise InputError(f"{model!r} holds a {type(captioner).__name__}, not a captioner of this package.")
    if captioner.processor is None:
        raise InputError(f"The captioner {model!r} has no processor: save it again with `save_pretrained`.")
    return captioner if device is None else captioner.to(device)  # type: ignore[arg-type]


def check_base(adapter_config: str) -> None:
    """Check that an adapter names its captioner, because transformers would look for a model named `None`.

    Args:
        adapter_config: path of its `adapter_config.json`.

    Raises:
        OSError: if it does not.
    """
    if not json.loads(Path(adapter_config).read_text(encoding="utf-8")).get("base_model_name_or_path"):
        raise OSError(
            "the adapter names no captioner; write the folder of its captioner as `base_model_name_or_path` into its "
            "adapter_config.json"
        )


def load_merged_captioner(model: str | os.PathLike) -> "QFormerCaptioner":
    """Load a captioner. An adapter is merged into the captioner that it belongs to.

    Args:
        model: folder or Hub id of a captioner or an adapter.

    Raises:
        InputError: if the model cannot be used.
        OSError: if the captioner or the base captioner of an adapter cannot be fetched; the message names it.
    """
    from transformers.utils import ADAPTER_CONFIG_NAME, cached_file

    from ..modeling_qformer import QFormerCaptioner

    try:
        if cached_file(model, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is None:
            return QFormerCaptioner.from_pretrained(model)
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(os.fspath(model)).base_model_name_or_path
        if not base:
            raise ValueError("its adapter_config.json does not name the captioner that the adapter belongs to")
        captioner = PeftModel.from_pretrained(QFormerCaptioner.from_pretrained(base), model).merge_and_unload()
    except UNUSABLE as error:
        raise cannot_use(model, error) from error
    captioner.config.language_model_name_or_path = None  # the merged weights differ from the backbone of that name
    return captioner
