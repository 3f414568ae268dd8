"""The calls of data-juicer's `image_captioning_mapper` (version 1.6.1), with a saved captioner as `hf_img2seq`.

Its operator loads the class that the configuration names first, calls the processor with or without prompts, samples,
and decodes.
"""

import pytest
import torch
import transformers

from ..fixtures import tiny


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Model and processor, loaded as the operator loads them with `trust_remote_code`."""
    folder = tmp_path_factory.mktemp("captioner")
    model = tiny.captioner()
    model.language_model.config.max_position_embeddings = 256  # the operator asks for 128 tokens
    model.save_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    class_name = next(name for name in config.auto_map if name.startswith("AutoModel"))
    model = getattr(transformers, class_name).from_pretrained(folder, trust_remote_code=True)
    model.config.image_token_index = 50265
    return model, processor


@pytest.mark.parametrize("prompts", [None, ["a red", "two small"]])
def test_the_operator_gets_a_caption_for_each_image(loaded, prompts):
    model, processor = loaded
    inputs = processor(images=[tiny.picture(0), tiny.picture(1)], text=prompts, return_tensors="pt").to(model.device)
    torch.manual_seed(0)
    ids = model.generate(**inputs, max_new_tokens=128, do_sample=True)
    captions = processor.batch_decode(ids, skip_special_tokens=True)
    assert len(captions) == 2 and all(captions) and captions[0] != captions[1]
