"""Requests in the shapes of OpenAI's chat completions and responses, and of Ollama's `generate`.

[`read_json`] checks a body against one of these shapes. `to_caption_request` of a shape makes the same
[`CaptionRequest`] of each. Fields that a captioner has no use for are ignored, such as `tools` and `user`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError

MAX_CHOICES = 8  # captions of a request
MAX_PROMPT = 2000  # characters
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1  # of a number that torch can hold
MIN_TEMPERATURE = 0.01  # below, logits could become infinite; the caption is then that of temperature 0
MIN_TOP_P = 0.001
Shape = TypeVar("Shape", bound="RequestShape")

Temperature = Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)]
Tokens = Annotated[int | None, Field(ge=1)]
Seed = Annotated[int | None, Field(ge=MIN_SEED, le=MAX_SEED)]
Stop = str | list[str] | None


@dataclass(frozen=True)
class CaptionRequest:
    """A request for captions of an image or of the frames of a video.

    Args:
        sources: where the images are: `data:` URLs, other URLs, or base64 text (Ollama).
        prompt: text that the captions continue; empty for the captioner's own.
        param: the field that holds the images, for error messages.
        model: the name of the model that the client asks for.
        n: number of captions.
        max_tokens: largest number of tokens of a caption.
        temperature, top_p, top_k: options of sampling.
        seed: seed of sampling.
        stop: texts before which a caption ends.
        stream: whether the answer is a stream.
        include_usage: whether the stream ends with the number of tokens.
        allows_base64: whether a source may be base64 text without `data:`.
    """

    sources: tuple[str, ...]
    prompt: str
    param: str
    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    allows_base64: bool = False


def generation_options(
    request: CaptionRequest, num_beams: int | None, max_new_tokens: int | None, limit: int
) -> dict[str, Any]:
    """Return the options of `generate` for a request. Requests with equal options can share a batch.

    A request that sets neither temperature nor `top_p` gets the caption of `caption()`. Several captions are then the
    best beams if there are enough, and otherwise sampled at temperature 1.

    Args:
        request: the request.
        num_beams: number of beams of the server, or `None` for the captioner's own.
        max_new_tokens: number of tokens that the server sets, or `None` for the captioner's own.
        limit: largest number of tokens of a caption. A request can ask for fewer.

    Raises:
        ApiError: if several captions are asked for at temperature 0 from too few beams.
    """
    options: dict[str, Any] = {}
    tokens = min(request.max_tokens or limit, limit)
    if tokens < limit or max_new_tokens is not None:
        options["max_new_tokens"] = tokens
    beams = num_beams or 1
    temperature = request.temperature
    if temperature is None and ((request.n > beams) or (request.top_p is not None and request.top_p < 1)):
        temperature = 1.0
    if temperature is None or temperature < MIN_TEMPERATURE:
        if request.n > beams:
            raise ApiError(
                400,
                f"{request.n} captions need a temperature above 0, or a server with as many beams (--num_beams).",
                "n",
            )
        options |= {} if temperature is None else {"do_sample": False}
        options |= {} if num_beams is None else {"num_beams": num_beams}
    else:
        options |= {"do_sample": True, "num_beams": 1, "temperature": temperature}
        options |= {} if request.top_p is None else {"top_p": max(request.top_p, MIN_TOP_P)}
        options |= {} if request.top_k is None else {"top_k": request.top_k}
    return options | ({"num_return_sequences": request.n} if request.n > 1 else {})


# ----------------------------------------------------------------------------------------------------------------------
# Shapes
# ----------------------------------------------------------------------------------------------------------------------


class RequestShape(BaseModel):
    """Base class of the shapes."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    def to_caption_request(self) -> CaptionRequest:
        """Return the request.

        Raises:
            ApiError: if it asks for something that a captioner does not do.
        """
        raise NotImplementedError


class ImageUrl(RequestShape):
    """The image of a chat completion."""

    url: str


class Part(RequestShape):
    """A part of a message, of chat completions or of responses."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None


class Message(RequestShape):
    """A message of a conversation."""

    role: str = "user"
    content: str | list[Part] | None = None


class StreamOptions(RequestShape):
    """Options of a stream."""

    include_usage: bool | None = None


class ChatRequest(RequestShape):
    """Body of `/v1/chat/completions`."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: Tokens = None
    max_completion_tokens: Tokens = None
    temperature: Temperature = None
    top_p: TopP = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    seed: Seed = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None

    def to_caption_request(self) -> CaptionRequest:
        """Return the request."""
        refuse_json((self.response_format or {}).get("type", "text"), "response_format")
        if self.logprobs:
            raise ApiError(400, "A captioner returns no log-probabilities: leave out `logprobs`.", "logprobs")
        sources, prompt = read_messages(self.messages, "messages")
        return CaptionRequest(
            sources=sources,
            prompt=prompt,
            param="messages",
            model=self.model,
            n=self.n or 1,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=stop_texts(self.stop),
            stream=bool(self.stream),
            include_usage=bool(self.stream_options and self.stream_options.include_usage),
        )


class TextOptions(RequestShape):
    """The format of the text of a response."""

    format: dict[str, Any] | None = None


class ResponsesRequest(RequestShape):
    """Body of `/v1/responses`."""

    model: str | None = None
    input: list[Message] = Field(min_length=1)
    max_output_tokens: Tokens = None
    temperature: Temperature = None
    top_p: TopP = None
    text: TextOptions | None = None
    stream: bool | None = None

    def to_caption_request(self) -> CaptionRequest:
        """Return the request."""
        refuse_json(((self.text and self.text.format) or {}).get("type", "text"), "text")
        if self.stream:
            raise ApiError(400, "Responses are not streamed: leave out `stream`, or use chat completions.", "stream")
        sources, prompt = read_messages(self.input, "input")
        return CaptionRequest(
            sources=sources,
            prompt=prompt,
            param="input",
            model=self.model,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )


class OllamaOptions(RequestShape):
    """Options of Ollama that a captioner has, too."""

    temperature: Temperature = None
    top_p: TopP = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    num_predict: int | None = None
    seed: Seed = None
    stop: Stop = None


class OllamaRequest(RequestShape):
    """Body of `/api/generate`."""

    model: str | None = None
    prompt: str | None = None
    images: list[str] | None = None
    format: str | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    stream: bool | None = True

    def to_caption_request(self) -> CaptionRequest:
        """Return the request."""
        if self.format:
            refuse_json("json", "format")
        if not self.images:
            raise ApiError(400, "The request has no image: put one in base64 into `images`.", "images")
        options = self.options or OllamaOptions()
        tokens = options.num_predict
        return CaptionRequest(
            sources=tuple(self.images),
            prompt=self.prompt or "",
            param="images",
            model=self.model,
            max_tokens=tokens if tokens is not None and tokens > 0 else None,  # -1 and -2: without limit
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k or None,
            seed=options.seed,
            stop=stop_texts(options.stop),
            stream=self.stream is not False,
            allows_base64=True,
        )


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_json(body: bytes, shape: type[Shape]) -> CaptionRequest:
    """Return the request that a body holds.

    Args:
        body: JSON text.
        shape: the shape that it should have.

    Raises:
        ApiError: if it is not JSON, or has another shape.
    """
    try:
        content = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request is not valid JSON: {str(error)[:200]}.", code="invalid_json") from None
    try:
        request = shape.model_validate(content).to_caption_request()
        request.prompt.encode()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        names = [str(name) for name in first["loc"] if str(name).isalnum() or "_" in str(name)]
        place = ".".join(name for name in names if name not in ("str", "ImageUrl"))
        where = f" at {place!r}" if place else ""
        raise ApiError(400, f"The request has a mistake{where}: {first['msg']}.", place or None) from None
    except UnicodeEncodeError:
        raise ApiError(400, "The text holds half of a surrogate pair: send valid Unicode.", "messages") from None
    if len(request.prompt) > MAX_PROMPT:
        raise ApiError(
            400, f"The text has {len(request.prompt)} characters: shorten it to {MAX_PROMPT}.", request.param
        )
    return request


def refuse_constant(name: str) -> None:
    """Refuse `NaN` and `Infinity`, which JSON does not have.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is not a number of JSON")


def refuse_json(kind: Any, param: str) -> None:
    """Refuse an answer in a format other than text.

    Raises:
        ApiError: for another format.
    """
    if kind != "text":
        raise ApiError(400, f"A captioner answers in plain text: leave out {param!r}.", param)


def stop_texts(stop: Stop) -> tuple[str, ...]:
    """Return the texts before which a caption ends."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def read_messages(messages: Sequence[Message], param: str) -> tuple[tuple[str, ...], str]:
    """Return the images and the text of a conversation.

    These are of the last message of the user. If it has no image, the last image before it is used. Messages of the
    system and of the assistant are left out.

    Args:
        messages: the conversation.
        param: the field that holds it, for error messages.

    Raises:
        ApiError: if there is no image, or a part is neither text nor an image.
    """
    of_user = [message for message in messages if message.role == "user"]
    images: tuple[str, ...] = ()
    for message in reversed(of_user):
        images = tuple(source for part in parts_of(message) if (source := source_of(part, param)) is not None)
        if images:
            break
    if not images:
        raise ApiError(
            400, "There is no image: send a message of the user with a part of type 'image_url'.", param, "no_image"
        )
    texts = [part.text or "" for part in parts_of(of_user[-1]) if part.type in ("text", "input_text")]
    return images, "\n".join(text for text in texts if text).strip()


def parts_of(message: Message) -> list[Part]:
    """Return the parts of a message."""
    if isinstance(message.content, str):
        return [Part(type="text", text=message.content)]
    return message.content or []


def source_of(part: Part, param: str) -> str | None:
    """Return the address of the image of a part, or `None` for text.

    Raises:
        ApiError: for a part of another type, or without its image.
    """
    if part.type in ("text", "input_text"):
        return None
    if part.type not in ("image_url", "input_image"):
        raise ApiError(400, f"A part of type {part.type[:40]!r} is neither text nor an image: leave it out.", param)
    url = part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url
    if not url:
        raise ApiError(400, "An image has no address: put a data: URL into `image_url`.", param)
    return url
