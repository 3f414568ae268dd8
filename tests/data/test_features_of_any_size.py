"""Features of vision encoders that give larger images more features: only those of real patches are stored."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, PixtralImageProcessorPil, Siglip2ImageProcessorPil

from qformer_captioner import precompute_features
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.feature_shards import FeatureBatch, SplitLayout
from qformer_captioner.data.feature_store import FeatureStore
from qformer_captioner.vision_qformer import encode_images

from ..fixtures import tiny
from ..fixtures.feature_stores import command

SIZES = [(40, 50), (64, 20), (40, 50), (20, 64), (24, 24)]
SIZES_OF_ENCODER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, patch_size=8)
ENCODERS = {
    "siglip2_vision_model": (dict(num_patches=16), Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)),
    "pixtral": (
        dict(head_dim=8, image_size=32),
        PixtralImageProcessorPil(patch_size={"height": 8, "width": 8}, size={"longest_edge": 32}),
    ),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a folder of pictures of four sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number, size in enumerate(SIZES):
        tiny.picture(number, size=size).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "split": "train", "caption": "a star"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_those_of_each_image_alone(name, pictures, tmp_path):
    fields, image_processor = ENCODERS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES_OF_ENCODER, **fields, initializer_range=0.2)
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path / "vision")
    image_processor.save_pretrained(tmp_path / "vision")
    words = ["--dtype", "float32", "--views", "2", "--random_resized_crop_scale", "0.3"]
    precompute_features.precompute(command(tmp_path / "vision", pictures, tmp_path / "store", *words))
    train = FeatureStore(tmp_path / "store").split("train")
    assert train.shape == (None, 16)
    lengths = set()
    for row in range(len(SIZES)):
        with Image.open(pictures / f"{row}.png") as image:
            inputs = image_processor([image.convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            output = encode_images(model, **inputs)
        mask = slice(None) if output.attention_mask is None else output.attention_mask[0]
        torch.testing.assert_close(train[row], output.last_hidden_state[0, mask])
        lengths.add(len(train[row]))
    assert len(lengths) > 1
    assert train[0, 1].shape != train[0].shape or not torch.equal(train[0, 1], train[0])  # a crop


def test_an_image_with_more_features_than_others_is_named(tmp_path):
    layout = SplitLayout(tmp_path / "train", rows=2, rows_per_shard=2, views=1, shape=(3, 4), dtype="float32")
    with pytest.raises(InputError, match="Row 1 of 'train' has 5 features and other rows 3: its image has an un"):
        FeatureBatch.from_tensor(torch.ones(8, 4), np.array([[3], [5]]), range(2), [], layout)
