"""Losses and gradients of stage 1 with two processes are those of one process with the batch of both."""

import pytest
import torch

from qformer_captioner import QFormerForPretraining

from ..fixtures import tiny

# Each process has texts and features of its own lengths. Other seeds would draw other negatives.
PROGRAM = """
import os
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from qformer_captioner import QFormerForPretraining

def run(rank):
    distributed.init_process_group("gloo", init_method="file://" + os.path.abspath("meeting"), rank=rank, world_size=2)
    results = {}
    for name, parts in torch.load("batches.pt").items():
        model = QFormerForPretraining.from_pretrained(name).train()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        torch.manual_seed(10 * rank)
        output = wrapped(**parts[rank])
        output.loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results[name] = dict(output), gradients
    torch.save(results, f"results-{rank}.pt")

child = os.fork()
run(0 if child else 1)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
LOSSES = ("loss", "itc_loss", "itm_loss", "itg_loss")


def texts_of(lengths: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return random texts `[B, K, T]` of these lengths, with their mask. A length of 0 is padding."""
    sizes = torch.tensor(lengths)
    mask = (torch.arange(int(sizes.max())) < sizes[..., None]).long()
    return {"input_ids": torch.randint(4, tiny.WORDS, mask.shape) * mask, "attention_mask": mask}


def features_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Return random features of these lengths, with their mask if there is padding."""
    sizes = torch.tensor(lengths)
    features = {"image_embeds": torch.randn(len(lengths), max(lengths), tiny.VISION_WIDTH)}
    if min(lengths) < max(lengths):
        features["image_attention_mask"] = torch.arange(max(lengths)) < sizes[:, None]
    return features


def with_equal_texts(parts: list[dict], places: list[tuple[int, int, int]]) -> list[dict]:
    """Return the batches of all processes with the very first text at further places: process, image and text."""
    parts = [{name: part.clone() for name, part in each.items()} for each in parts]
    first = parts[0]["input_ids"][0, 0][parts[0]["attention_mask"][0, 0].bool()]
    for process, image, text in places:
        ids, mask = (parts[process][name][image, text] for name in ("input_ids", "attention_mask"))
        ids.zero_()[: len(first)] = first
        mask.zero_()[: len(first)] = 1
    return parts


def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the batches of all processes as one, padded to the longest."""
    parts = [dict(part) for part in parts]
    if "image_embeds" in parts[0]:
        for part in parts:
            part.setdefault("image_attention_mask", torch.ones(part["image_embeds"].shape[:2], dtype=torch.bool))
    whole = {}
    for name in parts[0]:
        shape = torch.tensor([part[name].shape for part in parts]).amax(dim=0)
        whole[name] = parts[0][name].new_zeros(sum(len(part[name]) for part in parts), *shape[1:])
        row = 0
        for part in parts:
            whole[name][(slice(row, row + len(part[name])), *map(slice, part[name].shape[1:]))] = part[name]
            row += len(part[name])
    return whole


def cases() -> dict[str, tuple[QFormerForPretraining, list[dict[str, torch.Tensor]]]]:
    """Return models, each with the batches of two processes."""
    torch.manual_seed(0)
    texts = [texts_of([[5, 4], [3, 0]]), texts_of([[8, 2, 3], [4, 4, 0], [6, 0, 0]])]
    features = [features_of([6, 6]), features_of([3, 5, 4])]
    images = tiny.images(5).split([2, 3])
    of_features = [{**part, **text} for part, text in zip(features, texts, strict=True)]
    of_images = [{"pixel_values": part, **text} for part, text in zip(images, texts, strict=True)]
    deep = {"num_hidden_layers": 3}
    found = {}
    for loss in ("softmax", "sigmoid"):
        found[f"{loss}-features"] = tiny.pretraining_model(None, deep, itc_loss=loss), of_features
        found[f"{loss}-images"] = tiny.pretraining_model("vit", deep, itc_loss=loss), of_images
    found["frozen"] = tiny.pretraining_model("vit", deep), of_images
    found["frozen"][0].vision_model.requires_grad_(False)
    weights = {"itc_weight": 0.5, "itm_weight": 2.0, "itg_weight": 0.0}
    found["without generation"] = tiny.pretraining_model("vit", deep, **weights), of_images
    places = [(0, 1, 0), (1, 0, 0), (1, 2, 0)]
    found["equal texts"] = tiny.pretraining_model(None, deep), with_equal_texts(of_features, places)
    alike = [texts_of([[4], [4]]), texts_of([[4, 0], [4, 0], [4, 3]])]  # the last text alone is wrong for an image
    alike = [{**part, **text} for part, text in zip(features, alike, strict=True)]
    places = [(0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0)]
    found["texts without wrong pairs"] = tiny.pretraining_model(None, deep), with_equal_texts(alike, places)
    found["matching alone"] = tiny.pretraining_model(None, itc_weight=0, itg_weight=0), of_features
    return found


@pytest.mark.slow
def test_two_processes_train_as_one(commands, tmp_path):
    torch.save({name: parts for name, (_, parts) in cases().items()}, tmp_path / "batches.pt")
    for name, (model, _) in cases().items():
        model.save_pretrained(tmp_path / name)
    done = commands.run("python", PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [torch.load(tmp_path / f"results-{rank}.pt") for rank in range(2)]
    for name, (_, parts) in cases().items():
        model = QFormerForPretraining.from_pretrained(tmp_path / name).train()
        torch.manual_seed(0)
        expected = model(**joined(parts))
        expected.loss.backward()
        (first, gradients), (second, _) = (result[name] for result in results)
        for key in {"negative_images", "negative_texts", "logits_per_image"} & expected.keys():
            torch.testing.assert_close(first[key], expected[key], rtol=1e-5, atol=1e-5, msg=f"{name} {key}")
            torch.testing.assert_close(second[key], first[key], rtol=1e-5, atol=1e-5)
        for key in LOSSES:
            if key in expected:
                torch.testing.assert_close((first[key] + second[key]) / 2, expected[key], rtol=1e-5, atol=1e-5)
        expected_gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in expected_gradients.items():
            difference = (gradients[key] - gradient).abs().max().item()
            assert difference <= 1e-5 * max(1, gradient.abs().max().item()), (name, key, difference)
