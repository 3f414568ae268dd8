"""Publish the metrics as Spaces on the Hub, so that `evaluate.load("<organisation>/cider")` finds them.

    python -m qformer_captioner.metrics.publish ORGANISATION [--metrics cider bleu] [--private]

evaluate's own command for this (`evaluate-cli create`) needs huggingface_hub below 1.0.
"""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import LocalTokenNotFoundError

from ..common.arguments import CommandParser
from ..common.command import run_command
from ..common.errors import InputError, one_line
from ..common.logging import get_logger

logger = get_logger(__name__)

SPACES = Path(__file__).parent / "spaces"

README = """---
title: {title}
emoji: 🖼️
sdk: gradio
app_file: app.py
tags: [evaluate, metric]
description: {title} of image captions, equal to the COCO caption toolkit's to 1e-12, without Java.
---

# {title}

```python
import evaluate  # pip install evaluate qformer-captioner

metric = evaluate.load("{repo_id}")
metric.compute(predictions=["a dog runs"], references=[["a dog runs", "a brown dog runs on grass"]])
```

This metric computes {title} of image captions in pure Python. The scores equal those of the COCO caption toolkit
(pycocoevalcap) with its Java tokenizer.
"""
APP = """import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("{repo_id}"))
"""
TEMPLATES = {"README.md": README, "app.py": APP, "requirements.txt": "evaluate\nqformer-captioner\n"}
TITLES = {"caption_metrics": "BLEU, ROUGE-L and CIDEr", "cider": "CIDEr", "bleu": "BLEU", "rouge_l": "ROUGE-L"}


def publish_metric(organisation: str, metric: str, private: bool = False) -> str:
    """Create or update the Space of a metric.

    Args:
        organisation: user or organisation on the Hub.
        metric: a folder of `metrics/spaces/`, such as "cider".
        private: whether only the organisation can see the Space.

    Returns:
        The address of the Space.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: if the Hub rejects the request.

    Example:

    ```python
    >>> publish_metric("my-organisation", "cider")  # doctest: +SKIP
    'https://huggingface.co/spaces/my-organisation/cider'
    ```
    """
    api = HfApi()
    repo_id = f"{organisation}/{metric}"
    url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    files = {
        name: template.format(title=TITLES[metric], repo_id=repo_id).encode() for name, template in TEMPLATES.items()
    }
    script = SPACES / metric / f"{metric}.py"
    files[script.name] = script.read_bytes()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    api.create_commit(repo_id, operations, commit_message=f"{TITLES[metric]} without Java", repo_type="space")
    return str(url)


def publish(arguments: list[str]) -> None:
    """Publish the metrics that a command line names.

    Args:
        arguments: the command line without the name of the program.

    Raises:
        InputError: if a Space cannot be written; the message names it.
    """
    parser = CommandParser(description=__doc__)
    parser.add_argument("organisation", help="User or organisation on the Hub.")
    parser.add_argument(
        "--metrics", nargs="+", choices=list(TITLES), default=list(TITLES), help="Metrics to publish, by default all."
    )
    parser.add_argument("--private", action="store_true", help="Show the Spaces to the organisation only.")
    options = parser.parse_args(arguments)
    for metric in options.metrics:
        try:
            url = publish_metric(options.organisation, metric, options.private)
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            raise InputError(
                f"The Space {options.organisation}/{metric} cannot be written ({one_line(error, 200)}): log in with "
                "`hf auth login` and check the name."
            ) from error
        logger.info("%s is at %s", TITLES[metric], url)


def main() -> None:
    run_command(publish)


if __name__ == "__main__":
    main()
