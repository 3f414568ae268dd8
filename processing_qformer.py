"""Images and prompts into tensors, captions into labels, tokens back into text.

A `QFormerCaptionerProcessor` is an image processor (the vision encoder's) and a tokenizer (the language model's) in one
folder. The language model learns no `<image>` token: the model puts its queries in front of the prompt by itself.
"""

import base64
import io
import os
import re
from collections.abc import Sequence

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import PROCESSOR_NAME
from transformers.utils.hub import cached_file

QFORMER_TOKENIZER = "qformer_tokenizer"
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
ImageInput = str | os.PathLike | Image.Image

CARD = """---
{{ card_data }}
---

# {{ name }}

A captioner of images: a Q-Former reads what a vision encoder sees and hands a language model a short soft prompt.
Made with the package qformer-captioner.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True)
print(model.caption("image.png"))
```

`trust_remote_code=True` runs Python files of this repository: read them, and pin what you read with `revision="..."`.
The code is under Apache-2.0; weights follow the terms of the models and data that they come from.
"""

# Images come from strangers. Pillow opens many more kinds of files, some by running what is in them (PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 2**27  # half a gigabyte in memory; cameras of 100 megapixels take fewer
MAX_ASPECT_RATIO = 200  # of one pixel times thousands, an image processor makes a shorter side of 224 and gigabytes
MAX_BYTES = 2**28  # of an image that is fetched


def open_image(image: ImageInput | bytes, name: str | None = None) -> Image.Image:
    """Open a path or URL, the bytes of a file, or take a PIL image, as upright RGB.

    Args:
        image: what to open.
        name: what to call it in messages; by default its own name, where it has one.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it is not an image, a damaged one, or one of absurd size; the message names it.
    """
    if name is None and isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
    name = (name or getattr(image, "filename", "") or "without a name")[:200]
    try:
        if isinstance(image, str) and image.startswith(("http:", "https:")):
            image = fetch(image)
        elif isinstance(image, str) and image.startswith("data:"):
            image = base64.b64decode(image.partition(",")[2])
        elif isinstance(image, (str, os.PathLike)) and not os.path.isfile(image):  # a pipe would keep us waiting
            raise FileNotFoundError(f"There is no image file {name!r}.")
        if isinstance(image, Image.Image):
            return as_upright_rgb(image)
        Image.init()
        formats = [each for each in FORMATS if each in Image.OPEN]  # Pillow may be built without some
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=formats) as opened:
            return as_upright_rgb(opened)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds: truncated, unidentified, decompression bomb, bad EXIF ...
        reason = "unknown kind of file" if isinstance(error, UnidentifiedImageError) else str(error)[:200]
        raise OSError(f"The image {name!r} cannot be read, it may be damaged or no image at all ({reason}).") from error


def as_upright_rgb(image: Image.Image) -> Image.Image:
    """Refuse what would fill the memory before a pixel of it is read, or when an image processor enlarges it."""
    longer, shorter = max(image.size), min(image.size)
    if longer * shorter > MAX_PIXELS or longer > MAX_ASPECT_RATIO * shorter:
        raise ValueError(
            f"{image.width} x {image.height} pixels; the most are {MAX_PIXELS:,}, and a longer side of "
            f"{MAX_ASPECT_RATIO} times the shorter"
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def fetch(url: str) -> bytes:
    """The content of a URL.

    Raises:
        ValueError: if it is too large for an image.
    """
    content = bytearray()
    with httpx.stream("GET", url, timeout=60, follow_redirects=True) as response:
        response.raise_for_status()
        for part in response.iter_bytes():
            content += part
            if len(content) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes")
    return bytes(content)


def load_qformer_tokenizer(
    name: str | os.PathLike | None, qformer: str | os.PathLike | None, revision: str | None, vocab_size: int
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Q-Former that reads text: the one named, else the one that came with it, else BERT's.

    Raises:
        OSError: if it cannot be fetched, or has another vocabulary than the Q-Former; the message names it.
    """
    subfolder = ""
    if name is None and qformer is not None:
        name, file = qformer, f"{QFORMER_TOKENIZER}/tokenizer_config.json"
        if cached_file(qformer, file, revision=revision, _raise_exceptions_for_missing_entries=False) is not None:
            subfolder = QFORMER_TOKENIZER
    else:
        name, revision = name or "google-bert/bert-base-uncased", None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, subfolder=subfolder, trust_remote_code=False)
        # Where its files are missing, transformers makes up one of a handful of words, and says nothing.
        if not vocab_size // 2 < len(tokenizer) <= vocab_size or tokenizer.pad_token is None:
            raise ValueError(f"it knows {len(tokenizer)} words, pads with {tokenizer.pad_token}; needed: {vocab_size}")
        return tokenizer
    except (OSError, ValueError) as error:
        raise OSError(
            f"The Q-Former reads text, but its tokenizer cannot be loaded from {str(name)!r}: name one with "
            f"`qformer_tokenizer` ({str(error).splitlines()[0]})."
        ) from error


class PushWithCard:
    """A repository that has no card yet gets one from `push_to_hub` that says how to use it, and no form to fill in."""

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        card = os.path.join(working_dir, "README.md")
        if os.path.exists(card) and "[More Information Needed]" in ModelCard.load(card).text:
            data = ModelCardData(
                library_name="transformers",
                pipeline_tag="image-text-to-text",
                tags=["image-captioning", "q-former", "qformer-captioner"],
            )
            name = repo_id.split("/")[-1]
            ModelCard.from_template(data, template_str=CARD, repo_id=repo_id, name=name).save(card)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class QFormerCaptionerProcessor(PushWithCard, ProcessorMixin):
    r"""Prepares what a [`QFormerCaptioner`] reads and reads what it writes.

    Args:
        image_processor: of the vision encoder.
        tokenizer: of the language model. One without a padding token pads with its end-of-sequence token; that is safe,
            since padding is told from text by masks and never by its id.
        prompt (`str`, defaults to `""`): text between the image and the caption, where a call gives none.
        language_chat_template (`str`, *optional*): of the language model; by default the tokenizer's.
        is_encoder_decoder (`bool`, defaults to `False`): whether the language model is one. Its captions get the
            tokenizer's own special tokens; those of a decoder-only model only an end-of-sequence.

    A Q-Former that reads the prompt, too, has a tokenizer of its own: `processor.qformer_tokenizer`.

    Example:

    ```python
    >>> processor = QFormerCaptionerProcessor.from_backbones("facebook/dinov2-small", "openai-community/gpt2")
    >>> batch = processor(images=["dog.jpg", "cat.jpg"], text="A photo of")  # doctest: +SKIP
    >>> batch.pixel_values.shape, batch.input_ids.shape  # doctest: +SKIP
    (torch.Size([2, 3, 224, 224]), torch.Size([2, 3]))
    ```
    """

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template=None,
        prompt="",
        is_encoder_decoder=False,
        language_chat_template=None,
    ):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if chat_template is None:
            # Chat messages become the plain prompt: our language models are asked to caption, not to converse.
            chat_template = (
                "{% for message in messages %}{% for part in message['content'] %}"
                "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
            )
        # In a saved folder ours takes the place of the tokenizer's own, which is kept here.
        own = tokenizer.chat_template if tokenizer.chat_template != chat_template else None
        self.language_chat_template = language_chat_template or own
        self.prompt = prompt
        self.is_encoder_decoder = is_encoder_decoder
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        # No argument of `__init__`: all tokenizers that are one must be there, and most Q-Formers read no text.
        self.qformer_tokenizer: PreTrainedTokenizerBase | None = None

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> list[str]:
        """As everywhere in transformers."""
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(os.path.join(save_directory, QFORMER_TOKENIZER))
        return super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "QFormerCaptionerProcessor":
        """As everywhere in transformers."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        file = f"{QFORMER_TOKENIZER}/tokenizer_config.json"
        if cached_file(pretrained_model_name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_kwargs):
            processor.qformer_tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=QFORMER_TOKENIZER, **hub_kwargs
            )
        return processor

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike,
        language: str | os.PathLike,
        vision_revision: str | None = None,
        language_revision: str | None = None,
        prompt: str = "",
        is_encoder_decoder: bool = False,
    ) -> "QFormerCaptionerProcessor":
        """Join the image processor of one pretrained model and the tokenizer of another (Hub ids or folders)."""
        return cls(
            AutoImageProcessor.from_pretrained(vision, revision=vision_revision, trust_remote_code=False),
            AutoTokenizer.from_pretrained(language, revision=language_revision, trust_remote_code=False),
            prompt=prompt,
            is_encoder_decoder=is_encoder_decoder,
        )

    @classmethod
    def from_folder_if_any(cls, folder: str | os.PathLike, **hub_kwargs) -> "QFormerCaptionerProcessor | None":
        """The processor saved in a folder or Hub repository, `None` where there is none."""
        found = cached_file(
            folder,
            PROCESSOR_NAME,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_kwargs,
        )
        if found is None:
            return None
        # Whoever runs this line from a Hub folder has trusted its code already; the tokenizer would ask again. Of the
        # package that is installed it is not so: nobody has said that he trusts what the folder brings.
        trusted = cls.__module__.startswith("transformers_modules.")
        return cls.from_pretrained(folder, trust_remote_code=trusted, **hub_kwargs)

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Turn images and prompts into a batch.

        Args:
            images: one image or several: PIL images, paths or URLs.
            text: one prompt for all images, or one for each. Nothing, or an empty string, is the processor's `prompt`.
            kwargs: options of the image processor, such as `do_resize=False`. The result is always padded torch
                tensors.

        Returns:
            `pixel_values` (`[B, 3, H, W]`), if there are images; `input_ids` and `attention_mask` (`[B, P]`; P may
            be 0); with a `qformer_tokenizer` the same prompts as `qformer_input_ids` and `qformer_attention_mask`.

        Raises:
            OSError: for an image that cannot be read, naming it.
            ValueError: if there are neither as many prompts as images nor a single one.
        """
        batch = {}
        images = [] if images is None else _flatten(images)
        options = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        if images:
            image_options = {**options["images_kwargs"], "return_tensors": "pt"}
            pictures = [open_image(image) for image in images]
            batch["pixel_values"] = self.image_processor(pictures, **image_options)["pixel_values"]
        prompts = [text] if text is None or isinstance(text, str) else list(text)
        if len(prompts) == 1 and len(images) > 1:
            prompts = prompts * len(images)
        if images and len(prompts) != len(images):
            raise ValueError(
                f"There are {len(images)} images but {len(prompts)} prompts: give one prompt, or one each."
            )
        prompts = [prompt or self.prompt for prompt in prompts]
        batch.update(self._tokenize_prompts(prompts))
        if self.qformer_tokenizer is not None:
            words = self.qformer_tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt")
            batch["qformer_input_ids"], batch["qformer_attention_mask"] = words["input_ids"], words["attention_mask"]
        return BatchFeature(batch)

    def as_chat(self, prompt: str) -> str:
        """A prompt as a user's turn in the language model's own chat template, up to where it is to answer.

        Raises:
            ValueError: if its tokenizer has none.
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
            text = text.removeprefix(bos)  # the tokenizer adds its own, and one is enough
        return text

    def _tokenize_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        if not any(prompts) and not self.tokenizer("").input_ids:
            # Tokenizers give empty *float* tensors here.
            empty = torch.zeros(len(prompts), 0, dtype=torch.long)
            return {"input_ids": empty, "attention_mask": empty}
        encoded = self.tokenizer(
            prompts,
            padding=True,
            padding_side="right" if self.is_encoder_decoder else "left",
            return_tensors="pt",
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def encode_caption(self, caption: str, prompt: str | None = None, max_length: int | None = None) -> list[int]:
        """The token ids that the model should write for a caption, end-of-sequence included.

        Special tokens are none in a caption: whoever wrote it can neither end it early nor speak as another.

        Args:
            caption (`str`): the caption.
            prompt (`str`, *optional*): what it follows; by default the processor's own.
            max_length (`int`, *optional*): cut to so many tokens, end-of-sequence included.

        Raises:
            ValueError: if the caption is empty.
        """
        caption = caption.strip()
        if not caption:
            raise ValueError("A caption is empty. Leave out the row, or give it a text.")
        # T5 has "</s>" among its words, too, so that splitting it is not enough.
        caption = re.sub("|".join(map(re.escape, self.tokenizer.all_special_tokens)), " ", caption).strip()
        if max_length is not None:
            caption = caption[: 100 * max_length]  # or a caption of megabytes would be read whole each time
        prompt = prompt or self.prompt
        if not self.is_encoder_decoder and prompt and not prompt[-1].isspace():
            caption = " " + caption  # it goes on where the prompt ends, and tokenizers tell " a" from "a"
        ids = self.tokenizer(caption, add_special_tokens=self.is_encoder_decoder, split_special_tokens=True)[
            "input_ids"
        ]
        if self.tokenizer.eos_token_id in ids:  # mBART's writes a language behind it, with which its decoder starts
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        return [*ids[: max_length - 1 if max_length else None], self.tokenizer.eos_token_id]


def _flatten(images) -> list[ImageInput]:
    """One flat list: chat pipelines nest the images of a message."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for entry in images for image in _flatten(entry)]


QFormerCaptionerProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["QFormerCaptionerProcessor", "open_image"]
