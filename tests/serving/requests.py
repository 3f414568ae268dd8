"""Requests of tests, and a client of a server in this process."""

import base64
import io
import time
from typing import Any

from fastapi.testclient import TestClient
from PIL import Image

from qformer_captioner.serving.app import make_app
from qformer_captioner.serving.options import ServingOptions
from qformer_captioner.serving.service import Service

from ..fixtures import tiny

CHAT = "/v1/chat/completions"
NAME = "tiny"


def png(image: Image.Image) -> bytes:
    """Return the file of an image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    """Return a `data:` URL of an image file."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def picture_url(seed: int = 1) -> str:
    """Return a `data:` URL of a picture."""
    return data_url(png(tiny.picture(seed)))


def chat_body(url: str | None = None, text: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return the body of a chat completion with an image and a text."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url or picture_url()}}]
    if text is not None:
        parts.insert(0, {"type": "text", "text": text})
    return {"model": NAME, "messages": [{"role": "user", "content": parts}], **fields}


class Client(TestClient):
    """Client of a server, which is ready when its `with` block begins.

    Args:
        model: the captioner.
        options: options of the server.
    """

    def __init__(self, model: Any, **options: Any):
        self.service = Service(lambda: model, ServingOptions(**{"name": NAME, "max_wait_ms": 1.0, **options}))
        super().__init__(make_app(self.service), raise_server_exceptions=False)

    def __enter__(self) -> "Client":
        super().__enter__()
        while self.get("/health").status_code != 200:
            time.sleep(0.01)
        return self

    def chat(self, *args: Any, **fields: Any) -> Any:
        """Send a chat completion."""
        return self.post(CHAT, json=chat_body(*args, **fields))

    def caption(self, *args: Any, **fields: Any) -> str:
        """Return the caption of a chat completion."""
        response = self.chat(*args, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]
