"""Web page that captions images with a Q-Former captioner and shows the image patches that it attends to.

    python app.py --model outputs/mine    # folder or Hub id of a captioner or an adapter

On a Space, the variable `MODEL_ID` names the model and `MODEL_REVISION` pins its commit.
"""

import argparse
import base64
import html
import io
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import attention
import gradio as gr
import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoModel, PreTrainedModel, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils.hub import cached_file

MAX_PROMPT_LENGTH = 300  # characters
MAX_EXAMPLES = 24
GREEDY, SAMPLING, BEAMS = "greedy (streams)", "sampling (streams)", "beam search (no streaming)"
COLUMNS = {"caption": "58%", "score": "12%", "probability": "18%", "tokens": "12%"}
HOW_TO_READ = """
Each map shows the resized and cropped image that the model reads. **The brighter a patch, the larger its weight.**

**Words:** gradient x attention, summed over the queries. Below each map are the probability of the word and the two
queries that contribute most. **Queries:** cross-attention, averaged over layers and heads. Below each map is the share
of the attention that goes to patches; the rest goes to class and register tokens. The features of a patch also contain
its neighbours: a map shows which patches were used, but not which of their content. **Captions compared:** the score is
the mean log-probability of a token. Click a row to see the maps of that caption.
"""
CSS = """
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: .6rem; }
.maps figure { margin: 0; } .maps img { width: 100%; border-radius: 4px; }
.maps figcaption { line-height: 1.25; overflow-wrap: anywhere; } .maps small { display: block; opacity: .7; }
.status { font-size: 1.05rem; font-weight: 600; }
"""


class ImageFile(gr.Image):
    """Image component that returns the path of the uploaded file.

    gradio's own component opens the file first, and fails on an invalid file before the page can explain why.
    """

    is_template = True  # gradio renders it like the parent class

    def preprocess(self, payload) -> str | None:
        return payload.path if payload is not None else None


def open_upload(model: PreTrainedModel, path: str) -> Image.Image:
    """Open an uploaded file as the captioner's processor does, as an upright RGB image.

    Args:
        model: the captioner.
        path: path of the file.

    Raises:
        ValueError: if the file is not an image, is damaged, or has an unsuitable size. The message is shown to the
            visitor.
    """
    try:
        return model.processor.open_image(Path(path), Path(path).name)
    except OSError as error:
        raise ValueError(str(error)) from None


# --- Captions ---------------------------------------------------------------------------------------------------------


def generate_captions(
    model: PreTrainedModel,
    image: attention.EncodedImage,
    search: str,
    num_beams: int,
    max_new_tokens: int,
    num_captions: int,
) -> Iterator[tuple[str, list[list[int]]]]:
    """Generate captions of an image, and stream the text of greedy decoding and sampling.

    Beam search cannot be streamed, because the best beam is not known before the end.

    Args:
        model: the captioner.
        image: the image.
        search: `GREEDY`, `SAMPLING` or `BEAMS`.
        num_beams: number of beams, for beam search.
        max_new_tokens: the largest number of tokens of a caption.
        num_captions: number of captions, for sampling and beam search.

    Yields:
        The text so far and an empty list. At the end, the first caption and the tokens of all distinct captions.
    """
    options = {"max_new_tokens": max_new_tokens, "num_beams": 1, "num_return_sequences": 1, "do_sample": False}
    options |= image.inputs
    if search == BEAMS:
        options |= {"num_beams": num_beams, "num_return_sequences": min(num_captions, num_beams)}
        sequences = model.generate(**options).tolist()
    else:
        if search == SAMPLING:
            options |= {"do_sample": True, "top_p": 0.9}
        sequences = []
        for text in stream_caption(model, options, sequences):
            yield text, []
        if search == SAMPLING and num_captions > 1:
            sequences += model.generate(**options | {"num_return_sequences": num_captions - 1}).tolist()
    different = dict.fromkeys(tuple(cut_after_end(model, token_ids)) for token_ids in sequences)
    captions = [list(token_ids) for token_ids in different]
    yield decode(model, captions[0]), captions


def stream_caption(model: PreTrainedModel, options: dict, sequences: list[list[int]]) -> Iterator[str]:
    """Generate a caption in a separate thread.

    Args:
        model: the captioner.
        options: keyword arguments for `generate`.
        sequences: list to which the tokens of the caption are appended.

    Yields:
        The text so far.
    """
    streamer = TextIteratorStreamer(model.processor.tokenizer, skip_special_tokens=True)
    has_left = threading.Event()  # set when the visitor leaves the page

    def must_stop(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), has_left.is_set(), dtype=torch.bool, device=input_ids.device)

    def generate() -> torch.Tensor:
        try:
            return model.generate(**options, streamer=streamer, stopping_criteria=StoppingCriteriaList([must_stop]))
        finally:
            streamer.end()  # also after an error, or the loop below would never end

    with ThreadPoolExecutor(1) as pool:
        generated = pool.submit(generate)
        try:
            text = ""
            for piece in streamer:
                text += piece
                yield text.strip()
        finally:
            has_left.set()
        sequences += generated.result().tolist()


def cut_after_end(model: PreTrainedModel, token_ids: list[int]) -> list[int]:
    """Remove the padding after the end-of-sequence token."""
    end_ids = model.generation_config.eos_token_id
    end_ids = {end_ids} if isinstance(end_ids, int) else set(end_ids or ())
    length = next((index + 1 for index, token_id in enumerate(token_ids) if token_id in end_ids), len(token_ids))
    return token_ids[:length]


def decode(model: PreTrainedModel, token_ids: list[int]) -> str:
    return model.processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def caption_rows(model: PreTrainedModel, image: attention.EncodedImage, captions: list[list[int]]) -> list[list]:
    """Return a table row for each caption: text, mean log-probability, probability, number of tokens."""
    rows = []
    for token_ids in captions:
        log_probs = attention.token_log_probs(model, image, token_ids)
        score, probability = f"{log_probs.mean():.3f}", f"{log_probs.sum().exp():.2g}"
        rows.append([decode(model, token_ids), score, probability, len(token_ids)])
    return rows


# --- Maps -------------------------------------------------------------------------------------------------------------


def draw_maps(model: PreTrainedModel, image: attention.EncodedImage, token_ids: list[int]) -> tuple[str, str]:
    """Draw the maps of the words of a caption, and those of the queries, as HTML."""
    maps = attention.attention_maps(model, image, token_ids)
    word_maps = []
    for word in maps.words:
        largest = [f"Q{query + 1}" for query in word.queries.argsort()[::-1][:2] if word.queries[query] > 0]
        word_maps.append((word.patches, word.text, f"{word.probability:.0%} · {', '.join(largest)}"))
    query_maps = [
        (patches, f"query {number}", f"{share:.0%}")
        for number, (patches, share) in enumerate(zip(maps.queries, maps.patch_share, strict=True), start=1)
    ]
    return (
        figures_html("Image patches of each word", image.picture, word_maps),
        figures_html("Image patches of each query", image.picture, query_maps),
    )


def figures_html(heading: str, picture: Image.Image, maps: list[tuple[np.ndarray, str, str]]) -> str:
    """Return a heading and overlays of a picture as HTML.

    Args:
        heading: text above the overlays.
        picture: the image.
        maps: weight of each patch `[rows, columns]`, name and note of each overlay.
    """
    figures = []
    for patches, name, remark in maps:
        file = io.BytesIO()
        attention.overlay(picture, patches).save(file, "JPEG", quality=85)
        source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        text = f"<b>{html.escape(name)}</b><small>{html.escape(remark)}</small>"
        figures.append(f'<figure><img alt="" src="{source}"><figcaption>{text}</figcaption></figure>')
    return f'<h3>{html.escape(heading)}</h3><div class="maps">{"".join(figures)}</div>'


def status_html(text: str) -> str:
    return f'<p class="status" role="status">{html.escape(text)}</p>'


# --- The page ---------------------------------------------------------------------------------------------------------


class CaptionPage:
    """Page of a captioner. `blocks` is the gradio app.

    Args:
        model: the captioner.
        name: name of the captioner to show.
        examples: paths of example images.
    """

    def __init__(self, model: PreTrainedModel, name: str, examples: list[str]):
        self.model = model
        title = f"Captions by {name}"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            gr.HTML(f"<h1>Caption an image, and see which patches the model uses</h1><p>Model: {html.escape(name)}</p>")
            with gr.Row():
                with gr.Column(scale=2):
                    self.add_inputs()
                with gr.Column(scale=3):
                    self.add_outputs()
            self.query_maps = gr.HTML(elem_id="queries")
            gr.Markdown(HOW_TO_READ)
            if examples:
                gr.Examples(examples, inputs=[self.image], label="Examples", cache_examples=False, examples_per_page=12)
            self.tokens_of_caption = gr.State({})
            self.connect()

    def add_inputs(self) -> None:
        default_length = self.model.generation_config.max_new_tokens
        self.image = ImageFile(label="Image", height=320, sources=["upload", "clipboard"], elem_id="image")
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder=self.model.processor.prompt or "(none)",
            max_length=MAX_PROMPT_LENGTH,
            elem_id="prompt",
        )
        self.search = gr.Radio([GREEDY, SAMPLING, BEAMS], value=GREEDY, label="Search", elem_id="search")
        self.num_beams = gr.Slider(2, 10, value=5, step=1, label="Beams")
        self.num_captions = gr.Slider(1, 10, value=5, step=1, label="Captions to compare (sampling, beam search)")
        self.max_tokens = gr.Slider(1, max(default_length, 50), value=default_length, step=1, label="Maximum tokens")
        self.button = gr.Button("Caption", variant="primary", elem_id="go")

    def add_outputs(self) -> None:
        self.caption = gr.Textbox(label="Caption", lines=2, interactive=False, elem_id="caption")
        self.status = gr.HTML(elem_id="status")
        self.candidates = gr.Dataframe(
            headers=list(COLUMNS),
            column_widths=list(COLUMNS.values()),
            datatype="str",
            interactive=False,
            label="Captions compared",
            wrap=True,
            max_height=700,
            elem_id="candidates",
        )
        self.word_maps = gr.HTML(elem_id="words")

    def connect(self) -> None:
        """Run [`~CaptionPage.caption_image`] and [`~CaptionPage.show_candidate`] on the visitor's actions."""
        # One request at a time, because all share the model.
        shared = {"concurrency_id": "captioner", "concurrency_limit": 1, "show_progress": "hidden"}
        maps = [self.status, self.word_maps, self.query_maps]
        gr.on(
            [self.image.change, self.button.click, self.prompt.submit],
            self.caption_image,
            inputs=[self.image, self.prompt, self.search, self.num_beams, self.max_tokens, self.num_captions],
            outputs=[self.caption, self.candidates, self.tokens_of_caption, *maps],
            trigger_mode="always_last",
            api_name="caption",
            **shared,
        )
        inputs = [self.image, self.prompt, self.tokens_of_caption]
        self.candidates.select(self.show_candidate, inputs, maps, api_visibility="private", **shared)

    def caption_image(
        self, path: str | None, prompt: str, search: str, num_beams: int, max_tokens: int, num_captions: int
    ) -> Iterator[dict]:
        """Caption an image; yield the outputs that change."""
        blank = {self.caption: "", self.candidates: gr.update(value=[]), self.tokens_of_caption: {}}
        blank |= {self.status: "", self.word_maps: "", self.query_maps: ""}
        if path is None:
            yield blank
            return
        try:
            yield blank | {self.status: status_html("Reading the image ...")}
            image = attention.encode_image(self.model, open_upload(self.model, path), prompt[:MAX_PROMPT_LENGTH])
            sizes = int(num_beams), int(max_tokens), int(num_captions)
            for text, captions in generate_captions(self.model, image, search, *sizes):  # noqa: B007, used below
                yield {self.caption: text, self.status: status_html("Writing ...")}
        except ValueError as error:  # an invalid image, or more tokens than the language model accepts
            yield blank | {self.status: status_html(f"⚠ {error}")}
            return
        rows = caption_rows(self.model, image, captions)
        by_text = {row[0]: token_ids for row, token_ids in zip(rows, captions, strict=True)}  # visitors may sort rows
        result = {self.caption: text, self.candidates: rows, self.tokens_of_caption: by_text}
        yield result | {self.status: status_html("Drawing maps ...")}
        yield result | self.draw(image, captions[0])  # all outputs, because API callers get the last ones

    def show_candidate(
        self, path: str | None, prompt: str, tokens_of_caption: dict[str, list[int]], selection: gr.SelectData
    ) -> dict:
        """Draw the maps of the caption in the selected row."""
        token_ids = tokens_of_caption.get(selection.row_value[0])
        if path is None or token_ids is None:
            return {self.status: ""}
        return self.draw(
            attention.encode_image(self.model, open_upload(self.model, path), prompt[:MAX_PROMPT_LENGTH]), token_ids
        )

    def draw(self, image: attention.EncodedImage, token_ids: list[int]) -> dict:
        if image.grid is None:
            return {self.status: status_html("The vision encoder has no grid of patches to draw maps on.")}
        word_maps, query_maps = draw_maps(self.model, image, token_ids)
        return {self.word_maps: word_maps, self.query_maps: query_maps, self.status: ""}


# --- The program ------------------------------------------------------------------------------------------------------


def load_captioner(model_name_or_path: str, revision: str | None) -> PreTrainedModel:
    """Load a captioner whose Q-Former has eager attention, because only eager attention returns its weights.

    Args:
        model_name_or_path: folder or Hub id of a captioner or an adapter.
        revision: branch, tag or commit on the Hub. For an adapter, it does not apply to the base captioner.

    Raises:
        OSError: if the model cannot be fetched, is not a captioner with a language model, or has no processor.
    """
    adapter_config = cached_file(
        model_name_or_path, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    hub_kwargs = {}
    if revision is not None:
        hub_kwargs = {"revision": revision} if adapter_config is None else {"adapter_kwargs": {"revision": revision}}
    model = AutoModel.from_pretrained(
        model_name_or_path,
        **hub_kwargs,
        trust_remote_code=True,
        attn_implementation={"qformer_config": "eager"},
    )
    if model.config.model_type != "qformer_captioner":
        raise OSError(
            f"{model_name_or_path!r} holds a {type(model).__name__}, but the demo shows captioners with a language "
            "model: train one first, which may begin with this model (`--qformer_name_or_path`)."
        )
    if model.processor is None:
        raise OSError(f"{model_name_or_path!r} holds a model without a processor.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def find_examples(
    model: PreTrainedModel, folder: str | None, model_name_or_path: str, revision: str | None
) -> list[str]:
    """Return the paths of example images. Files that are not suitable images are reported and left out.

    Args:
        model: the captioner.
        folder: folder of images; by default the folder `examples` beside the weights of the model.
        model_name_or_path: folder or Hub id of the model.
        revision: branch, tag or commit on the Hub.

    Raises:
        OSError: if the folder does not exist.
    """
    if folder is None:
        home = Path(model_name_or_path)
        if not home.is_dir():
            home = Path(snapshot_download(model_name_or_path, revision=revision, allow_patterns="examples/*"))
        folder = str(home / "examples")
    elif not Path(folder).is_dir():
        raise OSError(f"The folder {folder!r} of examples does not exist.")
    examples = []
    for path in sorted(Path(folder).glob("*"))[:MAX_EXAMPLES]:
        try:
            open_upload(model, str(path))
            examples.append(str(path))
        except ValueError as error:
            print(f"The example {path.name!r} is left out. {error}", file=sys.stderr)
    return examples


def main() -> None:
    """Load a captioner and serve its page."""
    parser = argparse.ArgumentParser(description="Caption images in the browser, with attention maps.")
    parser.add_argument(
        "--model",
        default=os.environ.get("MODEL_ID"),
        help="Folder or Hub id of a captioner or an adapter. By default the environment variable MODEL_ID.",
    )
    parser.add_argument(
        "--revision",
        default=os.environ.get("MODEL_REVISION"),
        help="Branch, tag or commit on the Hub. By default the environment variable MODEL_REVISION.",
    )
    parser.add_argument(
        "--examples", help="Folder of example images. By default the folder `examples` beside the weights of the model."
    )
    parser.add_argument("--port", type=int, help="Port of the server. By default the first free port from 7860 on.")
    parser.add_argument(
        "--share", action="store_true", help="Create a public address that forwards to this machine (gradio's servers)."
    )
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("name a model with --model, or with the variable MODEL_ID on a Space")
    try:
        model = load_captioner(arguments.model, arguments.revision)
        examples = find_examples(model, arguments.examples, arguments.model, arguments.revision)
    except Exception as error:  # each kind of damaged folder raises another class
        sys.exit(f"{arguments.model!r} cannot be shown: {(str(error) or type(error).__name__).splitlines()[0]}")
    CaptionPage(model, arguments.model, examples).blocks.launch(
        server_port=arguments.port,
        share=arguments.share,
        max_file_size="30mb",
        ssr_mode=False,  # server-side rendering needs Node
        footer_links=[],
        css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


if __name__ == "__main__":
    main()
