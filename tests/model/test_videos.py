"""Videos in the processor and in captions: a list of frames is one input."""

import numpy as np
import pytest
import torch

from qformer_captioner import QFormerCaptioner, QFormerCaptionerProcessor

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
        ([frames(0), frames(0, 1)], 1, "reads one image for each prompt, but conversation 2 has 2"),
        ([frames(0, 1), []], 4, "conversation 2 has 0"),
        ([[frames(0, 1), frames(1)], frames(2)], 4, "Entry 1 of the images holds 2 lists"),
        ([[*frames(0), *frames(1, size=(9, 9))]], 4, "different sizes, such as 40 x 50 and 9 x 9"),
    ],
    ids=["image", "empty", "nested", "sizes"],
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
