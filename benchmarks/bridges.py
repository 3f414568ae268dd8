"""Bridges between the same frozen models: our Q-Former, the old scripts' Q-Former and ClipCap's MLP.

    python -m benchmarks.bridges --dataset_name flickr8k --vision_model dinov2-small --language_model smollm2

All bridges train on the same features and batches, in the same order, for the same number of steps, with the same
optimizer. Each trains at three learning rates on the first seed. The rate with the best CIDEr on the evaluation split
is then used for the other seeds.

There are two objectives: the loss of the captions, without or with a small bag-of-words loss. Our Q-Former is trained
with this loss. The other two bridges are trained without it, as their authors did. A second table gives each bridge the
other objective.

Each finished run adds a line of JSON to benchmarks/results/bridges.jsonl, and is not repeated. A killed command
therefore continues where it stopped. Delete the lines of a bridge after you change it.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, set_seed

from qformer_captioner import QFormerCaptioner
from qformer_captioner.metrics import References
from qformer_captioner.training.bag_of_words import BagOfWordsLoss

from .bridge_data import CaptionedFeatures, draw_batches, load_data, pad_labels, shuffled_rows
from .bridge_models import (
    OUR_QFORMER,
    check_bridge,
    install_clipcap,
    install_legacy_qformer,
    install_our_qformer,
    trainable_parameters,
)
from .common import RESULTS_DIR, machine_facts, new_figure, save_figure, write_result

BRIDGES = {"ours": install_our_qformer, "old scripts": install_legacy_qformer, "ClipCap": install_clipcap}
TITLES = {"ours": "our Q-Former", "old scripts": "the old scripts' Q-Former", "ClipCap": "ClipCap's MLP"}
# An objective is "words" or "captions", in the results as well: with the bag-of-words loss and without.
OBJECTIVES = {"words": "captions and bag of words", "captions": "captions"}
AUTHORS_OBJECTIVE = {"ours": "words", "old scripts": "captions", "ClipCap": "captions"}
OTHER_OBJECTIVE = {"ours": "captions", "old scripts": "words", "ClipCap": "words"}
LEARNING_RATES = {
    "ours": [2e-3, 4e-3, 8e-3],
    "old scripts": [1e-4, 3e-4, 1e-3],
    "ClipCap": [3e-4, 1e-3, 3e-3],
}
# Factor of the learning rate for everything but the projection. At a high rate our Q-Former first unlearns the image:
# features are noise to the language model at the start, and the layer norms let the query tokens suppress them.
QFORMER_LR_FACTOR = {"ours": 1 / 40, "old scripts": 1.0, "ClipCap": 1.0}
BAG_OF_WORDS_WEIGHT = 0.05
NUM_BEAMS, MAX_NEW_TOKENS = 3, 20


@dataclass(frozen=True)
class Run:
    """Settings of one training run. A line of results begins with them."""

    bridge: str
    objective: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    dataset: str
    vision_model: str
    language_model: str


# --- One run ----------------------------------------------------------------------------------------------------------


def build(
    bridge: str, seed: int, vision_model: str, language_model: str, features: torch.Tensor, dtype: str = "bfloat16"
) -> QFormerCaptioner:
    """Return a captioner with a new bridge.

    Args:
        bridge: name of the bridge.
        seed: random seed of its weights.
        vision_model: folder or Hub id of the vision encoder.
        language_model: folder or Hub id of the language model.
        features: features of the training images, `[R, N, Dv]`, from which a bridge may be initialised.
        dtype: data type of the frozen models.
    """
    set_seed(seed)
    model = QFormerCaptioner.from_backbones(
        vision_model, language_model, dtype=dtype, projection_per_query=bridge == "ours", **OUR_QFORMER
    )
    BRIDGES[bridge](model, features)
    return model


def create_optimizer(model: QFormerCaptioner, run: Run) -> torch.optim.AdamW:
    """Return AdamW with one group for each parameter. Only matrices have weight decay."""
    groups = [
        {
            "params": [parameter],
            "lr": run.learning_rate * (QFORMER_LR_FACTOR[run.bridge] if name.startswith("qformer.") else 1.0),
            "weight_decay": 0.05 if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in trainable_parameters(model).items()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(model: QFormerCaptioner, data: CaptionedFeatures, bag_of_words: BagOfWordsLoss | None, run: Run) -> None:
    """Train the bridge of a captioner. This loop is the same for all bridges.

    Args:
        model: captioner with a bridge.
        data: training images.
        bag_of_words: auxiliary loss, which the objective "captions" does not use.
        run: settings of the run.
    """
    optimizer = create_optimizer(model, run)
    scheduler = get_cosine_schedule_with_warmup(optimizer, run.steps // 10, run.steps)
    parameters = list(trainable_parameters(model).values())
    model.train()
    start, losses = time.time(), []
    for step, batch in enumerate(draw_batches(data, run.batch_size, run.steps, run.seed), start=1):
        output = model(image_embeds=batch.image_embeds, labels=batch.labels)
        loss = output.loss
        if run.objective == "words":
            loss = loss + BAG_OF_WORDS_WEIGHT * bag_of_words(output.soft_prompt, batch.all_labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == run.steps:
            print(f"  step {step}: {statistics.mean(losses[-50:]):.3f}, {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def evaluate(model: QFormerCaptioner, data: CaptionedFeatures, batch_size: int = 8) -> dict[str, Any]:
    """Return the CIDEr of generated captions and the loss of first captions, with right and with shuffled images."""
    model.eval()
    captions: list[str] = []
    shuffled = shuffled_rows(data)
    losses, num_tokens = {"loss": 0.0, "loss_shuffled": 0.0}, 0
    for start in range(0, len(data), batch_size):
        rows = list(range(start, min(start + batch_size, len(data))))
        labels = pad_labels([data.token_ids[row][:1] for row in rows])[:, 0]
        batch_tokens = int((labels != -100).sum())
        num_tokens += batch_tokens
        for name, image_rows in (("loss", rows), ("loss_shuffled", [shuffled[row] for row in rows])):
            image_embeds = data.features[image_rows, 0].float()
            losses[name] += batch_tokens * model(image_embeds=image_embeds, labels=labels).loss.item()
        image_embeds = data.features[rows, 0].float()
        token_ids = model.generate(image_embeds=image_embeds, num_beams=NUM_BEAMS, max_new_tokens=MAX_NEW_TOKENS)
        captions += [text.strip() for text in model.processor.batch_decode(token_ids, skip_special_tokens=True)]
    references = References(data.captions)
    return {
        "cider": references.score(captions, allow_empty=True)["cider"],
        "cider_shuffled": references.score([captions[row] for row in shuffled], allow_empty=True)["cider"],
        **{name: loss / num_tokens for name, loss in losses.items()},
        "different_captions": len(set(captions)),
        "examples": captions[:5],
    }


# --- All runs ---------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Models and data that all runs share, and the file of their results.

    Args:
        options: options of the command line.
        train_data: training images.
        eval_data: evaluation images.
        bag_of_words: auxiliary loss.
    """

    options: argparse.Namespace
    train_data: CaptionedFeatures
    eval_data: CaptionedFeatures
    bag_of_words: BagOfWordsLoss

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Comparison":
        """Load the models, compute the features and prepare the bag-of-words loss."""
        model = QFormerCaptioner.from_backbones(
            options.vision_model, options.language_model, dtype="bfloat16", **OUR_QFORMER
        )
        train_data, eval_data = load_data(
            model, options.dataset_name, options.image_column, options.caption_column, options.views, options.features
        )
        captions = [caption for captions in train_data.token_ids for caption in captions]
        bag_of_words = BagOfWordsLoss(captions, model.get_input_embeddings().weight)
        return cls(options, train_data, eval_data, bag_of_words)

    @property
    def results_file(self) -> Path:
        return RESULTS_DIR / f"{self.options.results}.jsonl"

    def build(self, bridge: str, seed: int) -> QFormerCaptioner:
        models = self.options.vision_model, self.options.language_model
        return build(bridge, seed, *models, self.train_data.features[:, 0])

    def check_bridges(self) -> None:
        """Check each bridge on a batch (see [`check_bridge`])."""
        batch = next(draw_batches(self.train_data, self.options.batch_size, 1, 0))
        for bridge in BRIDGES:
            check_bridge(self.build(bridge, 0), batch.image_embeds, batch.labels)

    def results_of(self, bridge: str, objective: str) -> list[dict[str, Any]]:
        """Return the results of a bridge: all learning rates on the first seed, and the best rate on the others."""
        first_seed, *other_seeds = self.options.seeds
        rates = self.options.learning_rates or LEARNING_RATES[bridge]
        results = [self.result_of(bridge, objective, rate, first_seed) for rate in rates]
        best = best_learning_rate(results)
        return results + [self.result_of(bridge, objective, best, seed) for seed in other_seeds]

    def result_of(self, bridge: str, objective: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """Return the result of a run. A run that is not in the file of results yet is trained and added to it."""
        options = self.options
        names = [Path(name).name for name in (options.dataset_name, options.vision_model, options.language_model)]
        run = Run(bridge, objective, learning_rate, seed, options.steps, options.batch_size, *names)
        if run not in finished_runs(self.results_file):
            print(f"\n{run}", flush=True)
            write_result(options.results, asdict(run) | self.train_and_evaluate(run))
        return finished_runs(self.results_file)[run]

    def train_and_evaluate(self, run: Run) -> dict[str, Any]:
        model = self.build(run.bridge, run.seed)
        start = time.process_time()  # of all threads, so other processes on the machine do not count
        train(model, self.train_data, self.bag_of_words, run)
        cpu_minutes = (time.process_time() - start) / 60
        scores = evaluate(model, self.eval_data)
        print(f"CIDEr {scores['cider']:.4f}, loss {scores['loss']:.3f} (shuffled {scores['loss_shuffled']:.3f})")
        return {
            **scores,
            "train_images": len(self.train_data),
            "dev_images": len(self.eval_data),
            "parameters": sum(parameter.numel() for parameter in trainable_parameters(model).values()),
            "cpu_minutes": cpu_minutes,
            **machine_facts("qformer-captioner", "torch", "transformers"),
            "threads": torch.get_num_threads(),
        }


def finished_runs(file: Path) -> dict[Run, dict[str, Any]]:
    """Read the results of earlier runs. A missing file gives an empty result."""
    lines = file.read_text().splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines]
    return {Run(**{field.name: result[field.name] for field in fields(Run)}): result for result in results}


# --- Table and figure -------------------------------------------------------------------------------------------------


def select(results: list[dict[str, Any]], bridge: str, objective: str) -> list[dict[str, Any]]:
    return [result for result in results if (result["bridge"], result["objective"]) == (bridge, objective)]


def best_learning_rate(results: list[dict[str, Any]]) -> float:
    """Return the learning rate with the best CIDEr on the first seed, on which all of them were tried."""
    first_seed = min(result["seed"] for result in results)
    candidates = [result for result in results if result["seed"] == first_seed]
    return max(candidates, key=lambda result: result["cider"])["learning_rate"]


def format_table(results: list[dict[str, Any]], objectives: dict[str, str]) -> str:
    """Return a Markdown table with a row for each bridge at its best learning rate.

    Args:
        results: results of all runs.
        objectives: objective of each bridge.
    """
    lines = [
        "| bridge | trained parameters | objective | steps | best learning rate | dev CIDEr x 100, mean | each seed "
        "| loss: right images | shuffled | CPU minutes of training |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bridge, objective in objectives.items():
        selected = select(results, bridge, objective)
        if selected:
            lines.append(format_row(selected))
    return "\n".join(lines)


def format_row(results: list[dict[str, Any]]) -> str:
    """Return the row of the table for the results of one bridge and one objective."""
    rate = best_learning_rate(results)
    seeds = sorted((result for result in results if result["learning_rate"] == rate), key=lambda result: result["seed"])
    names = ("cider", "loss", "loss_shuffled", "cpu_minutes")
    mean = {name: statistics.mean(result[name] for result in seeds) for name in names}
    first = seeds[0]
    ciders = ", ".join(f"{100 * result['cider']:.1f}" for result in seeds)
    return (
        f"| {TITLES[first['bridge']]} | {first['parameters'] / 1e6:.1f} M | {OBJECTIVES[first['objective']]} "
        f"| {first['steps']} | {rate:g} | {100 * mean['cider']:.1f} | {ciders} | {mean['loss']:.3f} "
        f"| {mean['loss_shuffled']:.3f} | {mean['cpu_minutes']:.1f} |"
    )


def plot(results: list[dict[str, Any]], name: str) -> None:
    """Draw the CIDEr of every run over its learning rate, and a line through the best run of each rate."""
    figure, axes = new_figure(len(OBJECTIVES), 9, 3.5, sharey=True)
    for axis, (objective, title) in zip(axes, OBJECTIVES.items(), strict=True):
        for number, bridge in enumerate(BRIDGES):
            runs = [(run["learning_rate"], 100 * run["cider"]) for run in select(results, bridge, objective)]
            if not runs:
                continue
            best = [(rate, max(cider for other, cider in runs if other == rate)) for rate in sorted(dict(runs))]
            axis.plot(*zip(*best, strict=True), color=f"C{number}", alpha=0.4)
            axis.scatter(*zip(*runs, strict=True), color=f"C{number}", label=TITLES[bridge])
        axis.set(title=f"objective: {title}", xlabel="learning rate", xscale="log")
    axes[0].set(ylabel="dev CIDEr x 100", ylim=(0, None))
    axes[0].legend()
    save_figure(figure, name)


# --- Command ----------------------------------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dataset_name", required=True, help="Folder or Hub id of captioned images.")
    add("--image_column", default="image", help="Name of the column of images.")
    add("--caption_column", default="captions", help="Name of the column of captions.")
    add("--vision_model", default="facebook/dinov2-small", help="Folder or Hub id of the vision encoder.")
    add(
        "--language_model",
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        help="Folder or Hub id of the language model.",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Random seeds. The first chooses the learning rate.")
    add("--bridges", nargs="+", choices=list(BRIDGES), default=list(BRIDGES), help="Bridges to train.")
    add("--learning_rates", type=float, nargs="+", help="Learning rates of all bridges. By default each has three.")
    add("--steps", type=int, default=400, help="Number of training steps.")
    add("--batch_size", type=int, default=8, help="Number of images in a batch.")
    add("--views", type=int, default=6, help="Number of random crops of each training image.")
    add("--only_own_objective", action="store_true", help="Skip the second table, with the other objectives.")
    add("--features", default="outputs/bridges_features.pt", help="File that caches the image features.")
    add("--results", default="bridges", help="Name of the files in benchmarks/results.")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    comparison = Comparison.from_options(options)
    comparison.check_bridges()
    parts = [("With the objectives of the authors", AUTHORS_OBJECTIVE)]
    if not options.only_own_objective:
        parts.append(("With the other objectives", OTHER_OBJECTIVE))
    results, tables = [], []
    for title, objectives in parts:
        for bridge in options.bridges:
            results += comparison.results_of(bridge, objectives[bridge])
        tables.append(f"{title}\n\n{format_table(results, objectives)}")
        plot(results, options.results)
        print("\n" + "\n\n".join(tables), flush=True)


if __name__ == "__main__":
    main()
