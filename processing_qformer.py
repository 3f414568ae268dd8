"""Inputs and outputs of a captioner: images to pixel values, prompts and captions to tokens, tokens to text.

A `QFormerCaptionerProcessor` joins the image processor of the vision encoder and the tokenizer of the language model.
The language model needs no `<image>` token: the model puts the soft prompt in front of the embedded prompt.
"""

import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    BatchFeature,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ViTImageProcessorPil,
)
from transformers.utils import PROCESSOR_NAME, PushToHubMixin
from transformers.utils.hub import cached_file

from .encoders_qformer import ENCODER_INPUTS
from .features_qformer import feature_mask, pad_features
from .images_qformer import ImageInput, are_floats, flatten_images, open_image, sample_frames

QFORMER_TOKENIZER = "qformer_tokenizer"  # subfolder of a saved processor
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision")

# This template reduces chat messages to their text, because the language model captions and does not converse. The
# content of a message is a string or a list of parts. Parts are separated by a space, and messages by a line break.
PLAIN_TEXT_TEMPLATE = """
{%- set chat = namespace(text='', gap='') -%}
{%- for message in messages -%}
    {%- set content = message['content'] or [] -%}
    {%- for part in ([content] if content is string else content) -%}
        {%- set text = part if part is string else (part['text'] or '' if part['type'] == 'text' else '') -%}
        {%- if text -%}
            {%- set is_apart = chat.text[-1:].isspace() or text[:1].isspace() -%}
            {%- set chat.text = chat.text ~ ('' if is_apart else chat.gap) ~ text -%}
            {%- set chat.gap = ' ' -%}
        {%- endif -%}
    {%- endfor -%}
    {%- set chat.gap = '\n' if chat.text else '' -%}
{%- endfor -%}
{{- chat.text -}}
"""

CARD = """---
{{ card_data }}
---

# {{ name }}

{% if feature_width -%}
A captioner of features: a Q-Former turns features of the width {{ feature_width }} into a short soft prompt, which a
language model reads. The encoder of the features is not a part of it.
{%- else -%}
An image captioning model: a Q-Former turns the features of a vision encoder into a short soft prompt, which a language
model reads.
{%- endif %} It was made with the package qformer-captioner.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True)
{% if feature_width -%}
print(model.caption(image_embeds=features))  # an array [N, {{ feature_width }}], or a list of arrays
{%- else -%}
print(model.caption("image.png"))
{%- endif %}
```

`trust_remote_code=True` runs Python files of this repository: read them, and pin what you read with `revision="..."`.
The code is under Apache-2.0; weights follow the terms of the models and data that they come from.
"""

# ----------------------------------------------------------------------------------------------------------------------
# The processor
# ----------------------------------------------------------------------------------------------------------------------


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], return_tensors: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Return what a tokenizer computes for prompts: `input_ids` and `attention_mask` (`[B, P]`, long; P may be 0)."""
    tokens = dict(tokenizer(prompts, return_tensors=return_tensors, **options))
    if return_tensors == "pt":  # empty prompts come as float tensors
        tokens = {name: value.long() for name, value in tokens.items()}
    return tokens


def load_image_processor(name_or_path: str | os.PathLike, revision: str | None = None) -> BaseImageProcessor:
    """Load the image processor of a vision encoder. No code from the Hub is executed.

    Raises:
        OSError: if it cannot be fetched.
    """
    config, _ = PreTrainedConfig.get_config_dict(str(name_or_path), revision=revision)
    if config.get("model_type") == "timm_wrapper":
        return timm_image_processor(config["pretrained_cfg"])
    return AutoImageProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)


def timm_image_processor(pretrained_cfg: dict[str, Any]) -> CLIPImageProcessorPil:
    """Return an image processor that does what timm does in evaluation.

    That of transformers for timm models needs timm and torchvision, and cannot be saved.

    Args:
        pretrained_cfg: `pretrained_cfg` in the `config.json` of a timm model.
    """
    _, height, width = pretrained_cfg["input_size"]
    larger = [math.floor(side / pretrained_cfg.get("crop_pct", 0.875)) for side in (height, width)]
    keeps_ratio = height == width and pretrained_cfg.get("crop_mode", "center") == "center"
    return CLIPImageProcessorPil(
        size={"shortest_edge": larger[0]} if keeps_ratio else {"height": larger[0], "width": larger[1]},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[pretrained_cfg.get("interpolation", "bilinear").upper()],
        image_mean=list(pretrained_cfg["mean"]),
        image_std=list(pretrained_cfg["std"]),
    )


def prepare_images(image_processor: Any, images: list[Image.Image], **options: Any) -> dict[str, Any]:
    """Return what a vision encoder reads: `pixel_values` `[B, ...]`, and those of `ENCODER_INPUTS` that belong to them.

    Raises:
        ValueError: if the image processor does not return one entry for each image.
    """
    outputs = image_processor(images, **options)
    batch = {name: outputs[name] for name in ("pixel_values", *ENCODER_INPUTS) if name in outputs}
    if np.all(np.asarray(batch.get("pixel_mask", 1))):  # of images of one size, which YOLOS does not read
        batch.pop("pixel_mask", None)
    shape = np.shape(batch["pixel_values"])
    if len(shape) == 5 and shape[:2] == (1, len(images)):  # VideoMAE's makes one video of all images
        batch["pixel_values"] = batch["pixel_values"][0]
    elif shape[0] != len(images):
        raise ValueError(
            f"A {type(image_processor).__name__} makes {shape[0]} rows of {len(images)} images, because it cuts them "
            "into tiles: use another image processor, such as that of CLIP or SigLIP, in the size of the encoder."
        )
    return batch


def prepare_videos(
    image_processor: Any,
    frames: list[Image.Image],
    lengths: list[int],
    return_tensors: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return `pixel_values` `[B, F, 3, H, W]` of videos and, if they differ in length, `frame_attention_mask` `[B, F]`.

    Args:
        image_processor: image processor of the vision encoder.
        frames: the frames of all videos, one after another.
        lengths: number of frames of each video.
        return_tensors: type of the result.
        options: options of the image processor.

    Raises:
        ValueError: if frames get different sizes, or the encoder needs further inputs for each image.
    """
    outputs = image_processor(frames, **options)
    if others := [name for name in ENCODER_INPUTS if name in outputs]:
        raise ValueError(
            f"A {type(image_processor).__name__} prepares each image in its own shape ({others[0]!r}), which videos "
            "cannot have: use a vision encoder of images of one size, such as CLIP or SigLIP."
        )
    prepared = [torch.as_tensor(np.asarray(image)) for image in outputs["pixel_values"]]
    if prepared[0].ndim == 4:  # VideoMAE's makes one video of all frames
        prepared = list(prepared[0])
    if len({image.shape for image in prepared}) > 1:
        sizes = " and ".join(sorted({f"{image.shape[-1]} x {image.shape[-2]}" for image in prepared})[:2])
        raise ValueError(
            f"The frames of the videos are prepared to different sizes, such as {sizes} pixels: let the image "
            "processor resize and crop them, or give frames of one size."
        )
    parts = torch.stack(prepared).split(lengths)
    batch = {"pixel_values": pad_sequence(parts, batch_first=True)}  # padding is zeros
    if min(lengths) < max(lengths):
        ones = [torch.ones(length, dtype=torch.long) for length in lengths]
        batch["frame_attention_mask"] = pad_sequence(ones, batch_first=True)
    return dict(BatchFeature(batch, tensor_type=return_tensors))


def prepare_features(
    image_embeds: torch.Tensor | np.ndarray | Sequence[Any],
    image_attention_mask: torch.Tensor | None,
    return_tensors: str | None = None,
) -> dict[str, Any]:
    """Return features as a batch: `image_embeds` `[B, N, Dv]` and, with padding, `image_attention_mask` `[B, N]`.

    Args:
        image_embeds: one row `[N, Dv]`, a list of rows, or a batch `[B, N, Dv]`, of videos `[B, F, N, Dv]`.
        image_attention_mask: mask of a batch.
        return_tensors: type of the result.

    Raises:
        TypeError: if the features are not numbers.
        ValueError: if the features or their mask have another shape.
    """
    ndim = image_embeds.ndim if isinstance(image_embeds, torch.Tensor | np.ndarray) else None
    if ndim in (3, 4):
        batch = {"image_embeds": torch.as_tensor(image_embeds)}
        if image_attention_mask is not None:
            batch["image_attention_mask"] = feature_mask(batch["image_embeds"], image_attention_mask)
    elif image_attention_mask is None:
        batch = pad_features([image_embeds] if ndim == 2 else list(image_embeds))
    else:
        raise ValueError(
            "`image_attention_mask` belongs to a batch of features [B, N, D]: leave it out for a list of rows, which "
            "is padded here."
        )
    return dict(BatchFeature(batch, tensor_type=return_tensors))


class PushWithCard(PushToHubMixin):
    """Mixin whose `push_to_hub` writes a model card that shows how to use the repository.

    transformers creates a card with empty sections, "[More Information Needed]", for every new repository. Its
    `push_to_hub` has no argument for a card, so the mixin replaces that card before the upload.

    Attributes:
        feature_width (`int`, *optional*): width of the features of a captioner without a vision encoder.
    """

    feature_width: int | None = None

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        card = os.path.join(working_dir, "README.md")
        if os.path.exists(card) and "[More Information Needed]" in ModelCard.load(card).text:
            data = ModelCardData(
                library_name="transformers",
                pipeline_tag=None if self.feature_width else "image-text-to-text",
                tags=[*([] if self.feature_width else ["image-captioning"]), "q-former", "qformer-captioner"],
            )
            name, width = repo_id.split("/")[-1], self.feature_width
            ModelCard.from_template(data, template_str=CARD, repo_id=repo_id, name=name, feature_width=width).save(card)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class QFormerCaptionerProcessor(PushWithCard, ProcessorMixin):
    r"""Processor that prepares the inputs of a [`QFormerCaptioner`] and decodes its captions.

    A Q-Former that also reads the prompt (InstructBLIP, arXiv 2305.06500) has its own tokenizer:
    `processor.qformer_tokenizer`.

    Args:
        image_processor: image processor of the vision encoder.
        tokenizer: tokenizer of the language model. Without a padding token it pads with the end-of-sequence token,
            because attention masks mark the padding.
        chat_template (`str`, *optional*): template of `apply_chat_template`; by default the plain text of the messages.
        prompt (`str`, defaults to `""`): default text between the image and the caption.
        is_encoder_decoder (`bool`, defaults to `False`): whether the language model is an encoder-decoder. If it is,
            prompts are padded on the right, and captions get the special tokens of the tokenizer. For a decoder-only
            model, prompts are padded on the left, and captions get only the end-of-sequence token.
        language_chat_template (`str`, *optional*): chat template of the language model for
            [`~QFormerCaptionerProcessor.as_chat`]; defaults to the tokenizer's.
        use_chat_template (`bool`, defaults to `False`): whether the language model reads each prompt as a user's turn
            in its chat template. The tokenizer of a Q-Former gets the prompt without the template.
        num_frames (`int`, defaults to 1): largest number of frames to read of a video. Longer videos are sampled
            evenly. With 1, only images are read.

    Example:

    ```python
    >>> processor = QFormerCaptionerProcessor.from_backbones(
    ...     "facebook/dinov2-small", "openai-community/gpt2"
    ... )  # doctest: +SKIP
    >>> batch = processor(images=["dog.jpg", "cat.jpg"], text="A photo of")  # doctest: +SKIP
    >>> batch.pixel_values.shape, batch.input_ids.shape  # doctest: +SKIP
    (torch.Size([2, 3, 224, 224]), torch.Size([2, 3]))
    ```
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        prompt: str = "",
        is_encoder_decoder: bool = False,
        language_chat_template: str | None = None,
        use_chat_template: bool = False,
        num_frames: int = 1,
    ):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if chat_template is None:
            chat_template = PLAIN_TEXT_TEMPLATE
        # In a saved folder our template replaces the tokenizer's own, so this argument keeps the tokenizer's.
        template_of_tokenizer = tokenizer.chat_template if tokenizer.chat_template != chat_template else None
        self.language_chat_template = language_chat_template or template_of_tokenizer
        self.prompt = prompt
        self.is_encoder_decoder = is_encoder_decoder
        self.use_chat_template = use_chat_template
        self.num_frames = num_frames
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # Not an argument of the constructor: ProcessorMixin would require it, and most Q-Formers read no prompt.
        self.qformer_tokenizer: PreTrainedTokenizerBase | None = None

    # --- Folders and the Hub ------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save the processor as `ProcessorMixin.save_pretrained` does, and the Q-Former's tokenizer in a subfolder."""
        folder = os.path.join(save_directory, QFORMER_TOKENIZER)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(folder)
        else:  # loading would read the one of an earlier processor
            shutil.rmtree(folder, ignore_errors=True)
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # takes the options of the Hub as keywords only
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "QFormerCaptionerProcessor":
        """Load a processor as `ProcessorMixin.from_pretrained` does, and the Q-Former's tokenizer if it was saved."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        hub_kwargs["subfolder"] = os.path.join(kwargs.get("subfolder") or "", QFORMER_TOKENIZER)
        optional = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
        if cached_file(pretrained_model_name_or_path, "tokenizer_config.json", **optional):
            processor.qformer_tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        return processor

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike | None,
        language: str | os.PathLike,
        vision_revision: str | None = None,
        language_revision: str | None = None,
        prompt: str = "",
        is_encoder_decoder: bool = False,
        num_frames: int = 1,
    ) -> "QFormerCaptionerProcessor":
        """Join the image processor of one pretrained model and the tokenizer of another.

        Args:
            vision, language (`str`): Hub ids or folders. `vision` is `None` for a captioner that reads only features,
                which refuses the images that its processor prepares.
            vision_revision, language_revision (`str`, *optional*): branch, tag or commit.
            prompt (`str`, defaults to `""`): default text between the image and the caption.
            is_encoder_decoder (`bool`, defaults to `False`): whether the language model is an encoder-decoder.
            num_frames (`int`, defaults to 1): largest number of frames to read of a video.

        Raises:
            OSError: if the image processor or the tokenizer cannot be fetched.
        """
        return cls(
            # transformers knows no processor of images without an image processor
            ViTImageProcessorPil() if vision is None else load_image_processor(vision, vision_revision),
            AutoTokenizer.from_pretrained(language, revision=language_revision, trust_remote_code=False),
            prompt=prompt,
            is_encoder_decoder=is_encoder_decoder,
            num_frames=num_frames,
        )

    @classmethod
    def from_folder_if_any(cls, folder: str | os.PathLike, **hub_kwargs: Any) -> "QFormerCaptionerProcessor | None":
        """Load the processor of a folder or Hub repository, or return `None` if it has no processor."""
        processor_file = cached_file(
            folder,
            PROCESSOR_NAME,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_kwargs,
        )
        if processor_file is None:
            return None
        # This class may run from the code of a Hub folder. The user has then trusted that code, and loading the
        # tokenizer must not ask again. The class of the installed package executes no code of a folder.
        trusted = cls.__module__.startswith("transformers_modules.")
        return cls.from_pretrained(folder, trust_remote_code=trusted, **hub_kwargs)

    # --- Images and prompts -------------------------------------------------------------------------------------------

    @staticmethod
    def open_image(image: ImageInput, name: str | None = None) -> Image.Image:
        """Open an image as the processor does: upright RGB, transparent pixels white.

        Args:
            image: path, URL, bytes, array, tensor, PIL image, or another form that [`open_image`] takes.
            name: name of the image in error messages.

        Raises:
            OSError: if the image cannot be read; the message names it and says what it is.
            TypeError: if the image is of a type that does not hold images.
            ValueError: if an array does not have the shape or the values of an image.
        """
        return open_image(image, name)

    def __call__(
        self,
        images: ImageInput | Iterable[ImageInput | Iterable[ImageInput]] | None = None,
        text: str | Sequence[str] | None = None,
        image_embeds: torch.Tensor | np.ndarray | Sequence[Any] | None = None,
        image_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Convert images, or features of them, and prompts to a batch of padded torch tensors.

        Args:
            images (*optional*): an image to caption, in any form that [`open_image`] takes, or several: a list, a
                column of `datasets`, or an array `[B, H, W, C]` or `[B, C, H, W]`. A video is a list of frames or an
                array `[F, H, W, C]` inside the list; an inner list of one image is that image.
            text (`str` or list of `str`, *optional*): one prompt for all images, or one for each. A missing or empty
                prompt is replaced by the prompt of the processor.
            image_embeds (*optional*): features in place of images: of one row (`[N, Dv]`), or of several in a list,
                whose N may differ, or in a batch `[B, N, Dv]`.
            image_attention_mask (`[B, N]`, *optional*): mask of a batch of features, or of those that the vision
                encoder returns for images: 0 for features that the Q-Former ignores.
            kwargs: options of the image processor, such as `do_resize=False`, and of the tokenizer, such as
                `max_length=20` with `truncation=True`. A tokenizer of the Q-Former gets the same options, but pads on
                the right. `images_kwargs` and `text_kwargs` hold options of one of them. `num_frames` replaces that of
                the processor.

        Returns:
            `pixel_values` (`[B, 3, H, W]`, float), if there are images. With a video among them they are
            `[B, F, 3, H, W]`, and images are videos of one frame. What else the encoder reads of images
            (`ENCODER_INPUTS`). `frame_attention_mask` (`[B, F]`, long) only if videos differ in length: 1 for a frame,
            0 for padding, which is zeros. `image_embeds` (`[B, N, Dv]`), if there are features, and
            `image_attention_mask` (bool `[B, N]`), if rows differ in length. `input_ids` and `attention_mask`
            (`[B, P]`, long; P may be 0). With a `qformer_tokenizer` also `qformer_input_ids` and
            `qformer_attention_mask` (`[B, P']`, long). `return_tensors` sets their type, which is `"pt"` by default.

        Raises:
            OSError: if an image cannot be read; the message names it.
            TypeError: if an image is of a type that does not hold images.
            ValueError: if there are neither images nor features nor prompts, or both images and features. Also if the
                number of prompts is neither one nor the number of images. Also if an array does not have the shape or
                the values of an image. Also for a video without frames, with frames of different sizes, or if
                `num_frames` is 1.
        """
        if images is None and text is None and image_embeds is None:
            raise ValueError("There is nothing to process: pass `images` or `image_embeds`, `text` or both.")
        if images is not None and image_embeds is not None:
            raise ValueError("Pass either `images` or their features (`image_embeds`), not both.")
        options = self._merge_kwargs(
            self.valid_processor_kwargs,  # type: ignore[arg-type]  # the stub asks for an instance of the class
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        # The tokenizer's own `padding_side` is that of its pretraining, so only the caller's replaces ours.
        asked = {**kwargs, **kwargs.get("text_kwargs", {})}
        text_options = {"padding": True, "return_token_type_ids": False, **options["text_kwargs"]}
        text_options["padding_side"] = asked.get("padding_side", "right" if self.is_encoder_decoder else "left")
        return_tensors = text_options.pop("return_tensors", "pt")

        batch: dict[str, Any] = {}
        videos = (
            []
            if images is None
            else self._frames_of_each(images, options["videos_kwargs"].get("num_frames", self.num_frames))
        )
        if videos:
            batch.update(self._prepare(videos, {"return_tensors": return_tensors, **options["images_kwargs"]}))
            if image_attention_mask is not None:  # of the features that the vision encoder will return
                batch["image_attention_mask"] = torch.as_tensor(image_attention_mask)
        elif image_embeds is not None:
            batch.update(prepare_features(image_embeds, image_attention_mask, return_tensors))
        prompts = self._prompts_for(text, len(batch["image_embeds"]) if image_embeds is not None else len(videos))
        texts = [self.format_prompt(prompt) for prompt in prompts]
        batch.update(tokenize_prompts(self.tokenizer, texts, return_tensors, text_options))
        if self.qformer_tokenizer is not None:
            text_options["padding_side"] = "right"
            tokens = tokenize_prompts(self.qformer_tokenizer, prompts, return_tensors, text_options)
            batch.update({f"qformer_{name}": value for name, value in tokens.items()})
        return BatchFeature(batch)

    def _frames_of_each(
        self, images: ImageInput | Iterable[ImageInput | Iterable[ImageInput]], num_frames: int
    ) -> list[list[ImageInput]]:
        """Return the frames to read of each video, at most `num_frames`. An image is a video of one frame."""
        videos = []
        for number, entry in enumerate(flatten_images(images), start=1):
            frames = entry if isinstance(entry, list) else [entry]
            if len(frames) > 1 and num_frames == 1:
                raise ValueError(
                    f"This captioner reads one image for each prompt, but entry {number} of the images has "
                    f"{len(frames)}: give it one image, or train a captioner of videos with `num_frames` above 1."
                )
            videos.append(sample_frames(frames, num_frames))
        return videos

    def _prepare(self, videos: list[list[ImageInput]], options: dict[str, Any]) -> dict[str, Any]:
        """Return the pixel values of images, or those of videos with the mask of their frames if they need one."""
        frames = [frame for video in videos for frame in video]
        data_format = options.pop("input_data_format", None)
        upright = [open_image(frame, input_data_format=data_format) for frame in frames]
        if are_floats(frames):
            options.pop("do_rescale", None)  # says that floats are from 0 to 1, but `upright` has 8 bits
        lengths = [len(video) for video in videos]
        if max(lengths) == 1:
            return prepare_images(self.image_processor, upright, **options)
        return prepare_videos(self.image_processor, upright, lengths, **options)

    def format_prompt(self, prompt: str) -> str:
        """Return a prompt as the language model reads it: in its chat template with `use_chat_template`."""
        return self.as_chat(prompt) if self.use_chat_template else prompt

    def as_chat(self, prompt: str) -> str:
        """Format a prompt as a user's turn in the chat template of the language model, up to the start of its answer.

        Raises:
            ValueError: if the tokenizer of the language model has no chat template.
        """
        if self.language_chat_template is None:
            raise ValueError("The language model's tokenizer has no chat template: leave out --use_chat_template.")
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            chat_template=self.language_chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        bos = self.tokenizer.bos_token
        if bos is not None and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]:
            text = text.removeprefix(bos)  # the tokenizer adds one itself
        return text

    def _prompts_for(self, text: str | Sequence[str] | None, number_of_images: int) -> list[str]:
        """Return one prompt for each image; without images, one for each text."""
        prompts = [text] if text is None or isinstance(text, str) else list(text)
        if len(prompts) == 1 and number_of_images > 1:
            prompts = prompts * number_of_images
        if number_of_images and len(prompts) != number_of_images:
            raise ValueError(
                f"There are {number_of_images} inputs but {len(prompts)} prompts: give one prompt, or one for each."
            )
        return [prompt or self.prompt for prompt in prompts]

    # --- Captions -----------------------------------------------------------------------------------------------------

    def encode_caption(self, caption: str, prompt: str | None = None, max_length: int | None = None) -> list[int]:
        """Return the token ids that the model should generate for a caption, end-of-sequence included.

        Special tokens inside the text are removed, so that a caption can neither end early nor imitate a chat turn.

        Args:
            caption (`str`): text of the caption.
            prompt (`str`, *optional*): prompt in front of the caption; defaults to the prompt of the processor.
            max_length (`int`, *optional*): maximum number of tokens, end-of-sequence included.

        Returns:
            A list of at most `max_length` ids.

        Raises:
            ValueError: if the caption is empty.

        Example:

        ```python
        >>> processor.encode_caption("a dog", max_length=20)  # doctest: +SKIP
        [64, 3290, 50256]
        ```
        """
        caption = caption.strip()
        if not caption:
            raise ValueError("A caption is empty. Leave out the row, or give it a text.")
        # `split_special_tokens` below is not enough: the vocabulary of T5 also has "</s>" as an ordinary token.
        caption = re.sub("|".join(map(re.escape, self.tokenizer.all_special_tokens)), " ", caption).strip()
        if max_length is not None:
            caption = caption[: 100 * max_length]  # a very long text would otherwise be tokenised in full
        prompt = self.format_prompt(prompt or self.prompt)
        if not self.is_encoder_decoder and prompt and not prompt[-1].isspace():
            caption = " " + caption  # the caption follows the prompt, and tokenizers distinguish " a" from "a"
        ids = self.tokenizer(caption, add_special_tokens=self.is_encoder_decoder, split_special_tokens=True)[
            "input_ids"
        ]
        end = self.tokenizer.eos_token_id
        if end in ids:  # mBART adds a language token after it, which starts its decoder
            ids = ids[: ids.index(end)]
        return [*ids[: max_length - 1 if max_length else None], end]


QFormerCaptionerProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["QFormerCaptionerProcessor"]
