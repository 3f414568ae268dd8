"""Options of the server."""

from dataclasses import dataclass, field

API_KEY_VARIABLE = "QFORMER_CAPTIONER_API_KEY"


@dataclass(frozen=True)
class ServingOptions:
    """Options of the server, with the defaults of the command.

    Args:
        name: name of the model in requests and answers.
        api_key: key that requests must send, or `None` for a server without one.
        prompt: text that captions continue where a request has none; by default the captioner's own.
        ignore_text: use that prompt for every request, whatever its text is.
        num_beams: number of beams of requests that do not sample; by default the captioner's own.
        max_new_tokens: largest number of tokens of a caption; by default the captioner's own.
        max_batch_size: largest number of captions that are generated at once.
        max_wait_ms: milliseconds that a request waits for others to share its batch.
        max_queue_size: largest number of requests that wait; further ones are refused.
        max_body_bytes: largest size of a request, and of the images that are fetched for it.
        max_image_pixels: largest number of pixels of an image.
        read_timeout: seconds in which a client must send its request, and in which an image is fetched.
        drain_timeout: seconds after a signal to stop in which requests are still answered.
        allowed_image_hosts: hosts, as `name` or `name:port`, from which images are fetched.
    """

    name: str
    api_key: str | None = None
    prompt: str | None = None
    ignore_text: bool = False
    num_beams: int | None = None
    max_new_tokens: int | None = None
    max_batch_size: int = 16
    max_wait_ms: float = 10.0
    max_queue_size: int = 128
    max_body_bytes: int = 20_000_000
    max_image_pixels: int = 50_000_000
    read_timeout: float = 20.0
    drain_timeout: float = 60.0
    allowed_image_hosts: frozenset[str] = field(default_factory=frozenset)
