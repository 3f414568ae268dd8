"""Videos in the processor and in captions: a list of frames is one input."""

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig, QFormerCaptionerProcessor
from qformer_captioner.training.from_scratch import build_from_scratch

from ..fixtures import tiny


@pytest.fixture(scope="module")
def model():
    model = tiny.captioner(num_frames=4)
    model.processor.num_frames = 4
    return model


def frames(*seeds: int, size=(40, 50)) -> list:
    return [tiny.picture(seed, size=size) for seed in seeds]


def test_a_video_is_prepared_as_its_frames(model):
    batch = model.processor([frames(0, 1, 2), frames(3, 4)])
    singles = model.processor(frames(0, 1, 2, 3, 4)).pixel_values
    assert batch.pixel_values.shape == (2, 3, 3, tiny.SIDE, tiny.SIDE)
    assert batch.frame_attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert torch.equal(batch.pixel_values.flatten(0, 1)[[0, 1, 2, 3, 4]], singles)
    assert not batch.pixel_values[1, 2].any()


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        ([frames(0), frames(1)], (2,)),
        ([frames(0, 1), frames(2, 3)], (2, 2)),
        ([[frames(0, 1)], [frames(2, 3)]], (2, 2)),
        (np.stack([np.stack(list(map(np.asarray, frames(0, 1))))] * 3), (3, 2)),
        ([torch.zeros(2, 3, 10, 10)], (1, 2)),
        ([frames(*range(9))], (1, 4)),
    ],
    ids=["one image each", "videos", "conversations", "array", "tensor", "long"],
)
def test_forms_of_videos(model, images, shape):
    batch = model.processor(images)
    assert batch.pixel_values.shape == (*shape, 3, tiny.SIDE, tiny.SIDE)
    assert "frame_attention_mask" not in batch


def test_a_long_video_is_sampled_evenly(model):
    sampled = model.processor([frames(*range(10))]).pixel_values
    assert torch.equal(sampled, model.processor([frames(0, 3, 6, 9)]).pixel_values)
    assert torch.equal(model.processor([frames(*range(10))], num_frames=2).pixel_values, sampled[:, [0, 3]])


def test_videos_and_images_have_the_same_captions_in_a_batch_and_alone(model):
    images = [frames(0, 1, 2), tiny.picture(3), frames(4, 5)]
    options = dict(max_new_tokens=8, num_beams=2)
    alone = [model.caption([image], **options)[0] for image in images]
    assert model.caption(images, **options) == alone
    assert len(set(alone)) == 3
    assert model.caption(frames(0, 1), **options) == [model.caption(image, **options) for image in frames(0, 1)]


@pytest.mark.parametrize(
    ("images", "num_frames", "message"),
    [
        ([frames(0), frames(0, 1)], 1, "reads one image in each row, but entry 2 of the images has 2"),
        ([frames(0, 1), []], 4, "entry 2 of the images has 0"),
        ([[frames(0, 1), frames(1)], frames(2)], 4, "Entry 1 of the images holds 2 lists"),
        ([[*frames(0), *frames(1, size=(9, 9))]], 4, "different sizes, such as 40 x 50 and 9 x 9"),
        ([frames(0, 1)], 0, "`num_frames` must be at least 1, got 0"),
    ],
    ids=["image", "empty", "nested", "sizes", "number"],
)
def test_wrong_videos_are_named(images, num_frames, message):
    processor = tiny.processor()
    processor.num_frames = num_frames
    with pytest.raises(ValueError, match=message) as error:
        processor(images, do_resize=False)
    assert len(str(error.value)) < 500


def test_the_processor_reads_as_many_frames_as_the_q_former_and_saves_the_number(backbones, tmp_path):
    model = QFormerCaptioner.from_backbones(backbones / "vision", backbones / "llama", **tiny.QFORMER, num_frames=3)
    model.processor.save_pretrained(tmp_path)
    assert QFormerCaptionerProcessor.from_pretrained(tmp_path).num_frames == 3


def test_an_encoder_of_videos_reads_short_videos_with_repeated_frames():
    sizes = dict(tiny.LAYERS, hidden_size=tiny.VISION_WIDTH, intermediate_size=40, image_size=tiny.SIDE)
    vision = VideoMAEConfig(**sizes, patch_size=16, num_frames=4, tubelet_size=2)
    config = QFormerCaptionerConfig(
        vision_config=vision, text_config=tiny.text_config("llama"), qformer_config=tiny.QFORMER
    )
    model = QFormerCaptioner(config).eval()
    side = dict(height=tiny.SIDE, width=tiny.SIDE)
    model.processor = QFormerCaptionerProcessor(
        VideoMAEImageProcessorPil(size=side, do_center_crop=False), tiny.tokenizer(), num_frames=4
    )
    videos = [frames(0, 1), frames(2, 3, 4, 5), frames(6)]
    stretched = [frames(0, 0, 1, 1), frames(2, 3, 4, 5), frames(6, 6, 6, 6)]
    expected = model.get_soft_prompt(model.processor(stretched).pixel_values)
    batch = {name: value for name, value in model.processor(videos).items() if "frame" in name or "pixel" in name}
    torch.testing.assert_close(model.get_soft_prompt(**batch), expected)
    for video, soft_prompt in zip(videos, expected, strict=True):
        alone = model.get_soft_prompt(model.processor([video]).pixel_values)
        torch.testing.assert_close(alone[0], soft_prompt)
    with pytest.raises(ValueError, match=r"has the shape \[3, 3\], but must have one entry for each frame: \[3, 4\]"):
        model.get_soft_prompt(batch["pixel_values"], frame_attention_mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match="`frame_attention_mask` holds other values than 1"):
        model.get_soft_prompt(batch["pixel_values"], frame_attention_mask=torch.full((3, 4), -torch.inf))


def test_a_processor_of_images_of_any_shape_is_refused_for_videos():
    processor = QFormerCaptionerProcessor(Siglip2ImageProcessorPil(patch_size=8), tiny.tokenizer(), num_frames=4)
    with pytest.raises(ValueError, match="Siglip2ImageProcessorPil prepares each image in its own shape"):
        processor([frames(0, 1)])


def test_an_encoder_of_videos_needs_no_embeddings_of_frames():
    """It tells frames apart itself, and returns one sequence for all of them. The processor knows their number."""
    vision = dict(model_type="vivit", hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    vision |= dict(image_size=32, tubelet_size=[2, 16, 16], num_frames=4)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = build_from_scratch(vision, dict(model_type="llama", **sizes), dict(sizes, num_frames=4), ["a dog"])
    assert model.qformer.config.num_frames == 1 and model.processor.num_frames == 4
