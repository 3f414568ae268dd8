"""Bridges of the benchmark: they are comparable, train on the same batches, and are what the table calls them."""

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import bridges
from benchmarks.bridge_data import CaptionedFeatures, draw_batches, shuffled_rows
from benchmarks.bridge_models import check_bridge, trainable_parameters
from qformer_captioner import QFormerCaptioner
from qformer_captioner.hub.legacy import LegacyCaptioner
from qformer_captioner.training.bag_of_words import BagOfWordsLoss

from ..fixtures import tiny

SOFT_PROMPT_LENGTH = {"ours": 8, "old scripts": 16, "ClipCap": 10}
ROWS, VIEWS, NUM_FEATURES = 12, 2, 5


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("backbones")
    return (
        tiny.save_vision(folder / "dinov2", "dinov2"),
        tiny.save_language(folder / "llama", max_position_embeddings=128),
    )


@pytest.fixture(scope="module", params=list(bridges.BRIDGES))
def bridge(request) -> str:
    return request.param


@pytest.fixture
def model(bridge, backbones) -> QFormerCaptioner:
    return build(bridge, backbones)


def build(bridge: str, backbones: tuple[str, str]) -> QFormerCaptioner:
    return bridges.build(bridge, 0, *backbones, make_data().features[:, 0], dtype="float32")


def make_data(rows: int = ROWS, views: int = VIEWS) -> CaptionedFeatures:
    """Return random features of images with one, two or three captions each, of different lengths."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(rows, views, NUM_FEATURES, tiny.VISION_WIDTH, generator=generator).half()

    def random_caption(length: int) -> list[int]:
        return [*torch.randint(3, tiny.WORDS, (length,), generator=generator).tolist(), 1]

    token_ids = [[random_caption(2 + row % 4 + number) for number in range(1 + row % 3)] for row in range(rows)]
    captions = [[f"caption {number} of {row}" for number in range(len(token_ids[row]))] for row in range(rows)]
    return CaptionedFeatures(features, captions, token_ids)


def make_run(bridge: str, objective: str, steps: int = 4, learning_rate: float = 1e-3, seed: int = 0) -> bridges.Run:
    return bridges.Run(bridge, objective, learning_rate, seed, steps, 4, "noise", "dinov2", "llama")


def make_result(bridge: str, learning_rate: float, seed: int, cider: float) -> dict:
    run = make_run(bridge, "captions", learning_rate=learning_rate, seed=seed)
    scores = dict(cider=cider, loss=3.0, loss_shuffled=3.5, parameters=5_000_000, cpu_minutes=2.0)
    return asdict(run) | scores


def test_each_bridge_passes_the_check_and_has_its_soft_prompt_length(model, bridge):
    batch = next(draw_batches(make_data(), 4, 1, 0))
    check_bridge(model, batch.image_embeds, batch.labels)
    soft_prompt = model.get_soft_prompt(image_embeds=batch.image_embeds)
    assert soft_prompt.shape == (4, SOFT_PROMPT_LENGTH[bridge], tiny.TEXT_WIDTH)


def test_the_check_fails_if_the_gradient_misses_part_of_the_bridge(backbones):
    model = build("ClipCap", backbones)
    model.qformer.mlp[1] = torch.nn.Threshold(1e9, 0.0)
    batch = next(draw_batches(make_data(), 4, 1, 0))
    with pytest.raises(RuntimeError, match=r"must reach all of the bridge.*'qformer\.mlp\.0\.bias'"):
        check_bridge(model, batch.image_embeds, batch.labels)


@pytest.mark.parametrize("objective", list(bridges.OBJECTIVES))
def test_training_changes_the_bridge_alone_and_the_model_still_captions(model, bridge, objective):
    data = make_data()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    captions = [caption for captions in data.token_ids for caption in captions]
    bag_of_words = BagOfWordsLoss(captions, model.get_input_embeddings().weight, min_count=1)
    bridges.train(model, data, bag_of_words, make_run(bridge, objective))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(trainable_parameters(model))
    scores = bridges.evaluate(model, data)
    assert scores["loss"] != scores["loss_shuffled"] and len(scores["examples"]) == 5


@pytest.mark.slow
def test_training_lowers_the_loss(model, bridge):
    data = make_data(rows=4, views=1)
    before = bridges.evaluate(model, data)["loss"]
    bridges.train(model, data, None, make_run(bridge, "captions", steps=30, learning_rate=1e-2))
    assert bridges.evaluate(model, data)["loss"] < before - 0.5


def test_the_bridge_of_the_old_scripts_computes_what_their_captioner_computes(backbones):
    model = build("old scripts", backbones)
    weights = {f"fc.{name}": tensor for name, tensor in model.language_projection.state_dict().items()}
    weights |= model.qformer.state_dict()
    legacy = LegacyCaptioner.from_state_dict(weights, *backbones, num_attention_heads=16)
    batch = next(draw_batches(make_data(), 4, 1, 0))
    output = model.eval()(image_embeds=batch.image_embeds, labels=batch.labels)
    expected = legacy(image_embeds=batch.image_embeds, labels=batch.labels)
    torch.testing.assert_close(output.soft_prompt, expected.soft_prompt)
    torch.testing.assert_close(output.loss, expected.loss)
    assert 0.8 < model.qformer.query_tokens.std() < 1.2


def test_our_q_former_starts_with_the_difference_from_the_mean_image(backbones):
    pooled = make_data().features[:, 0].float().mean(dim=1)
    value = build("ours", backbones).qformer.encoder.layer[0].crossattention.attention.value
    torch.testing.assert_close(value(pooled.mean(dim=0)), torch.zeros(384), atol=1e-5, rtol=0)
    assert value(pooled).std() > 0.1


def test_our_projection_treats_each_query_separately(backbones):
    model = build("ours", backbones)
    queries = torch.randn(2, 8, 384)
    changed = queries.clone()
    changed[:, 3] = torch.randn(2, 384)
    is_different = (model.language_projection(queries) != model.language_projection(changed)).any(dim=2)
    assert is_different[:, 3].all() and is_different.sum() == 2
    projected = model.language_projection(torch.ones(1, 8, 384))
    assert not torch.allclose(projected[0, 0], projected[0, 1])


def test_clipcap_reads_the_class_token_alone(backbones):
    model = build("ClipCap", backbones)
    images = torch.randn(2, NUM_FEATURES, tiny.VISION_WIDTH)
    other_patches = torch.cat([images[:, :1], torch.randn(2, 3, tiny.VISION_WIDTH)], dim=1)
    soft_prompt = model.get_soft_prompt(image_embeds=images)
    assert torch.equal(soft_prompt, model.get_soft_prompt(image_embeds=other_patches))
    assert not torch.equal(soft_prompt[0], soft_prompt[1])


def test_batches_depend_on_the_seed_alone():
    first, again, other = (list(draw_batches(make_data(), 4, 7, seed)) for seed in (0, 0, 1))
    assert len(first) == 7
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.image_embeds, two.image_embeds) and torch.equal(one.labels, two.labels)
    assert any(not torch.equal(one.image_embeds, two.image_embeds) for one, two in zip(first, other, strict=True))


def test_an_epoch_has_every_image_once_with_one_of_its_captions():
    data = make_data()
    seen = []
    for batch in draw_batches(data, 4, ROWS // 4, 0):
        for image, label in zip(batch.image_embeds, batch.labels, strict=True):
            positions = (data.features.float() == image).flatten(2).all(dim=2).nonzero()
            seen.append(int(positions[0, 0]))
            assert label[label != -100].tolist() in data.token_ids[seen[-1]]
    assert sorted(seen) == list(range(ROWS))


def test_shuffling_gives_every_row_the_image_of_another_row():
    shuffled = shuffled_rows(make_data())
    assert sorted(shuffled) == list(range(ROWS))
    assert all(row != other for row, other in enumerate(shuffled))


def test_the_table_has_the_learning_rate_that_was_best_on_the_first_seed():
    results = [make_result("ours", 1e-3, 0, 0.2), make_result("ours", 1e-4, 0, 0.1), make_result("ours", 1e-4, 1, 0.9)]
    results += [make_result("ours", 1e-3, 1, 0.3)]
    row = bridges.format_table(results, {"ours": "captions"}).splitlines()[-1]
    assert "| 0.001 | 25.0 | 20.0, 30.0 | 3.000 | 3.500 |" in row


def test_finished_runs_are_read_from_the_file_of_results(tmp_path):
    file = tmp_path / "bridges.jsonl"
    results = [make_result("ours", 1e-3, 0, 0.2), make_result("ClipCap", 1e-3, 0, 0.1)]
    file.write_text("".join(json.dumps(result) + "\n" for result in results))
    finished = bridges.finished_runs(file)
    assert [result["cider"] for result in finished.values()] == [0.2, 0.1]
    assert make_run("ours", "captions") in finished and make_run("ours", "words") not in finished
