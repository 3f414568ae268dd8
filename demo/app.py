"""A page that captions images with a Q-Former captioner and shows where it looks.

    python app.py --model outputs/mine    # or a Hub id, or an adapter's

On a Space, where nobody types a command, the model is the Space variable `MODEL_ID`, and `MODEL_REVISION` pins it.
"""

import argparse
import base64
import html
import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import attention
import gradio as gr
import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from transformers import AutoModel, PreTrainedModel, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils.hub import cached_file

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
MAX_PROMPT = 300  # characters
MAX_RATIO = 50  # of the sides: image processors that fit the shorter one make the longer one enormous
GREEDY, SAMPLING, BEAMS = "greedy (streams)", "sampling (streams)", "beam search (comes at once)"
COLUMNS = {"caption": "58%", "score": "12%", "probability": "18%", "tokens": "12%"}
HOW_TO_READ = """
Every picture is the image as the model sees it, and **the brighter a patch, the more it is looked at**.
**Words:** gradient x attention, the queries taken together; below it the word's probability, and the two queries that
it takes most from. **Queries:** cross-attention, the mean of layers and heads; below it the share of it that goes to
patches, and not to class or register tokens. Features of a patch know of its neighbours: a map says where the model
read, not what it read there. **Captions compared:** the score is the mean log-probability of a token. Click a row to
see where the words of that caption look.
"""
CSS = """
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: .6rem; }
.maps figure { margin: 0; } .maps img { width: 100%; border-radius: 4px; }
.maps figcaption { line-height: 1.25; overflow-wrap: anywhere; } .maps small { display: block; opacity: .7; }
.told { font-size: 1.05rem; font-weight: 600; }
"""


class ImageFile(gr.Image):
    """An image component that hands over the file as it is: gradio's own fails on a bad one before we can say why."""

    is_template = True  # it looks like its parent

    def preprocess(self, payload) -> str | None:
        return payload.path if payload is not None else None


def open_image(path: str) -> Image.Image:
    """Open an uploaded file as upright RGB.

    Raises:
        ValueError: if it is no image, a damaged one, or one of an absurd size; the message is for who uploaded it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(
            f"The image has far more than {MAX_PIXELS // 10**6} million pixels: make it smaller."
        ) from None
    except Exception:  # Pillow raises a dozen kinds
        raise ValueError(f"The file cannot be read as an image: use a {', '.join(FORMATS[:-1])} or BMP file.") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"The image is {width} x {height} pixels large, more than {MAX_PIXELS // 10**6} million: make it smaller."
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"The image is {width} x {height} pixels large: too narrow a strip to caption.")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception:
        raise ValueError("The image file is damaged or not complete: upload it again, or another one.") from None


# --- Captions ---------------------------------------------------------------------------------------------------------


def write(
    model: PreTrainedModel, seen: attention.Seen, search: str, beams: int, length: int, number: int
) -> Iterator[tuple[str, list[list[int]]]]:
    """Captions of an image: yields the text so far, and at last also the tokens of every caption, the best first.

    Beams cannot stream: which of them wins is not known before the end.
    """
    options = {**seen.inputs, "max_new_tokens": length, "num_beams": 1, "num_return_sequences": 1, "do_sample": False}
    if search == SAMPLING:
        options |= {"do_sample": True, "top_p": 0.9}
    tokenizer = model.processor.tokenizer
    if search == BEAMS:
        number = min(number, beams)
        found = model.generate(**options | {"num_beams": beams, "num_return_sequences": number}).tolist()
    else:
        found = []
        for text in _stream(model, options, found):
            yield text, []
        if search == SAMPLING and number > 1:
            found += model.generate(**options | {"num_return_sequences": number - 1}).tolist()
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    found = [ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))] for ids in found]
    found = [list(ids) for ids in dict.fromkeys(map(tuple, found))]
    yield tokenizer.decode(found[0], skip_special_tokens=True).strip(), found


def _stream(model: PreTrainedModel, options: dict, found: list[list[int]]) -> Iterator[str]:
    """Generates in a thread of its own; yields the text so far and adds the tokens to `found`."""
    streamer = TextIteratorStreamer(model.processor.tokenizer, skip_special_tokens=True)
    left = threading.Event()  # the visitor
    stop = StoppingCriteriaList(
        [lambda ids, scores, **_: torch.full((len(ids),), left.is_set(), dtype=torch.bool, device=ids.device)]
    )

    def generate() -> torch.Tensor:
        try:
            return model.generate(**options, streamer=streamer, stopping_criteria=stop)
        finally:
            streamer.end()  # also after an error, or the loop below would wait for ever

    with ThreadPoolExecutor(1) as pool:
        generated = pool.submit(generate)
        try:
            text = ""
            for piece in streamer:
                text += piece
                yield text.strip()
        finally:
            left.set()
        found += generated.result().tolist()


def table(model: PreTrainedModel, seen: attention.Seen, found: list[list[int]]) -> list[list]:
    """A row for every caption."""
    rows = []
    for ids in found:
        scores = attention.score(model, seen, ids)
        text = model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        rows.append([text, f"{scores.mean():.3f}", f"{scores.sum().exp():.2g}", len(ids)])
    return rows


def draw(model: PreTrainedModel, seen: attention.Seen, ids: list[int]) -> tuple[str, str]:
    """Where the words of a caption look, and where the queries do."""
    maps = attention.look(model, seen, ids)
    words = []
    for word in maps.words:
        most = [f"Q{query + 1}" for query in word.queries.argsort()[::-1][:2] if word.queries[query] > 0]
        words.append((word.patches, word.text, f"{word.probability:.0%} · {', '.join(most)}"))
    queries = [
        (patches, f"query {number}", f"{share:.0%}")
        for number, (patches, share) in enumerate(zip(maps.queries, maps.on_patches, strict=True), start=1)
    ]
    return figures("Where each word looks", seen.picture, words), figures(
        "Where each query looks", seen.picture, queries
    )


def figures(heading: str, picture: Image.Image, maps: list[tuple[np.ndarray, str, str]]) -> str:
    """A sheet of overlays, two lines of text below each."""
    drawn = []
    for patches, name, remark in maps:
        file = io.BytesIO()
        attention.overlay(picture, patches).save(file, "JPEG", quality=85)
        source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        text = f"<b>{html.escape(name)}</b><small>{html.escape(remark)}</small>"
        drawn.append(f'<figure><img alt="" src="{source}"><figcaption>{text}</figcaption></figure>')
    return f'<h3>{html.escape(heading)}</h3><div class="maps">{"".join(drawn)}</div>'


def told(text: str) -> str:
    """A message on the page."""
    return f'<p class="told" role="status">{html.escape(text)}</p>' if text else ""


# --- The page ---------------------------------------------------------------------------------------------------------


def build(model: PreTrainedModel, name: str, examples: list[str]) -> gr.Blocks:
    """The page of a captioner."""

    def caption(path: str | None, prompt: str, search: str, beams: int, length: int, number: int):
        blank = {said: "", status: "", candidates: gr.update(value=[]), words: "", queries: "", kept: {}}
        if path is None:
            yield blank
            return
        try:
            yield blank | {status: told("Looking ...")}
            seen = attention.see(model, open_image(path), prompt[:MAX_PROMPT])
            for text, found in write(model, seen, search, int(beams), int(length), int(number)):  # noqa: B007
                yield {said: text, status: told("Writing ...")}
        except ValueError as error:  # the image, or more tokens than the language model reads
            yield blank | {status: told(f"⚠ {error}")}
            return
        rows = table(model, seen, found)
        by_text = {row[0]: ids for row, ids in zip(rows, found, strict=True)}  # visitors may sort the rows
        result = {said: text, candidates: rows, kept: by_text}
        yield result | {status: told("Drawing where it looks ...")}
        yield result | maps_of(seen, found[0])  # all of it: callers of the API get the last of what is yielded

    def maps_of(seen: attention.Seen, ids: list[int]) -> dict:
        if seen.grid is None:
            return {status: told("The vision encoder has no grid of patches to draw maps on.")}
        drawn_words, drawn_queries = draw(model, seen, ids)
        return {words: drawn_words, queries: drawn_queries, status: ""}

    def another(path: str | None, prompt: str, by_text: dict[str, list[int]], picked: gr.SelectData):
        ids = by_text.get(picked.row_value[0])
        if path is None or ids is None:
            return {status: ""}
        return maps_of(attention.see(model, open_image(path), prompt[:MAX_PROMPT]), ids)

    limit = model.generation_config.max_new_tokens
    with gr.Blocks(title=f"Captions by {name}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"<h1>Caption an image, and see where the model looks</h1><p>Model: {html.escape(name)}</p>")
        with gr.Row():
            with gr.Column(scale=2):
                image = ImageFile(label="Image", height=320, sources=["upload", "clipboard"], elem_id="image")
                prompt = gr.Textbox(
                    label="Prompt",
                    placeholder=model.processor.prompt or "(none)",
                    max_length=MAX_PROMPT,
                    elem_id="prompt",
                )
                search = gr.Radio([GREEDY, SAMPLING, BEAMS], value=GREEDY, label="Search", elem_id="search")
                beams = gr.Slider(2, 10, value=5, step=1, label="Beams")
                number = gr.Slider(1, 10, value=5, step=1, label="Captions to compare (sampling, beam search)")
                length = gr.Slider(1, max(limit, 50), value=limit, step=1, label="Tokens at most")
                button = gr.Button("Caption", variant="primary", elem_id="go")
            with gr.Column(scale=3):
                said = gr.Textbox(label="Caption", lines=2, interactive=False, elem_id="caption")
                status = gr.HTML(elem_id="status")
                candidates = gr.Dataframe(
                    headers=list(COLUMNS),
                    column_widths=list(COLUMNS.values()),
                    datatype="str",
                    interactive=False,
                    label="Captions compared",
                    wrap=True,
                    max_height=700,
                    elem_id="candidates",
                )
                words = gr.HTML(elem_id="words")
        queries = gr.HTML(elem_id="queries")
        gr.Markdown(HOW_TO_READ)
        if examples:
            gr.Examples(examples, inputs=[image], label="Examples", cache_examples=False, examples_per_page=12)
        kept = gr.State({})
        # One at a time: all share the model.
        shared = {"concurrency_id": "captioner", "concurrency_limit": 1, "show_progress": "hidden"}
        gr.on(
            [image.change, button.click, prompt.submit],
            caption,
            inputs=[image, prompt, search, beams, length, number],
            outputs=[said, status, candidates, words, queries, kept],
            trigger_mode="always_last",
            api_name="caption",
            **shared,
        )
        candidates.select(another, [image, prompt, kept], [status, words, queries], api_visibility="private", **shared)
    return page


# --- The program ------------------------------------------------------------------------------------------------------


def load(model_name_or_path: str, revision: str | None) -> PreTrainedModel:
    """A captioner whose Q-Former has eager attention, the one that says where it looks; it is small."""
    adapter = cached_file(
        model_name_or_path, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    # The captioner that an adapter is on has other commits.
    pinned = {"revision": revision} if adapter is None else {"adapter_kwargs": {"revision": revision}}
    model = AutoModel.from_pretrained(
        model_name_or_path,
        **(pinned if revision is not None else {}),
        trust_remote_code=True,
        attn_implementation={"qformer_config": "eager"},
    )
    if model.processor is None:
        raise OSError(f"{model_name_or_path!r} holds no processor beside the model.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def find_examples(folder: str | None, model_name_or_path: str, revision: str | None) -> list[str]:
    """Images of a folder; without one, those of the folder `examples` beside the model's weights, if it has any."""
    if folder is None:
        home = Path(model_name_or_path)
        if not home.is_dir():
            home = Path(snapshot_download(model_name_or_path, revision=revision, allow_patterns="examples/*"))
        folder = home / "examples"
    elif not Path(folder).is_dir():
        raise OSError(f"There is no folder {folder!r} of examples.")
    readable = []
    for path in sorted(Path(folder).glob("*"))[:24]:
        try:
            open_image(str(path))
            readable.append(str(path))
        except ValueError as error:
            print(f"The example {path.name!r} is left out. {error}", file=sys.stderr)
    return readable


def main() -> None:
    parser = argparse.ArgumentParser(description="Caption images in the browser, and see where the model looks.")
    variable = os.environ.get("MODEL_ID")
    parser.add_argument("--model", default=variable, help="Hub id or folder; by default what MODEL_ID says")
    parser.add_argument("--revision", default=os.environ.get("MODEL_REVISION"), help="branch, tag or commit on the Hub")
    parser.add_argument("--examples", help="folder of images to try; by default `examples` beside the model")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="a public address, through gradio's servers")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("say which model: --model ID_OR_FOLDER, or the variable MODEL_ID on a Space")
    try:
        model = load(arguments.model, arguments.revision)
        examples = find_examples(arguments.examples, arguments.model, arguments.revision)
    except Exception as error:  # each way in which a folder can be broken raises another class
        sys.exit(f"{arguments.model!r} cannot be shown: {(str(error) or type(error).__name__).splitlines()[0]}")
    build(model, arguments.model, examples).launch(
        server_port=arguments.port,
        share=arguments.share,
        max_file_size="30mb",
        ssr_mode=False,  # needs Node
        footer_links=[],
        css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


if __name__ == "__main__":
    main()
