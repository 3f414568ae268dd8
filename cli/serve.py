r"""Serve a captioner over HTTP, for clients of OpenAI's and Ollama's APIs.

    qformer-captioner serve --model outputs/scenes
    qformer-captioner serve --model USER/CAPTIONER --host 0.0.0.0 --port 8000 --num_beams 3 --ignore_text

Requests that arrive together are captioned together. `QFORMER_CAPTIONER_API_KEY` in the environment is the key that
clients must send. SIGTERM and Ctrl-C end the server after the requests that it has.
"""

import argparse
import importlib.util
import ipaddress
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.arguments import DTYPES, CommandParser, check_at_least
from ..common.command import run_command
from ..common.errors import InputError
from ..common.logging import get_logger

if TYPE_CHECKING:
    from ..captioning_qformer import QFormerCaptioningModel
    from ..serving.options import ServingOptions

logger = get_logger(__name__)

NEEDED = ("fastapi", "uvicorn", "prometheus_client")  # of the extra `serve`


def parse_options(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line.

    Raises:
        InputError: if an option does not exist or has a value that is not valid.
    """
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Captioner, adapter or model of stage 1, as a Hub id or folder.")
    parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="Type of the weights; `auto` is that in the files."
    )
    parser.add_argument("--served_model_name", help="Name in requests; by default the Hub id, or the folder's name.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all of this machine.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on; 0 for a free one.")
    parser.add_argument("--prompt", help="Text that captions continue where a request has none.")
    parser.add_argument("--ignore_text", action="store_true", help="Leave out the text of requests.")
    parser.add_argument("--num_beams", type=int, help="Number of beams; by default the captioner's own.")
    parser.add_argument(
        "--max_new_tokens", type=int, help="Largest number of tokens of a caption; by default the captioner's own."
    )
    parser.add_argument("--max_batch_size", type=int, default=16, help="Largest number of captions of a batch.")
    parser.add_argument(
        "--max_wait_ms", type=float, default=10.0, help="Milliseconds that a request waits for others in its batch."
    )
    parser.add_argument(
        "--max_queue_size", type=int, default=128, help="Largest number of requests that wait; others get status 429."
    )
    parser.add_argument("--max_body_bytes", type=int, default=20_000_000, help="Largest size of a request.")
    parser.add_argument(
        "--max_image_pixels", type=int, default=50_000_000, help="Largest number of pixels of an image."
    )
    parser.add_argument("--read_timeout", type=float, default=20.0, help="Seconds in which a request must arrive.")
    parser.add_argument(
        "--drain_timeout", type=float, default=60.0, help="Seconds after SIGTERM in which requests are still answered."
    )
    parser.add_argument(
        "--allowed_image_hosts",
        nargs="+",
        default=(),
        metavar="HOST",
        help="Hosts from which images are fetched, as `name` or `name:port`.",
    )
    options = parser.parse_args(words)
    check_at_least(options, 0, "port", "max_wait_ms")
    check_at_least(options, 1, "num_beams", "max_new_tokens", "max_batch_size", "max_queue_size", "max_body_bytes")
    check_at_least(options, 1, "max_image_pixels", "read_timeout", "drain_timeout")
    if options.port > 65535:
        raise InputError(f"--port must be at most 65535, not {options.port}.")
    for host in options.allowed_image_hosts:
        if "/" in host or not host:
            raise InputError(f"--allowed_image_hosts must be names of hosts such as images.example.org, not {host!r}.")
    return options


def serving_options(options: argparse.Namespace) -> "ServingOptions":
    """Return the options of the server. The API key comes from the environment.

    Raises:
        InputError: if the API key is not one that a header can hold.
    """
    from ..serving.options import API_KEY_VARIABLE, ServingOptions

    key = os.environ.get(API_KEY_VARIABLE, "").strip() or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise InputError(f"The key in {API_KEY_VARIABLE} has characters that a header cannot hold: use ASCII.")
    is_folder = Path(options.model).is_dir()
    name = options.served_model_name or (Path(options.model).resolve().name if is_folder else options.model)
    same = (
        "prompt ignore_text num_beams max_new_tokens max_batch_size max_wait_ms max_queue_size max_body_bytes "
        "max_image_pixels read_timeout drain_timeout"
    )
    return ServingOptions(
        name=name,
        api_key=key,
        allowed_image_hosts=frozenset(host.lower() for host in options.allowed_image_hosts),
        **{field: getattr(options, field) for field in same.split()},
    )


def is_open_to_others(host: str) -> bool:
    """Return whether other machines can reach an address to listen on."""
    with suppress(ValueError):
        return not ipaddress.ip_address(host).is_loopback
    return host != "localhost"


def serve(words: Sequence[str]) -> None:
    """Serve the captioner that a command line names.

    Args:
        words: the command line.

    Raises:
        InputError: if an option, the port or the captioner cannot be used, or the extra `serve` is not installed.
    """
    options = parse_options(words)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{missing[0]} is not installed: run `pip install 'qformer-captioner[serve]'`.")
    settings = serving_options(options)
    if settings.api_key is None and is_open_to_others(options.host):
        logger.warning(
            "Anybody who reaches %s can use this server: set QFORMER_CAPTIONER_API_KEY, or listen on 127.0.0.1.",
            options.host,
        )

    def load() -> "QFormerCaptioningModel":
        from transformers.utils.logging import disable_progress_bar

        from ..common.devices import device_of
        from ..hub.load import load_captioner

        disable_progress_bar()
        return load_captioner(options.model, options.revision, options.dtype, device_of())

    from ..serving.server import run_server

    run_server(load, settings, options.host, options.port)


def main() -> None:
    run_command(serve)


if __name__ == "__main__":
    main()
