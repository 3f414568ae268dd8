"""The bridges of benchmarks/bridges.py: comparable, trained on the same batches, and what they are said to be."""

import pytest
import torch

from qformer_captioner import QFormerCaptioner
from qformer_captioner.hub.legacy import LegacyCaptioner
from qformer_captioner.training.bag_of_words import BagOfWordsLoss

from ...benchmarks import bridges
from ...benchmarks.bridge_data import Captioned, batches, other_images
from ...benchmarks.bridge_models import check_bridge, trained_parameters
from ..fixtures import tiny

LENGTH = {"ours": 8, "old scripts": 16, "ClipCap": 10}
ROWS, VIEWS, PATCHES = 12, 2, 5


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
    return bridges.build(bridge, 0, *backbones, data().features[:, 0], dtype="float32")


def data(rows: int = ROWS, views: int = VIEWS) -> Captioned:
    """Images of noise with one, two or three captions each, of different lengths."""
    draw = torch.Generator().manual_seed(3)
    features = torch.randn(rows, views, PATCHES, tiny.VISION_WIDTH, generator=draw).half()
    ids = [
        [[*torch.randint(3, tiny.WORDS, (2 + row % 4 + k,), generator=draw).tolist(), 1] for k in range(1 + row % 3)]
        for row in range(rows)
    ]
    return Captioned(features, [[f"caption {k} of {row}" for k in range(len(ids[row]))] for row in range(rows)], ids)


def run(bridge: str, objective: str, steps: int = 4, learning_rate: float = 1e-3) -> bridges.Run:
    return bridges.Run(bridge, objective, learning_rate, 0, steps, 4, "noise", "dinov2", "llama")


def test_a_bridge_is_comparable(model, bridge):
    batch = next(batches(data(), 4, 1, 0))
    check_bridge(model, batch.images, batch.labels)
    assert model.get_soft_prompt(image_embeds=batch.images).shape == (4, LENGTH[bridge], tiny.TEXT_WIDTH)


def test_a_bridge_that_passes_no_gradient_on_is_found_out(backbones):
    model = bridges.build("ClipCap", 0, *backbones, data().features[:, 0], dtype="float32")
    model.qformer.mlp[1] = torch.nn.Threshold(1e9, 0.0)
    batch = next(batches(data(), 4, 1, 0))
    with pytest.raises(RuntimeError, match=r"too much or too little: 'qformer\.mlp\.0\.bias'"):
        check_bridge(model, batch.images, batch.labels)


@pytest.mark.parametrize("objective", list(bridges.OBJECTIVES))
def test_a_bridge_trains_and_captions(model, bridge, objective):
    rows = data()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    words = BagOfWordsLoss([ids for own in rows.ids for ids in own], model.get_input_embeddings().weight, min_count=1)
    bridges.train(model, rows, words, run(bridge, objective))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(trained_parameters(model))
    scores = bridges.evaluate(model, rows)
    assert scores["loss"] != scores["loss_shuffled"] and len(scores["examples"]) == 5


def test_training_lowers_the_loss(model, bridge):
    rows = data(rows=4, views=1)
    before = bridges.evaluate(model, rows)["loss"]
    bridges.train(model, rows, None, run(bridge, "captions", steps=30, learning_rate=1e-2))
    assert bridges.evaluate(model, rows)["loss"] < before - 0.5


def test_the_old_scripts_bridge_is_the_old_scripts_q_former(backbones):
    model = bridges.build("old scripts", 0, *backbones, data().features[:, 0], dtype="float32")
    weights = {f"fc.{name}": tensor for name, tensor in model.language_projection.state_dict().items()}
    weights |= model.qformer.state_dict()
    old = LegacyCaptioner.from_state_dict(weights, *backbones, num_attention_heads=16)
    batch = next(batches(data(), 4, 1, 0))
    output = model.eval()(image_embeds=batch.images, labels=batch.labels)
    expected = old(image_embeds=batch.images, labels=batch.labels)
    torch.testing.assert_close(output.soft_prompt, expected.soft_prompt)
    torch.testing.assert_close(output.loss, expected.loss)
    assert 0.8 < model.qformer.query_tokens.std() < 1.2


def test_our_q_former_begins_with_how_an_image_differs_from_the_mean_image(backbones):
    features = data().features[:, 0]
    model = bridges.build("ours", 0, *backbones, features, dtype="float32")
    value = model.qformer.encoder.layer[0].crossattention.attention.value
    pooled = features.float().mean(dim=1)
    torch.testing.assert_close(value(pooled.mean(dim=0)), torch.zeros(384), atol=1e-5, rtol=0)
    assert value(pooled).std() > 0.1


def test_each_query_is_projected_by_itself(backbones):
    model = bridges.build("ours", 0, *backbones, data().features[:, 0], dtype="float32")
    queries = torch.randn(2, 8, 384)
    changed = queries.clone()
    changed[:, 3] = torch.randn(2, 384)
    differs = (model.language_projection(queries) != model.language_projection(changed)).any(dim=2)
    assert differs[:, 3].all() and differs.sum() == 2
    same = model.language_projection(torch.ones(1, 8, 384))
    assert not torch.allclose(same[0, 0], same[0, 1])


def test_clipcap_sees_the_class_token_alone(backbones):
    model = bridges.build("ClipCap", 0, *backbones, data().features[:, 0], dtype="float32")
    images = torch.randn(2, PATCHES, tiny.VISION_WIDTH)
    others = torch.cat([images[:, :1], torch.randn(2, 3, tiny.VISION_WIDTH)], dim=1)
    assert torch.equal(model.get_soft_prompt(image_embeds=images), model.get_soft_prompt(image_embeds=others))
    assert not torch.equal(model.get_soft_prompt(image_embeds=images)[0], model.get_soft_prompt(image_embeds=images)[1])


def test_batches_depend_on_the_seed_alone():
    first, again, other = (list(batches(data(), 4, 7, seed)) for seed in (0, 0, 1))
    assert len(first) == 7
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    assert any(not torch.equal(one.images, two.images) for one, two in zip(first, other, strict=True))


def test_an_epoch_shows_every_image_once_with_a_caption_of_its_own():
    rows = data()
    seen = []
    for batch in batches(rows, 4, ROWS // 4, 0):
        for image, label in zip(batch.images, batch.labels, strict=True):
            places = (rows.features.float() == image).flatten(2).all(dim=2).nonzero()
            seen.append(int(places[0, 0]))
            assert label[label != -100].tolist() in rows.ids[seen[-1]]
    assert sorted(seen) == list(range(ROWS))


def test_shuffled_images_are_all_other_ones():
    others = other_images(data())
    assert sorted(others) == list(range(ROWS)) and all(row != other for row, other in enumerate(others))


def result(bridge: str, rate: float, seed: int, cider: float) -> dict:
    run = bridges.Run(bridge, "captions", rate, seed, 4, 4, "noise", "dinov2", "llama")
    rest = dict(cider=cider, loss=3.0, loss_shuffled=3.5, parameters=5_000_000, cpu_minutes=2.0)
    return bridges.asdict(run) | rest


def test_the_table_shows_the_learning_rate_that_was_best_on_the_first_seed():
    results = [result("ours", 1e-3, 0, 0.2), result("ours", 1e-4, 0, 0.1), result("ours", 1e-4, 1, 0.9)]
    results += [result("ours", 1e-3, 1, 0.3)]
    row = bridges.table(results, {"ours": "captions"}).splitlines()[-1]
    assert "| 0.001 | 25.0 | 20.0, 30.0 | 3.000 | 3.500 |" in row


def test_a_finished_run_is_found_again(tmp_path):
    lines = [result("ours", 1e-3, 0, 0.2), result("ClipCap", 1e-3, 0, 0.1)]
    (tmp_path / "lines.jsonl").write_text("".join(bridges.json.dumps(line) + "\n" for line in lines))
    done = bridges.finished_runs(tmp_path / "lines.jsonl")
    assert [each["cider"] for each in done.values()] == [0.2, 0.1]
    assert run("ours", "captions") in done and run("ours", "words") not in done
