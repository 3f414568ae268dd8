"""Model cards of repositories that `push_to_hub` creates."""

import os
from typing import Any, ClassVar

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import PushToHubMixin

CAPTIONER_CARD = """---
{{ card_data }}
---

# {{ name }}

{% if feature_width -%}
A captioner of features: a Q-Former turns features of the width {{ feature_width }} into a short soft prompt, which a
language model reads. The encoder of the features is not a part of it.
{%- else -%}
An image captioning model: a Q-Former turns the features of a vision encoder into a short soft prompt, which a language
model reads.
{%- endif %} It was made with the package qformer-captioner.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True)
{% if feature_width -%}
print(model.caption(image_embeds=features))  # an array [N, {{ feature_width }}], or a list of arrays
{%- else -%}
print(model.caption("image.png"))
{%- endif %}
```

`trust_remote_code=True` runs Python files of this repository: read them, and pin what you read with `revision="..."`.
The code is under Apache-2.0; weights follow the terms of the models and data that they come from.
"""

PRETRAINING_CARD = """---
{{ card_data }}
---

# {{ name }}

{% if feature_width -%}
A Q-Former that was pretrained on image features of the width {{ feature_width }} and texts. It compares features with
texts. The encoder of the features is not a part of it.
{%- else -%}
A Q-Former that was pretrained on images and texts, with its vision encoder. It compares images with texts.
{%- endif %} It was made with the package qformer-captioner.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True)
texts = ["a dog on the beach", "a red car"]
{% if feature_width -%}
print(model.similarity(None, texts, image_embeds=features))  # an array [N, {{ feature_width }}], or a list of arrays
{%- else -%}
print(model.similarity("image.png", texts))
{%- endif %}
{%- if writes_captions %}
print(model.caption({{ "image_embeds=features" if feature_width else '"image.png"' }}))
{%- endif %}
```

A captioner can begin with this Q-Former: give the repository as `--qformer_name_or_path` to `train_hf.py`.

`trust_remote_code=True` runs Python files of this repository: read them, and pin what you read with `revision="..."`.
The code is under Apache-2.0; weights follow the terms of the models and data that they come from.
"""


class PushWithCard(PushToHubMixin):
    """Mixin whose `push_to_hub` writes a model card that shows how to use the repository.

    transformers creates a card with empty sections, "[More Information Needed]", for every new repository. Its
    `push_to_hub` has no argument for a card, so the mixin replaces that card before the upload.

    Attributes:
        feature_width (`int`, *optional*): width of the features of a model without a vision encoder.
        card_template (`str`): text of the card.
        pipeline_tag (`str`, *optional*): task of a model of images, under which the Hub lists it.
        card_tags (`list[str]`): further tags of a model of images.
    """

    feature_width: int | None = None
    card_template: ClassVar[str]
    pipeline_tag: ClassVar[str | None]
    card_tags: ClassVar[list[str]]

    def card_facts(self) -> dict[str, Any]:
        """Return what the template reads beside the name of the repository."""
        return {"feature_width": self.feature_width}

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        card = os.path.join(working_dir, "README.md")
        if os.path.exists(card) and "[More Information Needed]" in ModelCard.load(card).text:
            data = ModelCardData(
                library_name="transformers",
                pipeline_tag=None if self.feature_width else self.pipeline_tag,
                tags=[*([] if self.feature_width else self.card_tags), "q-former", "qformer-captioner"],
            )
            facts = {"name": repo_id.split("/")[-1], **self.card_facts()}
            ModelCard.from_template(data, template_str=self.card_template, repo_id=repo_id, **facts).save(card)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class PushWithCaptionerCard(PushWithCard):
    """Mixin whose `push_to_hub` writes the card of a captioner."""

    card_template = CAPTIONER_CARD
    pipeline_tag = "image-text-to-text"
    card_tags = ["image-captioning"]


class PushWithPretrainingCard(PushWithCard):
    """Mixin whose `push_to_hub` writes the card of a Q-Former in pretraining."""

    card_template = PRETRAINING_CARD
    pipeline_tag = None
    card_tags = ["image-text-retrieval"]
