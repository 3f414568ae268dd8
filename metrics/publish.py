"""Put the metrics on the Hub as Spaces, where `evaluate.load("<organisation>/cider")` finds them.

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

It computes {title} of image captions in pure Python and gives the same numbers as the COCO caption toolkit
(pycocoevalcap), its Java tokenizer included.
"""
APP = """import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("{repo_id}"))
"""
TEMPLATES = {"README.md": README, "app.py": APP, "requirements.txt": "evaluate\nqformer-captioner\n"}
TITLES = {"caption_metrics": "BLEU, ROUGE-L and CIDEr", "cider": "CIDEr", "bleu": "BLEU", "rouge_l": "ROUGE-L"}


def publish_metric(organisation: str, metric: str, private: bool = False) -> str:
    """Create or update the Space of a metric, and return its address.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    api = HfApi()
    repo_id = f"{organisation}/{metric}"
    fill = {"title": TITLES[metric], "repo_id": repo_id}
    url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    script = SPACES / metric / f"{metric}.py"
    files = {name: text.format(**fill).encode() for name, text in TEMPLATES.items()} | {
        script.name: script.read_bytes()
    }
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    api.create_commit(repo_id, operations, commit_message=f"{TITLES[metric]} without Java", repo_type="space")
    return str(url)


def publish(words: list[str]) -> None:
    """Publish the metrics that a command line names."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("organisation", help="your name on the Hub, or an organisation of yours")
    parser.add_argument("--metrics", nargs="+", choices=list(TITLES), default=list(TITLES), help="which (default: all)")
    parser.add_argument("--private", action="store_true", help="only for the organisation's own eyes")
    options = parser.parse_args(words)
    for metric in options.metrics:
        try:
            print(publish_metric(options.organisation, metric, options.private))
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            raise InputError(
                f"The Space {options.organisation}/{metric} cannot be written ({one_line(error, 200)}): log in with "
                "`hf auth login` and check the name."
            ) from error


def main() -> None:
    run_command(publish)


if __name__ == "__main__":
    main()
