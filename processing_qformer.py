"""Inputs and outputs of models: images to pixel values, prompts and captions to tokens, tokens to text.

A `QFormerCaptionerProcessor` joins the image processor of the vision encoder and the tokenizer of the language model.
The language model needs no `<image>` token: the model puts the soft prompt in front of the embedded prompt. A
`QFormerPretrainingProcessor` joins an image processor and the tokenizer of the Q-Former.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, ViTImageProcessorPil
from transformers.utils import PROCESSOR_NAME
from transformers.utils.hub import cached_file

from .cards_qformer import PushWithCaptionerCard, PushWithCard, PushWithPretrainingCard
from .images_qformer import ImageInput, are_floats, flatten_images, open_image, sample_frames
from .inputs_qformer import (
    load_image_processor,
    prepare_features,
    prepare_images,
    prepare_videos,
    tokenize_texts,
    without_special_tokens,
)

QFORMER_TOKENIZER = "qformer_tokenizer"  # subfolder of a saved processor
BOS_TOKEN = "[DEC]"  # of LAVIS, which starts the captions of a Q-Former
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


class QFormerProcessor(PushWithCard, ProcessorMixin):
    """Base class for processors, with what they have in common: images, videos, features and saved folders.

    Subclasses have constructors of their own, because `ProcessorMixin` reads the names of its parts from them.
    """

    num_frames: int  # largest number of frames of a video
    prompt: str = ""  # text that captions continue

    @classmethod
    def from_folder_if_any(cls, folder: str | os.PathLike, **hub_kwargs: Any) -> Self | None:
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

    def _image_inputs(
        self,
        images: ImageInput | Iterable[ImageInput | Iterable[ImageInput]] | None,
        image_embeds: torch.Tensor | np.ndarray | Sequence[Any] | None,
        image_attention_mask: torch.Tensor | None,
        options: dict[str, dict[str, Any]],
        return_tensors: str | None,
    ) -> tuple[dict[str, Any], int]:
        """Return the inputs of a batch that come from images or from features, and the number of its rows.

        Args:
            images, image_embeds, image_attention_mask: as in the call of the processor.
            options: `images_kwargs` and `videos_kwargs`, as `_merge_kwargs` returns them.
            return_tensors: type of the inputs.

        Raises:
            ValueError: if both images and features are given.
        """
        if images is not None and image_embeds is not None:
            raise ValueError("Pass either `images` or their features (`image_embeds`), not both.")
        if image_embeds is not None:
            batch = prepare_features(image_embeds, image_attention_mask, return_tensors)
            return batch, len(batch["image_embeds"])
        if images is None:
            return {}, 0
        videos = self._frames_of_each(images, options["videos_kwargs"].get("num_frames", self.num_frames))
        if not videos:
            return {}, 0
        batch = self._prepare(videos, {"return_tensors": return_tensors, **options["images_kwargs"]})
        if image_attention_mask is not None:  # of the features that the vision encoder will return
            batch["image_attention_mask"] = torch.as_tensor(image_attention_mask)
        return batch, len(videos)

    def _frames_of_each(
        self, images: ImageInput | Iterable[ImageInput | Iterable[ImageInput]], num_frames: int
    ) -> list[list[ImageInput]]:
        """Return the frames to read of each video, at most `num_frames`. An image is a video of one frame."""
        videos = []
        for number, entry in enumerate(flatten_images(images), start=1):
            frames = entry if isinstance(entry, list) else [entry]
            if len(frames) > 1 and num_frames == 1:
                raise ValueError(
                    f"This model reads one image in each row, but entry {number} of the images has {len(frames)}: "
                    "give it one image, or train a model of videos with `num_frames` above 1."
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


class QFormerCaptionerProcessor(PushWithCaptionerCard, QFormerProcessor):
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

    # --- Images and prompts -------------------------------------------------------------------------------------------

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

        batch, rows = self._image_inputs(images, image_embeds, image_attention_mask, options, return_tensors)
        prompts = self._prompts_for(text, rows)
        texts = [self.format_prompt(prompt) for prompt in prompts]
        batch.update(tokenize_texts(self.tokenizer, texts, return_tensors, text_options))
        if self.qformer_tokenizer is not None:
            text_options["padding_side"] = "right"
            tokens = tokenize_texts(self.qformer_tokenizer, prompts, return_tensors, text_options)
            batch.update({f"qformer_{name}": value for name, value in tokens.items()})
        return BatchFeature(batch)

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
        caption = without_special_tokens(self.tokenizer, caption)
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


class QFormerPretrainingProcessor(PushWithPretrainingCard, QFormerProcessor):
    r"""Processor that prepares the inputs of a [`QFormerForPretraining`] and decodes its captions.

    Args:
        image_processor: image processor of the vision encoder.
        tokenizer: tokenizer of the Q-Former, such as BERT's. If it has no token that starts a caption, it gets `[DEC]`,
            as in LAVIS. Its length is then the size of the vocabulary that the Q-Former needs.
        num_frames (`int`, defaults to 1): largest number of frames to read of a video. Longer videos are sampled
            evenly. With 1, only images are read.

    Raises:
        ValueError: if the tokenizer does not have the tokens `[CLS]`, `[SEP]` and `[PAD]`.

    Example:

    ```python
    >>> processor = QFormerPretrainingProcessor.from_backbones(
    ...     "facebook/dinov2-small", "google-bert/bert-base-uncased"
    ... )  # doctest: +SKIP
    >>> batch = processor(images=["dog.jpg"], text=["a dog", "two cats"])  # doctest: +SKIP
    >>> batch.pixel_values.shape, batch.input_ids.shape  # doctest: +SKIP
    (torch.Size([1, 3, 224, 224]), torch.Size([2, 4]))
    ```
    """

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerBase, num_frames: int = 1):
        for name in ("cls_token", "sep_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(
                    f"The tokenizer of a Q-Former needs a `{name}`, which {type(tokenizer).__name__} lacks: use a "
                    "tokenizer such as that of google-bert/bert-base-uncased, or set the token."
                )
        if tokenizer.bos_token is None:
            tokenizer.add_special_tokens({"bos_token": BOS_TOKEN})
        self.num_frames = num_frames
        super().__init__(image_processor, tokenizer)

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike | None,
        text: str | os.PathLike | PreTrainedTokenizerBase,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        num_frames: int = 1,
    ) -> "QFormerPretrainingProcessor":
        """Join the image processor of one pretrained model and the tokenizer of another.

        Args:
            vision (`str`, *optional*): Hub id or folder. `None` for a model that reads only features.
            text (`str` or tokenizer): Hub id or folder of a model with BERT's tokenizer, or a tokenizer.
            vision_revision, text_revision (`str`, *optional*): branch, tag or commit.
            num_frames (`int`, defaults to 1): largest number of frames to read of a video.

        Raises:
            OSError: if the image processor or the tokenizer cannot be fetched.
            ValueError: if the tokenizer lacks a token.
        """
        if not isinstance(text, PreTrainedTokenizerBase):
            text = AutoTokenizer.from_pretrained(text, revision=text_revision, trust_remote_code=False)
        image_processor = ViTImageProcessorPil() if vision is None else load_image_processor(vision, vision_revision)
        return cls(image_processor, text, num_frames=num_frames)

    def __call__(
        self,
        images: ImageInput | Iterable[ImageInput | Iterable[ImageInput]] | None = None,
        text: str | Sequence[str] | None = None,
        image_embeds: torch.Tensor | np.ndarray | Sequence[Any] | None = None,
        image_attention_mask: torch.Tensor | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Convert images, or features of them, and texts to a batch of padded torch tensors.

        Args:
            images (*optional*): images or videos, as in the call of [`QFormerCaptionerProcessor`].
            text (`str` or list of `str`, *optional*): texts. Their number M does not depend on that of the images.
            image_embeds (*optional*): features in place of images: of one row (`[N, Dv]`), or of several in a list,
                whose N may differ, or in a batch `[B, N, Dv]`.
            image_attention_mask (`[B, N]`, *optional*): 0 for features that the Q-Former ignores.
            max_length (`int`, *optional*): largest number of tokens of a text, `[CLS]` and `[SEP]` included. Longer
                texts are cut off at their end. By default no text is cut off.
            kwargs: options of the image processor, such as `do_resize=False`, and of the tokenizer. `images_kwargs` and
                `text_kwargs` hold options of one of them. `num_frames` replaces that of the processor.

        Returns:
            The same as [`QFormerCaptionerProcessor`] for images or features (`pixel_values`, `image_embeds` ...). Also
            `input_ids` and `attention_mask` (`[M, T]`, long) of `[CLS] text [SEP]`, if there are texts, padded on the
            right. Special tokens inside a text are removed.

        Raises:
            OSError: if an image cannot be read; the message names it.
            TypeError: if an image is of a type that does not hold images, or a text is not a string.
            ValueError: if there is nothing to process, if `text` is an empty list, or if `max_length` leaves no token
                of a text. Also for images as in the call of [`QFormerCaptionerProcessor`].
        """
        if images is None and text is None and image_embeds is None:
            raise ValueError("There is nothing to process: pass `images` or `image_embeds`, `text` or both.")
        options = self._merge_kwargs(
            self.valid_processor_kwargs,  # type: ignore[arg-type]  # the stub asks for an instance of the class
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        text_options = {"padding": True, "return_token_type_ids": False, **options["text_kwargs"]}
        text_options["padding_side"] = "right"  # the positions of a Q-Former count from the first column
        return_tensors = text_options.pop("return_tensors", "pt")
        batch, _ = self._image_inputs(images, image_embeds, image_attention_mask, options, return_tensors)
        if text is not None:
            if max_length is not None:
                if max_length < 3:
                    raise ValueError(
                        f"`max_length` must be at least 3, for [CLS], a token of the text and [SEP], got {max_length}."
                    )
                text_options |= {"max_length": max_length, "truncation": True, "truncation_side": "right"}
            texts = [without_special_tokens(self.tokenizer, each) for each in checked_texts(text)]
            batch.update(tokenize_texts(self.tokenizer, texts, return_tensors, text_options))
        return BatchFeature(batch)


def checked_texts(text: str | Sequence[str]) -> list[str]:
    """Return texts as a list.

    Raises:
        TypeError: if they are not strings.
        ValueError: if there are no texts.
    """
    if not isinstance(text, str | Iterable):
        raise TypeError(f"`text` must be a string or a list of strings, not {repr(text)[:100]}.")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("`text` is an empty list: give at least one text, or leave `text` out.")
    for number, each in enumerate(texts, start=1):
        if not isinstance(each, str):
            raise TypeError(f"`text` must be a string or a list of strings, but entry {number} is {repr(each)[:100]}.")
    return texts


QFormerCaptionerProcessor.register_for_auto_class("AutoProcessor")
QFormerPretrainingProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["QFormerCaptionerProcessor", "QFormerPretrainingProcessor"]
