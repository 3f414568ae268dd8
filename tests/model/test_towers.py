"""Vision encoders of transformers, of every kind, as parts of a captioner."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig
from qformer_captioner.encoders_qformer import EncoderError

from ..fixtures import tiny
from ..fixtures.towers import TOWERS, images_for, tower

NEAR = dict(rtol=1e-4, atol=1e-5)


def captioner(name: str) -> QFormerCaptioner:
    vision_model = tower(name)
    config = QFormerCaptionerConfig(
        vision_config=copy.deepcopy(vision_model.config),
        text_config=tiny.text_config("llama"),
        qformer_config=tiny.QFORMER,
    )
    torch.manual_seed(0)
    model = QFormerCaptioner(config, vision_model=vision_model).eval()
    nn.init.normal_(model.language_projection.weight, std=0.2)
    return model


def labels() -> torch.Tensor:
    """Return two captions of each of three images, `[3, 2, 4]`."""
    return torch.randint(3, tiny.WORDS, (3, 2, 4), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_serves(name, tmp_path):
    """Captions of an image equal rows, a batch equals single images, saved equals loaded, and the Q-Former learns."""
    model = captioner(name)
    images = images_for(model.vision_model)
    output = model(**images, labels=labels())
    output.loss.backward()
    assert model.qformer.query_tokens.grad.abs().max() > 0

    with torch.no_grad():
        rows = {key: value.repeat_interleave(2, dim=0) for key, value in images.items()}
        in_rows = model(**rows, labels=labels().flatten(0, 1))
        torch.testing.assert_close(output.loss, in_rows.loss, **NEAR)
        for row in range(3):
            single = model(
                **{key: value[row : row + 1] for key, value in images.items()}, labels=labels()[row : row + 1]
            )
            torch.testing.assert_close(output.losses[row : row + 1], single.losses, **NEAR)
        assert (output.soft_prompt[0] - output.soft_prompt[1]).abs().max() > 1e-3  # images matter

        model.save_pretrained(tmp_path)
        loaded = QFormerCaptioner.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**images, labels=labels()).losses, output.losses, **NEAR)


REFUSED = {  # and the reason
    "hgnet_v2": "it returns no sequence of features",
    "maskformer": "it returns no sequence of features",
    "mgp-str": "it returns no sequence of features",
    "lightglue": "it cannot encode an image",
    "minicpm_ocr_vision": "it cannot encode an image",
    "oneformer": "it needs `task_inputs` beside images",
    "qwen2_5_vl_vision": "it needs `grid_thw` beside images",
    "seggpt": "it needs `prompt_pixel_values` beside images",
    "idefics2_vision": "transformers has no class for it alone",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_encoder_that_cannot_serve_is_refused_by_name(name):
    with pytest.raises(EncoderError) as caught:
        QFormerCaptionerConfig(vision_config=AutoConfig.for_model(name))
    assert f"{name!r} cannot be the vision encoder of a captioner: {REFUSED[name]}" in str(caught.value)
    assert len(str(caught.value)) <= 500
