"""Bridges between the same frozen models: our Q-Former, the old scripts' Q-Former, ClipCap's MLP.

python -m benchmarks.bridges --dataset_name flickr8k --vision_model dinov2-small --language_model smollm2

All of them are trained on the same features, the same batches in the same order, for the same number of steps, with the
same optimizer, each at three learning rates on the first seed. The one with the best CIDEr on the evaluation split is
run again with the other seeds. There are two objectives: the captions' loss alone, and the captions' loss with a little
of the bag-of-words loss. Ours are trained with it, the other two as their authors did; a second part of
the table gives every bridge the other objective.

One line of JSON per finished run goes into benchmarks/results/bridges.jsonl. The same command goes on after a kill; a
run that has its line is not repeated, so take the line out when you change a recipe.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, set_seed

from qformer_captioner import QFormerCaptioner
from qformer_captioner.metrics import References
from qformer_captioner.training.bag_of_words import BagOfWordsLoss

from .bridge_data import Captioned, batches, load_data, other_images, pad
from .bridge_models import OURS, check_bridge, put_clipcap, put_old_scripts, put_ours, trained_parameters
from .common import RESULTS, machine, write_result

BRIDGES = {"ours": put_ours, "old scripts": put_old_scripts, "ClipCap": put_clipcap}
TITLES = {
    "ours": "our Q-Former",
    "old scripts": "the old scripts' Q-Former",
    "ClipCap": "ClipCap's MLP",
}
OBJECTIVES = {"words": "captions and words", "captions": "captions"}
OWN_OBJECTIVE = {"ours": "words", "old scripts": "captions", "ClipCap": "captions"}
LEARNING_RATES = {
    "ours": [2e-3, 4e-3, 8e-3],
    "old scripts": [1e-4, 3e-4, 1e-3],
    "ClipCap": [3e-4, 1e-3, 3e-3],
}
# Of the learning rate, for all but the projection. A Q-Former that learns faster unlearns the image first: at the start
# whatever depends on it is noise to the language model, and layer norms let the queries drown it.
QFORMER_SHARE = {"ours": 1 / 40, "old scripts": 1.0, "ClipCap": 1.0}
WORD_LOSS_WEIGHT = 0.05
BEAMS, LONGEST = 3, 20


@dataclass(frozen=True)
class Run:
    """What a line of results is the result of."""

    bridge: str
    objective: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    dataset: str
    vision_model: str
    language_model: str


def build(
    bridge: str, seed: int, vision_model: str, language_model: str, features: torch.Tensor, dtype: str = "bfloat16"
) -> QFormerCaptioner:
    """A captioner with a fresh bridge, which may begin with statistics of images' features `[R, N, Dv]`."""
    set_seed(seed)
    model = QFormerCaptioner.from_backbones(
        vision_model, language_model, dtype=dtype, projection_per_query=bridge == "ours", **OURS
    )
    BRIDGES[bridge](model, features)
    return model


def train(model: QFormerCaptioner, data: Captioned, words: BagOfWordsLoss, run: Run) -> None:
    """The loop that all bridges go through."""
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "lr": run.learning_rate * (QFORMER_SHARE[run.bridge] if name.startswith("qformer.") else 1.0),
                "weight_decay": 0.05 if parameter.ndim > 1 else 0.0,
            }
            for name, parameter in parameters.items()
        ],
        betas=(0.9, 0.98),
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, run.steps // 10, run.steps)
    model.train()
    start, logged = time.time(), []
    for step, batch in enumerate(batches(data, run.batch_size, run.steps, run.seed)):
        output = model(image_embeds=batch.images, labels=batch.labels)
        loss = output.loss
        if run.objective == "words":
            loss = loss + WORD_LOSS_WEIGHT * words(output.soft_prompt, batch.all_labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        logged.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == run.steps:
            print(f"  step {step + 1}: {statistics.mean(logged[-50:]):.3f}, {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def evaluate(model: QFormerCaptioner, data: Captioned, batch_size: int = 8) -> dict[str, float]:
    """CIDEr of the captions, and the loss of each image's first caption, with right and with shuffled images."""
    model.eval()
    captions: list[str] = []
    losses = {"loss": 0.0, "loss_shuffled": 0.0}
    others, tokens = other_images(data), 0
    for start in range(0, len(data), batch_size):
        rows = list(range(start, min(start + batch_size, len(data))))
        labels = pad([data.ids[row][:1] for row in rows])[:, 0]
        number = int((labels != -100).sum())
        tokens += number
        for name, images in (("loss", rows), ("loss_shuffled", [others[row] for row in rows])):
            losses[name] += number * model(image_embeds=data.features[images, 0].float(), labels=labels).loss.item()
        images = data.features[rows, 0].float()
        ids = model.generate(image_embeds=images, num_beams=BEAMS, max_new_tokens=LONGEST)
        captions += [text.strip() for text in model.processor.batch_decode(ids, skip_special_tokens=True)]
    references = References(data.captions)
    shuffled = [captions[row] for row in others]
    return {
        "cider": references.score(captions, allow_empty=True)["cider"],
        "cider_shuffled": references.score(shuffled, allow_empty=True)["cider"],
        **{name: loss / tokens for name, loss in losses.items()},
        "different_captions": len(set(captions)),
        "examples": captions[:5],
    }


def finished_runs(file: Path) -> dict[Run, dict]:
    """The results that are there already."""
    lines = file.read_text().splitlines() if file.exists() else []
    results = [json.loads(line) for line in lines]
    fields = Run.__dataclass_fields__
    return {Run(**{name: result[name] for name in fields}): result for result in results}


def table(results: list[dict], objective_of: dict[str, str]) -> str:
    """Markdown: a row for each bridge trained by the objective given, at its best learning rate."""
    lines = [
        "| bridge | trained parameters | objective | steps | best learning rate | dev CIDEr x 100, mean | each seed "
        "| loss: right images | shuffled | CPU minutes of training |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bridge, objective in objective_of.items():
        own = [each for each in results if (each["bridge"], each["objective"]) == (bridge, objective)]
        if not own:
            continue
        rate = best_rate(own)
        own = sorted((each for each in own if each["learning_rate"] == rate), key=lambda each: each["seed"])

        def mean(name: str, own: list[dict] = own) -> float:
            return statistics.mean(each[name] for each in own)

        seeds = ", ".join(f"{100 * each['cider']:.1f}" for each in own)
        lines.append(
            f"| {TITLES[bridge]} | {own[0]['parameters'] / 1e6:.1f} M | {OBJECTIVES[objective]} | {own[0]['steps']} "
            f"| {rate:g} | {100 * mean('cider'):.1f} | {seeds} | {mean('loss'):.3f} | {mean('loss_shuffled'):.3f} "
            f"| {mean('cpu_minutes'):.1f} |"
        )
    return "\n".join(lines)


def best_rate(results: list[dict]) -> float:
    """The learning rate with the best CIDEr on the first seed, which is the one that all of them were tried on."""
    first = min(each["seed"] for each in results)
    return max((each for each in results if each["seed"] == first), key=lambda each: each["cider"])["learning_rate"]


def draw(results: list[dict], file: Path) -> None:
    """CIDEr by learning rate: every run of every bridge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(OBJECTIVES), figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, (objective, title) in zip(axes, OBJECTIVES.items(), strict=True):
        for number, bridge in enumerate(BRIDGES):
            own = [each for each in results if (each["bridge"], each["objective"]) == (bridge, objective)]
            rates = sorted({each["learning_rate"] for each in own})
            best = [max(each["cider"] for each in own if each["learning_rate"] == rate) for rate in rates]
            axis.plot(rates, [100 * cider for cider in best], color=f"C{number}", alpha=0.4)
            points = [(each["learning_rate"], 100 * each["cider"]) for each in own]
            axis.scatter(*zip(*points, strict=True), color=f"C{number}", label=TITLES[bridge]) if points else None
        axis.set(title=f"objective: {title}", xlabel="learning rate", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="dev CIDEr x 100", ylim=(0, None))
    axes[0].legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset_name", required=True, help="folder or Hub id of captioned images")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", default="captions")
    parser.add_argument("--vision_model", default="facebook/dinov2-small")
    parser.add_argument("--language_model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bridges", nargs="+", choices=list(BRIDGES), default=list(BRIDGES))
    parser.add_argument("--learning_rates", type=float, nargs="+", help="of every bridge; by default each has its own")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--views", type=int, default=6, help="random crops of each training image")
    parser.add_argument("--only_own_objective", action="store_true", help="leave the second part of the table out")
    parser.add_argument("--features", default="outputs/bridges_features.pt", help="file to keep the features in")
    parser.add_argument("--results", default="bridges", help="name of the file in benchmarks/results")
    options = parser.parse_args()

    models = options.vision_model, options.language_model
    model = QFormerCaptioner.from_backbones(*models, dtype="bfloat16", **OURS)
    data, dev = load_data(
        model, options.dataset_name, options.image_column, options.caption_column, options.views, options.features
    )
    words = BagOfWordsLoss([ids for own in data.ids for ids in own], model.get_input_embeddings().weight)
    for bridge in BRIDGES:
        model = build(bridge, 0, *models, data.features[:, 0])
        batch = next(batches(data, options.batch_size, 1, 0))
        check_bridge(model, batch.images, batch.labels)

    names = [Path(name).name for name in (options.dataset_name, *models)]
    file = RESULTS / f"{options.results}.jsonl"

    def result_of(*what) -> dict:
        run = Run(*what, options.steps, options.batch_size, *names)
        done = finished_runs(file)
        if run not in done:
            print(f"\n{run}", flush=True)
            model = build(run.bridge, run.seed, *models, data.features[:, 0])
            start = time.process_time()  # all threads together, whatever else the machine does
            train(model, data, words, run)
            minutes = (time.process_time() - start) / 60
            scores = evaluate(model, dev)
            parameters = sum(each.numel() for each in trained_parameters(model).values())
            sizes = {"train_images": len(data), "dev_images": len(dev), "parameters": parameters}
            facts = machine("qformer-captioner", "torch", "transformers") | {"threads": torch.get_num_threads()}
            write_result(options.results, asdict(run) | scores | sizes | {"cpu_minutes": minutes} | facts)
            print(f"CIDEr {scores['cider']:.4f}, loss {scores['loss']:.3f} (shuffled {scores['loss_shuffled']:.3f})")
        return finished_runs(file)[run]

    first, *others = options.seeds
    other_objective = {name: "captions" if own == "words" else "words" for name, own in OWN_OBJECTIVE.items()}
    parts = {"Each by its own recipe": OWN_OBJECTIVE, "Each by the other objective": other_objective}
    results, tables = [], []
    for title, objective_of in list(parts.items())[: 1 if options.only_own_objective else None]:
        for bridge in options.bridges:
            objective, rates = objective_of[bridge], options.learning_rates or LEARNING_RATES[bridge]
            tried = [result_of(bridge, objective, rate, first) for rate in rates]
            rate = best_rate(tried)
            results += tried + [result_of(bridge, objective, rate, seed) for seed in others]
        tables.append(f"{title}\n\n{table(results, objective_of)}")
        draw(results, RESULTS / f"{options.results}.png")
        print("\n" + "\n\n".join(tables), flush=True)


if __name__ == "__main__":
    main()
