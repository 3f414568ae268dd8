"""Answers in the shapes of OpenAI's chat completions and responses, and of Ollama's `generate`."""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi.responses import Response

from .batching import CaptionedRequest
from .errors import json_response
from .requests import CaptionRequest

Answer = Callable[[CaptionRequest, CaptionedRequest, str, int], Response]


def new_id(prefix: str) -> str:
    """Return a random id."""
    return f"{prefix}-{uuid.uuid4().hex}"


def cut_at_stop(caption: str, stop: Sequence[str]) -> str:
    """Return a caption up to the first of several texts.

    Example:

    ```python
    >>> cut_at_stop("a dog. It runs.", ["."])
    'a dog'
    ```
    """
    places = [place for text in stop if text and (place := caption.find(text)) >= 0]
    return caption[: min(places)].rstrip() if places else caption


def usage_of(captioned: CaptionedRequest) -> dict[str, int]:
    """Return numbers of tokens, as chat completions name them."""
    completion = sum(captioned.tokens)
    total = captioned.prompt_tokens + completion
    return {"prompt_tokens": captioned.prompt_tokens, "completion_tokens": completion, "total_tokens": total}


def finish_reason(tokens: int, limit: int) -> str:
    """Return why a caption ended."""
    return "length" if tokens >= limit else "stop"


def chat_answer(request: CaptionRequest, captioned: CaptionedRequest, model: str, limit: int) -> Response:
    """Return a chat completion, or its stream, in which each caption is one chunk.

    Args:
        request: the request.
        captioned: its captions.
        model: name of the model.
        limit: largest number of tokens of these captions.
    """
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}
    captions = [cut_at_stop(caption, request.stop) for caption in captioned.captions]
    reasons = [finish_reason(tokens, limit) for tokens in captioned.tokens]
    if not request.stream:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": caption, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (caption, reason) in enumerate(zip(captions, reasons, strict=True))
        ]
        return json_response({**head, "object": "chat.completion", "choices": choices, "usage": usage_of(captioned)})
    deltas: list[tuple[int, dict[str, Any], str | None]] = []
    for index, (caption, reason) in enumerate(zip(captions, reasons, strict=True)):
        deltas += [(index, {"role": "assistant", "content": ""}, None), (index, {"content": caption}, None)]
        deltas += [(index, {}, reason)]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        for index, delta, reason in deltas
    ]
    if request.include_usage:
        chunks.append({"choices": [], "usage": usage_of(captioned)})
    lines = [json.dumps({**head, "object": "chat.completion.chunk", **chunk}) for chunk in chunks]
    text = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
    return Response(text, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")


def responses_answer(request: CaptionRequest, captioned: CaptionedRequest, model: str, limit: int) -> Response:
    """Return a response of OpenAI's Responses API.

    Args:
        request: the request.
        captioned: its caption.
        model: name of the model.
        limit: largest number of tokens of the caption.
    """
    text = {"type": "output_text", "text": captioned.captions[0], "annotations": []}
    message = {"type": "message", "id": new_id("msg"), "status": "completed", "role": "assistant", "content": [text]}
    usage = {
        "input_tokens": captioned.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": captioned.tokens[0],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": captioned.prompt_tokens + captioned.tokens[0],
    }
    return json_response(
        {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "completed",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": model,
            "output": [message],
            "parallel_tool_calls": False,
            "temperature": request.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "usage": usage,
        }
    )


def ollama_answer(request: CaptionRequest, captioned: CaptionedRequest, model: str, limit: int) -> Response:
    """Return an answer of Ollama's `generate`, or its stream, in which the caption is one line.

    Args:
        request: the request.
        captioned: its caption.
        model: name of the model.
        limit: largest number of tokens of the caption.
    """
    caption = cut_at_stop(captioned.captions[0], request.stop)
    head = {"model": request.model or model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}
    end = {
        "done": True,
        "done_reason": finish_reason(captioned.tokens[0], limit),
        "prompt_eval_count": captioned.prompt_tokens,
        "eval_count": captioned.tokens[0],
    }
    if not request.stream:
        return json_response({**head, "response": caption, **end})
    lines = [{**head, "response": caption, "done": False}, {**head, "response": "", **end}]
    return Response("".join(json.dumps(line) + "\n" for line in lines), media_type="application/x-ndjson")
