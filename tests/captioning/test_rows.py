import io

import numpy as np
import pytest
import torch
from PIL import Image

from qformer_captioner.captioning.rows import caption_rows
from qformer_captioner.hub.load import load_captioner

from ..fixtures import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.captioner()


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    return load_captioner(tiny.save_stage1(tmp_path_factory.mktemp("stage_1")))


def content_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def pictures(number: int = 3) -> list[Image.Image]:
    return [tiny.picture(seed) for seed in range(number)]


def captions_of(rows) -> list[str]:
    return [caption for row in rows for caption in row.captions]


@pytest.mark.parametrize("kind", ["model", "stage_1"])
def test_captions_of_a_batch_are_those_of_single_images(kind, request):
    captioner = request.getfixturevalue(kind)
    single = [captioner.caption(picture, max_new_tokens=8) for picture in pictures()]
    assert len(set(single)) > 1
    assert captions_of(caption_rows(captioner, pictures(), max_new_tokens=8)) == single


def test_every_form_of_an_image_gives_the_same_caption(model, tmp_path):
    picture = tiny.picture(1)
    path = tmp_path / "picture.png"
    path.write_bytes(content_of(picture))
    content = path.read_bytes()
    forms = [picture, content, str(path), path, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}]
    assert captions_of(caption_rows(model, [*forms, np.asarray(picture)], max_new_tokens=8)) == 7 * [
        model.caption(picture, max_new_tokens=8)
    ]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"\xff\xd8\xff damaged", "cannot be read"),
        ("missing.jpg", "There is no image file 'missing.jpg'"),
        (None, "NoneType"),
        (np.zeros((2, 3, 4, 5)), "array"),
        ([], "The row has 0 images"),
        ([tiny.picture(), tiny.picture()], "The row has 2 images"),
        (OSError("The network is down."), "The network is down."),
        ({"bytes": None, "path": None}, "image"),
    ],
)
def test_a_broken_row_has_an_error_and_leaves_the_others_equal(model, broken, reason):
    first, second = pictures(2)
    rows = caption_rows(model, [first, broken, second], max_new_tokens=8, score=True)
    assert reason in rows[1].error and rows[1].captions == rows[1].scores == []
    assert [rows[0].error, rows[2].error] == [None, None]
    alone = caption_rows(model, [first, second], max_new_tokens=8, score=True)
    assert captions_of(rows) == captions_of(alone)
    torch.testing.assert_close([rows[0].scores, rows[2].scores], [row.scores for row in alone])


def test_a_batch_of_broken_rows_has_only_errors(model):
    rows = caption_rows(model, [b"damaged", "missing.jpg"])
    assert [row.captions for row in rows] == [[], []] and all(row.error for row in rows)


def test_each_row_may_have_its_own_prompt(model):
    prompts = ["a red", None, "two small squares"]
    single = [
        model.caption(picture, prompt, max_new_tokens=8) for picture, prompt in zip(pictures(), prompts, strict=True)
    ]
    assert captions_of(caption_rows(model, pictures(), prompts, max_new_tokens=8)) == single


def test_prompts_of_another_number_than_the_rows_are_refused(model):
    with pytest.raises(ValueError, match="3 rows but 2 prompts"):
        caption_rows(model, pictures(), ["a", "b"])


@pytest.mark.parametrize("language", ["llama", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores_are_the_mean_log_likelihood_of_the_generated_tokens(language, num_beams):
    captioner = tiny.captioner(language=language)
    prompts = ["a red", "", "two small squares"]
    options = dict(max_new_tokens=8, num_beams=num_beams, num_return_sequences=num_beams)
    rows = caption_rows(captioner, pictures(), prompts, score=True, **options)
    expected = []
    for picture, prompt in zip(pictures(), prompts, strict=True):
        inputs = captioner.processor(images=picture, text=prompt)
        for ids in captioner.generate(**inputs, **options):
            end = (ids == 1).nonzero().flatten().tolist()
            ids = ids[: end[0] + 1] if end else ids
            losses = captioner(**inputs, labels=ids[None]).losses
            expected.append(-losses.item() / len(ids))
    assert len({round(score, 3) for score in expected}) > 1
    torch.testing.assert_close([score for row in rows for score in row.scores], expected, rtol=1e-4, atol=1e-5)


def test_the_token_that_ends_a_caption_counts_and_padding_does_not(model):
    lengths = (model.generate(**model.processor(images=pictures(12)), max_new_tokens=20) != 0).sum(dim=1)
    short, long = int(lengths.argmin()), int(lengths.argmax())
    assert lengths[short] < lengths[long]
    batch = [tiny.picture(short), tiny.picture(long)]
    together = caption_rows(model, batch, score=True, max_new_tokens=20)
    alone = [caption_rows(model, [picture], score=True, max_new_tokens=20)[0] for picture in batch]
    torch.testing.assert_close([row.scores for row in together], [row.scores for row in alone], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["model", "stage_1"])
def test_several_captions_of_a_row_each_have_a_score(kind, request):
    captioner = request.getfixturevalue(kind)
    rows = caption_rows(captioner, pictures(2), score=True, num_beams=3, num_return_sequences=3, max_new_tokens=8)
    assert [len(row.captions) for row in rows] == [len(row.scores) for row in rows] == [3, 3]
    assert captions_of(rows) == captioner.caption(pictures(2), num_beams=3, num_return_sequences=3, max_new_tokens=8)


def test_scores_of_stage_1_are_the_mean_log_likelihood_at_each_step(stage_1):
    options = dict(max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    prompts = ["a red", "", "two small squares"]
    rows = caption_rows(stage_1, pictures(), prompts, score=True, max_new_tokens=8)
    expected = []
    for picture, prompt in zip(pictures(), prompts, strict=True):
        output = stage_1.generate(**stage_1.processor(images=picture, text=prompt), **options)
        log_probs = torch.stack(output.logits, dim=1).log_softmax(dim=-1)  # [1, T, V]
        expected.append(log_probs.gather(2, output.sequences[..., None]).mean().item())
    torch.testing.assert_close([row.scores[0] for row in rows], expected, rtol=1e-4, atol=1e-5)


def test_matching_scores_of_stage_1_are_those_of_match(stage_1):
    prompts = ["a red", "", "two small squares"]
    rows = caption_rows(stage_1, pictures(), prompts, score=True, max_new_tokens=8)
    texts = [f"{prompt} {row.captions[0]}".strip() for prompt, row in zip(prompts, rows, strict=True)]
    expected = stage_1.match(pictures(), texts).diag()
    torch.testing.assert_close(torch.tensor([row.matching_scores[0] for row in rows]), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_stage_1_that_was_not_trained_to_match_has_no_matching_scores(tmp_path):
    captioner = load_captioner(tiny.save_stage1(tmp_path))
    captioner.config.itm_weight = 0.0
    (row,) = caption_rows(captioner, [tiny.picture()], score=True, max_new_tokens=4)
    assert row.scores and not row.matching_scores


def test_features_are_read_from_arrays_and_files_and_dicts(model, tmp_path):
    features = np.random.default_rng(0).normal(size=(5, tiny.VISION_WIDTH)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    batch = [
        str(tmp_path / "features.npy"),
        {"image_embeds": features},
        tiny.picture(),
        {"image_embeds": features[:, 1:]},
    ]
    *rows, wrong = caption_rows(model, batch, max_new_tokens=8)
    expected = model.caption(image_embeds=features, max_new_tokens=8)
    assert captions_of(rows) == [expected, expected, model.caption(tiny.picture(), max_new_tokens=8)]
    assert f"[N, {tiny.VISION_WIDTH}]" in wrong.error


def test_a_captioner_without_a_vision_encoder_reads_arrays_and_refuses_images(tmp_path):
    captioner = load_captioner(tiny.save_stage1(tmp_path, vision=None))
    features = np.random.default_rng(0).normal(size=(5, tiny.VISION_WIDTH)).astype(np.float32)
    array, picture = caption_rows(captioner, [features, tiny.picture()], max_new_tokens=8)
    assert array.captions == [captioner.caption(image_embeds=features, max_new_tokens=8)]
    assert "no vision encoder" in picture.error
