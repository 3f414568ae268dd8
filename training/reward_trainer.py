"""Trainer of captioners by the rewards of sampled captions, with evaluation as for captions."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Sampler

from ..backbones_qformer import is_frozen
from ..common.errors import InputError
from ..data.collator import RewardCollator
from ..data.dataset import CaptionDataset
from ..rewards import bad_ending
from ..vision_qformer import encode_images, split_vision_inputs
from .advantages import clipped_weights, leave_one_out
from .evaluation_files import REWARD_LOSSES, rows_to_show, write_sample_files
from .lora import captioner_of
from .sampling import draw_uniforms, end_tokens, sample_captions
from .start_weights import StartWeights
from .trainer import CaptionTrainer

if TYPE_CHECKING:
    from ..rewards import Rewards, RewardScores

Inputs = dict[str, Any]


@dataclass
class Samples:
    """Sampled captions of a batch, and what their gradient needs.

    Args:
        labels (`[B, K, T]`): their tokens.
        advantages (`[B, K]`): their advantages.
        losses (`[B, K]`, *optional*): their cross-entropy at the time of sampling, if there are several steps on them.
    """

    labels: torch.Tensor
    advantages: torch.Tensor
    losses: torch.Tensor | None = None


class RewardTrainer(CaptionTrainer):
    """Trainer of a [`QFormerCaptioner`] by REINFORCE on captions that it samples (Rennie et al. 2017; Luo 2020).

    For each image, captions are sampled behind one prefix and scored. The loss is the mean over all samples of
    `-advantage * log-probability`, where the log-probability is the sum over all tokens, end of sequence included. The
    advantage is the reward minus a baseline, `args.baseline`.

    `args.beta`, `args.num_iterations` and `args.epsilon` mean what they do in trl's `RLOOTrainer`. The KL divergence is
    that from the weights at the start. `args.caption_loss_weight` adds the mean cross-entropy of the reference
    captions, in the same pass.

    **Log.** The entries of training have the names of trl: `reward`, `reward_std`, `rewards/NAME/mean`,
    `rewards/NAME/std`, and `kl`. A spread is that among the samples of an image. `completions/mean_length` counts
    tokens. `completions/clipped_ratio` is the share of samples that were cut at the maximum length.

    **Evaluation** is that of [`CaptionTrainer`]. It adds signs that a reward is gamed. `eval_bad_endings` is the share
    of captions that break off after a word such as "a" or "with". `eval_mean_length` counts words, and `eval_distinct`
    is the share of captions that differ. The samples of some rows and their rewards are written to `samples.png`.

    Args:
        args, kwargs: as for [`CaptionTrainer`].
        rewards: the rewards. A column of the data set that the signature of a reward names is passed to it.

    Example:

    ```python
    >>> trainer = RewardTrainer(
    ...     model=model,
    ...     args=QFormerTrainingArguments(output_dir="outputs/mine", num_generations=5),
    ...     train_dataset=train_data,
    ...     eval_dataset=eval_data,
    ...     data_collator=CaptionCollator(model.processor),
    ...     score=CaptionScorer(),
    ...     rewards=Rewards({"short": short}, [1.0]),
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    evaluation_stems = ("captions", "samples")
    plotted_losses = REWARD_LOSSES

    def __init__(self, *args: Any, rewards: "Rewards", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rewards = rewards
        named = rewards.columns - {"references", "image", "image_embeds", "completion_ids"}
        self.train_dataset.keep_columns(named)
        if self.eval_dataset is not None:
            self.eval_dataset.keep_columns(named)
        self.start = StartWeights(self.model) if self.args.beta else None
        self.logged: dict[str, list[torch.Tensor]] = {}  # of the batches since the last log entry
        # Of the current step: the samples of its batches, the number of batches that are done, and the number of tokens
        # of references in all processes
        self.samples: list[Samples] = []
        self.num_batches = 0
        self.num_reference_tokens: torch.Tensor | int | None = None

    # --- Data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the base, whose batches also hold what rewards read."""
        collator = self.data_collator
        self.data_collator = RewardCollator(collator.processor, collator.max_caption_length)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return RepeatedBatches(self.train_dataset, batch_size, self.args.num_iterations, self.args.seed)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        """Return the batches of a step as the Trainer does, with the number of captions that they will be sampled."""
        self.num_batches = 0
        if self.state.global_step % self.args.num_iterations == 0:
            self.samples = []
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Return the number of samples of a step in all processes, by which the loss is divided."""
        if self.args.caption_loss_weight:
            self.num_reference_tokens = super()._get_num_items_in_batch(batch_samples, device)
        samples = [{"labels": torch.zeros(len(batch["labels"]), self.args.num_generations)} for batch in batch_samples]
        return super()._get_num_items_in_batch(samples, device)

    # --- Training -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Sample captions, unless this is a further step on the same samples, and return the loss of REINFORCE."""
        number, self.num_batches = self.num_batches, self.num_batches + 1
        texts, images = self._split(inputs)
        if self.state.global_step % self.args.num_iterations == 0:
            self.samples.append(self._sample(images, texts, number))
            weights = self.samples[number].advantages
        else:
            samples = self.samples[number]
            assert samples.losses is not None
            with self._evaluation_mode():
                log_ratios = samples.losses - self._losses(images, samples.labels)
            weights = clipped_weights(samples.advantages, log_ratios, self.args.epsilon)
        labels = self.samples[number].labels
        if self.args.caption_loss_weight:
            assert num_items_in_batch is not None and self.num_reference_tokens is not None
            # The loss is divided by the number of samples.
            weight = self.args.caption_loss_weight * num_items_in_batch / self.num_reference_tokens
            labels = join_labels(labels, texts["labels"])
            weights = torch.cat([weights, weights.new_ones(texts["labels"].shape[:2]) * weight], dim=1)
        batch = {**images, "labels": labels, "label_weights": weights}
        return super().compute_loss(model, batch, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def _sample(self, images: Inputs, texts: Inputs, number: int) -> Samples:
        """Sample captions of a batch, score them, and return them with their advantages."""
        args, batch_size = self.args, len(texts["labels"])
        first = (number * args.world_size + args.process_index) * args.train_batch_size
        length = args.generation_max_length
        assert length is not None, "the options check it"
        uniforms = draw_uniforms(
            args.seed, self.state.global_step, range(first, first + batch_size), args.num_generations, length
        )
        is_greedy = args.baseline == "greedy"
        if is_greedy:  # one more row of each image, the greedy caption
            uniforms = torch.cat([uniforms, torch.full_like(uniforms[:, :1], torch.nan)], dim=1)
        kl = losses = None
        with self._evaluation_mode():
            labels = self._draw(images, uniforms)
            if args.num_iterations > 1 or self.start is not None:
                losses = self._losses(images, labels)
            if losses is not None and self.start is not None:
                with self.start.in_model():
                    kl = self._losses(images, labels) - losses
        _, scores = self._score(labels, texts, images)
        rewards = scores.total.to(labels.device).view(labels.shape[:2])
        penalized = rewards if kl is None else rewards - args.beta * kl
        sampled = slice(args.num_generations)
        advantages = penalized[:, sampled] - penalized[:, -1:] if is_greedy else leave_one_out(penalized)
        by_name = {name: values.view(labels.shape[:2])[:, sampled] for name, values in scores.by_name.items()}
        self._keep_for_log(labels[:, sampled], rewards[:, sampled], by_name, None if kl is None else kl[:, sampled])
        return Samples(labels[:, sampled], advantages, None if losses is None else losses[:, sampled])

    def _split(self, inputs: Inputs) -> tuple[Inputs, Inputs]:
        """Return the texts of a batch, and its images, of which a frozen vision encoder has computed the features."""
        texts = {name: inputs[name] for name in ("prompts", "columns", "labels")}
        images = {name: value for name, value in inputs.items() if name not in texts}
        vision_model = captioner_of(self.model).vision_model
        if "pixel_values" not in images or not is_frozen(vision_model):
            return texts, images
        vision_inputs, others = split_vision_inputs(images)
        with self.accelerator.autocast():
            outputs = encode_images(vision_model, others.pop("pixel_values"), **vision_inputs)
        mask = {} if outputs.attention_mask is None else {"image_attention_mask": outputs.attention_mask}
        return texts, {**others, "image_embeds": outputs.last_hidden_state, **mask}

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Turn off dropout inside a `with` block, and keep the random numbers of training as they were."""
        model = self.accelerator.unwrap_model(self.model)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        was_training = model.training
        with torch.no_grad(), torch.random.fork_rng(devices=devices), self.accelerator.autocast():
            model.eval()
            try:
                yield
            finally:
                model.train(was_training)

    def _draw(self, images: Inputs, uniforms: torch.Tensor) -> torch.Tensor:
        captioner = captioner_of(self.accelerator.unwrap_model(self.model))
        return sample_captions(captioner, images, uniforms, self.args.temperature)

    def _losses(self, images: Inputs, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of captions `[B, K, T]` in nats, summed over their tokens, `[B, K]`."""
        model = self.accelerator.unwrap_model(self.model)
        return model(**images, labels=labels, skip_logits=True).losses

    def _score(self, labels: torch.Tensor, texts: Inputs, images: Inputs) -> tuple[list[str], "RewardScores"]:
        """Return captions `[B, K, T]` as texts, image by image, and their rewards."""
        number, processor = labels.shape[1], self.data_collator.processor
        ids = [[token for token in row if token != -100] for row in labels.flatten(0, 1).tolist()]
        captions = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        columns = {"prompts": texts["prompts"], **texts["columns"]}
        if "image" not in columns:
            columns["image_embeds"] = rows_of_features(images["image_embeds"], images.get("image_attention_mask"))
        repeated = {name: repeat(values, number) for name, values in columns.items()}
        return captions, self.rewards(completions=captions, completion_ids=ids, **repeated)

    # --- Log ----------------------------------------------------------------------------------------------------------

    def _keep_for_log(
        self,
        labels: torch.Tensor,
        rewards: torch.Tensor,
        by_name: dict[str, torch.Tensor],
        kl: torch.Tensor | None,
    ) -> None:
        ends = labels.new_tensor(end_tokens(captioner_of(self.model)))
        lengths, is_cut = (labels != -100).sum(dim=2).float(), ~torch.isin(labels, ends).any(dim=2)
        facts = {"reward": rewards, "completions/mean_length": lengths, "completions/clipped_ratio": is_cut.float()}
        facts |= {f"rewards/{name}/mean": values for name, values in by_name.items()}
        facts |= {} if kl is None else {"kl": kl}
        for name, values in facts.items():
            self.logged.setdefault(name, []).append(values.nanmean().cpu())
        spreads = {"reward_std": rewards, **{f"rewards/{name}/std": values for name, values in by_name.items()}}
        for name, values in spreads.items() if labels.shape[1] > 1 else ():
            self.logged.setdefault(name, []).append(values.std(dim=1).nanmean().cpu())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the base does, and add rewards and samples to the training loss."""
        if "loss" in logs and self.logged:
            for name, values in self.logged.items():
                means = self.accelerator.gather(torch.stack(values).nanmean()[None].to(self.args.device))
                if not means.isnan().all():  # a reward that applied to no caption has no mean
                    logs[name] = round(means.nanmean().item(), 4)
            self.logged = {}
        super().log(logs, start_time)

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    def describe_captions(self, captions: list[str]) -> dict[str, float]:
        """Return the share of captions that break off, their mean length in words, and the share that differ."""
        number = len(captions)
        return {
            "bad_endings": sum(map(bad_ending, captions)) / number,
            "mean_length": sum(len(caption.split()) for caption in captions) / number,
            "distinct": len(set(captions)) / number,
        }

    def _evaluate_rows(self, rows: CaptionDataset) -> tuple[dict[str, float], Callable[[], None]]:
        """Return losses and scores as the base does, and a function that also writes the samples of some rows."""
        metrics, write = super()._evaluate_rows(rows)
        return metrics, functools.partial(self._write_files, rows, write)

    @torch.no_grad()
    def _write_files(self, rows: CaptionDataset, write: Callable[[], None]) -> None:
        write()
        shown = rows_to_show(rows)
        collate = RewardCollator(self.data_collator.processor, self.data_collator.max_caption_length)
        texts, images = self._split(self._prepare_inputs(collate([rows[row] for row in shown])))
        length = self.args.generation_max_length
        assert length is not None, "the options check it"
        uniforms = draw_uniforms(self.args.seed, 0, shown, self.args.num_generations, length)  # the same in each sheet
        with self._evaluation_mode():
            labels = self._draw(images, uniforms)
        captions, scores = self._score(labels, texts, images)
        samples = [
            {
                "caption": caption,
                "reward": scores.total[number].item(),
                "rewards": {name: values[number].item() for name, values in scores.by_name.items()},
            }
            for number, caption in enumerate(captions)
        ]
        of_rows = [samples[start : start + labels.shape[1]] for start in range(0, len(samples), labels.shape[1])]
        write_sample_files(self.args.output_folder, rows, shown, of_rows, self.state)

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state as the base does, and the samples on which further steps follow."""
        if self.state.global_step % self.args.num_iterations:
            tensors = {
                f"{number}.{name}": tensor.contiguous()
                for number, samples in enumerate(self.samples)
                for name, tensor in vars(samples).items()
            }
            Path(output_dir).mkdir(parents=True, exist_ok=True)  # the main process may not have saved yet
            save_file(tensors, self._samples_file(output_dir))
        super()._save_rng_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer and the schedule of a checkpoint as the base does, and its samples."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._samples_file(checkpoint).is_file():
            return
        tensors = load_file(self._samples_file(checkpoint), device=str(self.args.device))
        fields = ("labels", "advantages", "losses")
        numbers = range(len(tensors) // len(fields))
        self.samples = [Samples(*(tensors[f"{number}.{name}"] for name in fields)) for number in numbers]

    def _samples_file(self, folder: str) -> Path:
        return Path(folder) / f"samples_{self.args.process_index}.safetensors"


class RepeatedBatches(Sampler[int]):
    """Sampler that repeats each batch of all processes, so that several steps are done on it.

    Rows that do not fill a batch are left out of an epoch. The order depends only on the seed and the epoch.

    Args:
        rows: the rows to train on, with their epoch.
        batch_size: number of rows of a step in all processes.
        repeats: number of steps on a batch.
        seed: random seed of the order.

    Raises:
        InputError: if the rows do not fill a batch.
    """

    def __init__(self, rows: Any, batch_size: int, repeats: int, seed: int):
        if len(rows) < batch_size:
            raise InputError(
                f"--num_iterations needs a whole batch of {batch_size} rows, but there are {len(rows)}: give a smaller "
                "--per_device_train_batch_size."
            )
        self.rows, self.batch_size, self.repeats, self.seed = rows, batch_size, repeats, seed

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size * self.batch_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, int(self.rows.epoch))) % 2**63)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            yield from order[start : start + self.batch_size] * self.repeats


def repeat(values: list[Any], number: int) -> list[Any]:
    """Return each value as often as an image has captions; all captions of an image have the same object."""
    return [value for value in values for _ in range(number)]


def rows_of_features(features: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the features of each row, `[N, Dv]`, without padding."""
    return list(features) if mask is None else [row[own] for row, own in zip(features, mask.bool(), strict=True)]


def join_labels(labels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the captions `[B, K, T]` followed by others `[B, K', T']`, padded with -100."""
    length = max(labels.shape[2], others.shape[2])
    padded = [
        torch.nn.functional.pad(captions, (0, length - captions.shape[2]), value=-100) for captions in (labels, others)
    ]
    return torch.cat(padded, dim=1)
