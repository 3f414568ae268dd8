"""The gradient of reward fine-tuning against a slow transcription, and what reward functions, log and files get."""

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.collator import CaptionCollator, RewardCollator
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource
from qformer_captioner.data.mixture import CaptionMixture
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.streaming import CaptionStream
from qformer_captioner.rewards import Rewards
from qformer_captioner.training.lora import captioner_of
from qformer_captioner.training.reward_trainer import RepeatedBatches, RewardTrainer
from qformer_captioner.training.training_arguments import QFormerTrainingArguments

from ..fixtures import tiny

LENGTH = 7


def letters(completions, **columns) -> list[float]:
    """Reward captions by an arbitrary number that depends on all of their tokens."""
    return [sum(map(ord, completion)) % 17 / 7 for completion in completions]


def constant(completions, **columns) -> list[float]:
    return [0.1] * len(completions)


def rows(number: int = 8) -> CaptionDataset:
    pictures = [tiny.picture(seed) for seed in range(number)]
    captions = [tiny.CAPTIONS[: 1 + seed % 3] for seed in range(number)]
    return CaptionDataset(
        CaptionSource("train", datasets.Dataset.from_dict({"image": pictures, "caption": captions})), SkippedRows()
    )


def captioner(language: str = "llama", **fields) -> QFormerCaptioner:
    """Return a captioner with a frozen vision encoder, whose samples have different lengths."""
    model = tiny.captioner(language=language, **fields)
    model.vision_model.requires_grad_(False)
    model.generation_config.eos_token_id = [1, *range(2, 20)]
    return model


def trainer_of(folder, model=None, reward=letters, data: CaptionDataset | None = None, **options) -> RewardTrainer:
    defaults = {"num_generations": 3, "generation_max_length": LENGTH, "per_device_train_batch_size": 4}
    defaults |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True}
    defaults |= {"generation_num_beams": 1, "max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    model = captioner() if model is None else model
    return RewardTrainer(
        model=model,
        args=QFormerTrainingArguments(output_dir=str(folder), use_cpu=True, **defaults | options),
        train_dataset=rows() if data is None else data,
        data_collator=CaptionCollator(captioner_of(model).processor),
        score=lambda captions, rows: {"letters": 0.0},
        rewards=Rewards({reward.__name__: reward}, [1.0]),
    )


def step(trainer: RewardTrainer, number: int = 3) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return a batch and the gradients of a step on it."""
    data = trainer.train_dataset
    batch = RewardCollator(trainer.data_collator.processor)([data[row] for row in range(number)])
    trainer.num_batches = 0
    trainer.current_gradient_accumulation_steps = 1
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items).backward()
    weights = trainer.model.named_parameters()
    return batch, {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


def log_probability(model: QFormerCaptioner, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of the tokens after an image, from the language model alone."""
    language_model, number = model.language_model, len(tokens)
    prefix = model.get_soft_prompt(image[None])
    if language_model.config.is_encoder_decoder:
        inputs = torch.cat([tokens.new_tensor([language_model.config.decoder_start_token_id]), tokens[:-1]])
        logits = language_model(inputs_embeds=prefix, decoder_input_ids=inputs[None]).logits[0]
    else:
        embedded = language_model.get_input_embeddings()(tokens[None, :-1])
        logits = language_model(inputs_embeds=torch.cat([prefix, embedded], dim=1)).logits[0, -number:]
    return logits.log_softmax(dim=-1)[torch.arange(number), tokens].sum()


def captions_of(trainer: RewardTrainer, image: int) -> list[torch.Tensor]:
    return [labels[labels != -100] for labels in trainer.samples[0].labels[image]]


def decode(trainer: RewardTrainer, tokens: torch.Tensor) -> str:
    return trainer.data_collator.processor.decode(tokens, skip_special_tokens=True).strip()


def gradients_of(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(gradients[name] / largest, expected[name] / largest, rtol=0, atol=1e-5, msg=name)


# --- The gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
@pytest.mark.parametrize("language", ["llama", "gpt2", "t5"])
def test_the_gradient_is_that_of_reinforce(language, baseline, tmp_path):
    model = captioner(language).double()
    trainer = trainer_of(tmp_path, model, baseline=baseline)
    batch, gradients = step(trainer)
    total = 0.0
    for image in range(3):
        captions = captions_of(trainer, image)
        rewards = [letters([decode(trainer, tokens)])[0] for tokens in captions]
        pixels = batch["pixel_values"][image]
        greedy = model.generate(pixels[None], max_new_tokens=LENGTH, num_beams=1)[0]
        for number, tokens in enumerate(captions):
            others = rewards[:number] + rewards[number + 1 :]
            expected = sum(others) / 2 if baseline == "leave_one_out" else letters([decode(trainer, greedy)])[0]
            total = total - (rewards[number] - expected) * log_probability(model, pixels, tokens)
    assert_equal(gradients, gradients_of(model, total / 9))
    assert len({len(tokens) for image in range(3) for tokens in captions_of(trainer, image)}) > 1


def test_equal_rewards_have_a_gradient_of_exactly_zero(tmp_path):
    _, gradients = step(trainer_of(tmp_path, reward=constant))
    assert gradients and not any(gradient.any() for gradient in gradients.values())


def test_a_reward_that_applies_to_no_caption_is_left_out_of_the_log(tmp_path):
    def sometimes(completions, **columns):
        return [None] * len(completions)

    trainer = trainer_of(tmp_path, reward=sometimes)
    step(trainer)
    trainer.log(logs := {"loss": 1.0})
    assert logs["reward"] == 0 and not any(name.startswith("rewards/") for name in logs)


def test_frozen_parts_get_no_gradient(tmp_path):
    model = captioner()
    model.language_model.requires_grad_(False)
    _, gradients = step(trainer_of(tmp_path, model))
    assert {name.split(".")[0] for name in gradients} == {"qformer", "language_projection"}


def test_adapters_get_the_gradient_of_reinforce(tmp_path):
    config = LoraConfig(
        r=2,
        target_modules=r"language_model\..*\.q_proj",
        modules_to_save=["qformer", "language_projection"],
        init_lora_weights=False,
    )
    model = get_peft_model(captioner(), config)
    trainer = trainer_of(tmp_path, model)
    batch, gradients = step(trainer)
    assert {"lora" in name or "modules_to_save" in name for name in gradients} == {True}
    total = 0.0
    for image in range(3):
        for tokens, advantage in zip(captions_of(trainer, image), trainer.samples[0].advantages[image], strict=True):
            total = total - advantage * log_probability(captioner_of(model), batch["pixel_values"][image], tokens)
    assert_equal(gradients, gradients_of(model, total / 9))


def test_a_further_step_has_the_gradient_of_the_clipped_objective(tmp_path):
    model = captioner()
    trainer = trainer_of(tmp_path, model, num_iterations=2, epsilon=0.05)
    batch, _ = step(trainer)
    old = trainer.samples[0]
    with torch.no_grad():
        model.language_projection.weight.mul_(1.2)  # as an optimizer step
    trainer.state.global_step = 1
    _, gradients = step(trainer)
    assert trainer.samples[0] is old, "the second step is on the same samples"
    objective, is_clipped = 0.0, []
    for image in range(3):
        for number, tokens in enumerate(captions_of(trainer, image)):
            now = log_probability(model, batch["pixel_values"][image], tokens)
            ratio, advantage = (now + old.losses[image, number]).exp(), old.advantages[image, number]
            terms = ratio * advantage, ratio.clamp(0.95, 1.05) * advantage
            objective, is_clipped = objective + torch.minimum(*terms), [*is_clipped, bool(terms[0] > terms[1])]
    assert len(set(is_clipped)) == 2, "some are clipped and some are not"
    assert_equal(gradients, gradients_of(model, -objective / 9))


def test_the_divergence_from_the_start_is_subtracted_from_the_rewards(tmp_path):
    model = captioner()
    trainer = trainer_of(tmp_path, model, beta=0.5)
    start = tiny.captioner()
    step(trainer)
    assert trainer.logged["kl"][0] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        model.qformer.query_tokens.mul_(1.5)
    batch, _ = step(trainer)
    for image in range(3):
        captions, pixels = captions_of(trainer, image), batch["pixel_values"][image]
        with torch.no_grad():
            kl = [log_probability(model, pixels, own) - log_probability(start, pixels, own) for own in captions]
        penalized = torch.stack([letters([decode(trainer, own)])[0] - 0.5 * kl[k] for k, own in enumerate(captions)])
        expected = 1.5 * (penalized - penalized.mean())  # the mean of the other two is left out
        torch.testing.assert_close(trainer.samples[0].advantages[image], expected, rtol=0, atol=1e-4)
    assert trainer.logged["kl"][1] != 0


def test_the_caption_loss_is_added(tmp_path):
    model = captioner()
    _, plain = step(trainer_of(tmp_path, model))
    batch, gradients = step(trainer_of(tmp_path, model, caption_loss_weight=0.7))
    caption_loss = model(batch["pixel_values"], labels=batch["labels"]).loss
    expected = gradients_of(model, 0.7 * caption_loss)
    assert_equal(gradients, {name: plain[name] + expected[name] for name in plain})


def test_gradient_accumulation_is_a_larger_batch(tmp_path):
    """Eight images in one batch and in four batches give the same samples and the same weights."""
    models = captioner(), captioner()
    sizes = {"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    options = {"max_steps": 2, "learning_rate": 1e-2, "optim": "sgd", "caption_loss_weight": 0.1, "logging_steps": 1}
    logs = []
    for model, size in zip(models, sizes, strict=True):
        trainer = trainer_of(tmp_path, model, **size, **options)
        trainer.train()
        logs.append([(entry["loss"], entry["reward"]) for entry in trainer.state.log_history if "reward" in entry])
    assert logs[0] == [pytest.approx(entry, abs=2e-4) for entry in logs[1]]
    for name, weight in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), weight, rtol=0, atol=1e-5, msg=name)
    assert not torch.equal(models[0].qformer.query_tokens, captioner().qformer.query_tokens)


def test_dropout_is_off_while_samples_are_drawn(tmp_path):
    labels = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer = trainer_of(tmp_path, captioner(hidden_dropout_prob=0.5))
        step(trainer)
        labels.append(trainer.samples[0].labels)
        assert trainer.model.qformer.training
    assert torch.equal(*labels)


def test_a_low_temperature_makes_all_samples_the_greedy_caption(tmp_path):
    trainer = trainer_of(tmp_path, temperature=1e-4)
    batch, gradients = step(trainer)
    greedy = trainer.model.generate(batch["pixel_values"], max_new_tokens=LENGTH, num_beams=1)
    for image in range(3):
        for tokens in captions_of(trainer, image):
            assert torch.equal(tokens, greedy[image, : len(tokens)])
    assert not any(gradient.any() for gradient in gradients.values()), "equal captions have equal rewards"


def test_training_raises_the_reward(tmp_path):
    def short(completion_ids, **columns) -> list[float]:
        return [-len(ids) for ids in completion_ids]

    options = {"max_steps": 12, "learning_rate": 3e-3, "logging_steps": 4, "num_generations": 6}
    trainer = trainer_of(tmp_path, reward=short, **options)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[-1] > rewards[0] + 1


# --- What rewards get -------------------------------------------------------------------------------------------------


def test_a_reward_gets_texts_tokens_references_and_images(tmp_path):
    seen = {}

    def reward(prompts, completions, completion_ids, references, image, **columns):
        seen.update(locals())
        return [0.0] * len(completions)

    trainer = trainer_of(tmp_path, reward=reward)
    trainer.data_collator.processor.prompt = "a red"
    step(trainer)
    assert seen["prompts"] == ["a red"] * 9
    assert seen["references"][2:4] == [tiny.CAPTIONS[:1], tiny.CAPTIONS[:2]]
    assert seen["image"][0] is seen["image"][2] and seen["image"][3] is not seen["image"][2]
    for number, ids in enumerate(seen["completion_ids"]):
        assert ids == captions_of(trainer, number // 3)[number % 3].tolist()
        assert seen["completions"][number] == decode(trainer, torch.tensor(ids))
        assert any(token in trainer.model.generation_config.eos_token_id for token in ids) or len(ids) == LENGTH


@pytest.mark.parametrize("kind", ["rows", "mixture", "stream"])
def test_a_reward_gets_the_columns_of_the_data_set_that_it_names(tmp_path, kind):
    seen = []

    def reward(completions, scene, **columns):
        seen.extend(zip(scene, columns["references"], strict=True))
        assert "other" not in columns
        return [0.0] * len(completions)

    table = datasets.Dataset.from_dict(
        {
            "image": [tiny.picture(seed) for seed in range(4)],
            "caption": [f"a {word}" for word in ("red", "blue", "green", "small")],
            "scene": ["red", "blue", "green", "small"],
            "other": [0] * 4,
        }
    )
    data = CaptionDataset(CaptionSource("train", table), SkippedRows())
    if kind == "mixture":
        data = CaptionMixture([data, data], [1.0, 1.0])
    if kind == "stream":
        stream = table.to_iterable_dataset().cast_column("image", datasets.Image(decode=False))
        data = CaptionStream([CaptionSource("train", stream)], SkippedRows())
    trainer_of(tmp_path, reward=reward, data=data, max_steps=2).train()
    assert len(seen) == 24
    assert all(references == [f"a {scene}"] for scene, references in seen)


def test_rows_with_features_have_the_samples_and_gradients_of_their_images(tmp_path):
    seen, model = {}, captioner()

    def reward(completions, image_embeds, **columns):
        seen["image_embeds"] = image_embeds
        return letters(completions)

    trainer = trainer_of(tmp_path, model)
    batch, expected = step(trainer)
    trainer = trainer_of(tmp_path, model, reward=reward)
    features = model.encode_images(batch.pop("pixel_values")).last_hidden_state
    del batch["columns"]["image"]
    padded = torch.cat([features, torch.full_like(features[:, :2], 9.0)], dim=1)
    mask = torch.tensor([[True] * features.shape[1] + [False] * 2] * 3)
    inputs = {**batch, "image_embeds": padded, "image_attention_mask": mask}
    model.train()
    gradients = gradients_of(model, trainer.compute_loss(model, inputs, num_items_in_batch=9))
    assert_equal(gradients, expected)
    assert len(seen["image_embeds"]) == 9
    assert torch.equal(seen["image_embeds"][5], features[1])


def test_a_frozen_vision_encoder_runs_once_for_a_batch(tmp_path):
    model, calls = captioner(), []
    model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    step(trainer_of(tmp_path, model, beta=0.1, num_iterations=2, baseline="greedy"))
    assert calls == [1]


def test_an_error_of_a_reward_is_one_sentence_that_names_it(tmp_path):
    def broken(completions, **columns):
        return [1.0] * (len(completions) - 1)

    with pytest.raises(InputError, match="'broken' returned 11 values for 12 completions"):
        trainer_of(tmp_path, reward=broken, max_steps=1).train()


# --- Log and evaluation -----------------------------------------------------------------------------------------------


def test_the_log_has_the_mean_and_the_spread_of_rewards(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1, logging_steps=1, beta=0.1)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    labels = trainer.samples[0].labels
    rewards = torch.tensor(letters([decode(trainer, own[own != -100]) for own in labels.flatten(0, 1)])).view(4, 3)
    ended = torch.isin(labels, torch.tensor(trainer.model.generation_config.eos_token_id)).any(dim=2)
    expected = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(dim=1).mean(),
        "rewards/letters/mean": rewards.mean(),
        "rewards/letters/std": rewards.std(dim=1).mean(),
        "completions/mean_length": (labels != -100).sum(dim=2).float().mean(),
        "completions/clipped_ratio": 1 - ended.float().mean(),
        "kl": 0.0,
    }
    assert 0 < entry["completions/clipped_ratio"] < 1
    assert {name: entry[name] for name in expected} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, abs=1e-3
    )


def test_captions_that_break_off_and_repeat_are_counted(tmp_path):
    captions = ["a man with a", "a dog runs", "a dog runs", "two dogs"]
    expected = {"bad_endings": 0.25, "mean_length": 3.0, "distinct": 0.75}
    assert trainer_of(tmp_path).describe_captions(captions) == expected


def test_right_images_have_higher_rewards_than_shuffled_ones(tmp_path):
    """A captioner that has learned its captions samples them only for their own images."""

    def exact(completions, references, **columns):
        return [float(completion in own) for completion, own in zip(completions, references, strict=True)]

    model = tiny.captioner()
    model.vision_model.requires_grad_(False)
    data, means = rows(3), []
    data.captions = [[caption] for caption in tiny.CAPTIONS]
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    batch = CaptionCollator(model.processor)([data[row] for row in range(3)])
    for _ in range(40):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for shift in (0, 1):
        data.captions = [[tiny.CAPTIONS[(row + shift) % 3]] for row in range(3)]
        trainer = trainer_of(tmp_path, model, reward=exact, data=data, generation_max_length=16)
        step(trainer)
        means.append(trainer.logged["reward"][0])
    assert means[0] > 0.8 and means[1] < 0.1


# --- Several steps on the same samples --------------------------------------------------------------------------------


def test_batches_are_repeated_in_an_order_that_depends_on_the_epoch():
    data = rows(8)
    sampler = RepeatedBatches(data, batch_size=3, repeats=2, seed=0)
    orders = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(orders[-1]) == len(sampler) == 12
        assert orders[-1][:3] == orders[-1][3:6] and orders[-1][6:9] == orders[-1][9:]
        assert len(set(orders[-1])) == 6
    assert orders[0] != orders[1]


def test_several_steps_are_done_on_the_same_samples(tmp_path):
    drawn = []

    def reward(completions, **columns):
        drawn.append(completions)
        return letters(completions)

    trainer_of(tmp_path, reward=reward, num_iterations=3, max_steps=5).train()
    assert len(drawn) == 2  # steps 0 and 3


def test_rows_that_do_not_fill_a_batch_cannot_be_repeated(tmp_path):
    with pytest.raises(InputError, match="--num_iterations needs a whole batch of 16 rows, but there are 8"):
        trainer_of(tmp_path, num_iterations=2, per_device_train_batch_size=16, max_steps=1).train()
