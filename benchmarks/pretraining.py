"""A step of stage 1, ours and LAVIS' passes on transformers' Q-Former: `python -m benchmarks.pretraining`.

Both sides have the same weights, batch and negatives, and compute the losses of contrast, matching and generation. The
shapes are those of BLIP-2's Q-Former (12 layers, 768 wide, 32 query tokens, 30,523 tokens) on features of CLIP ViT-B/32
or ViT-L/14. Captions are as long as those of COCO. Features are precomputed, and nothing has dropout.

LAVIS repeats an image for each of its captions and pads captions to 32 tokens. It runs the queries, the captions, three
pairs of each caption for matching, and the captions behind the queries for generation. These passes on transformers'
`Blip2QFormerModel` are the sides:

- `lavis`: one pass each. transformers' class keeps no keys and values, so generation runs the queries again.
- `lavis, cached`: generation shares a pass with the queries. LAVIS itself keeps their keys and values, so this side
  does the work of LAVIS.
- `lavis, cached, short`: the same, with captions padded to the longest of the batch.

All sides must have equal losses and gradients before they are timed in turn. Ours runs inside `onednn_linears`, as in
our Trainer. `--memory` measures the memory of a step instead (Linux), each side in a separate process.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize, pad
from torch.profiler import profile
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

from qformer_captioner import QFormerConfig, QFormerForPretraining
from qformer_captioner.common.onednn import onednn_linears
from qformer_captioner.configuration_qformer import QFormerPretrainingConfig
from qformer_captioner.encoders_qformer import PrecomputedFeaturesConfig
from qformer_captioner.objectives_qformer import right_pairs, softmax_contrast
from qformer_captioner.texts_qformer import QFormerLMHead

from .common import (
    count_gflop,
    machine_facts,
    peak_memory,
    resident_memory,
    run_worker,
    summarize,
    time_in_turn,
    time_ratios,
    write_result,
)
from .memory import MB, allocator_peak

FEATURES = {"clip-b32": (50, 768), "vit-l14": (257, 1024)}  # number and width
NUM_QUERY_TOKENS, VOCAB_SIZE = 32, 30523  # BERT's vocabulary and [DEC]
BOS, CLS, SEP = VOCAB_SIZE - 1, 101, 102
LAVIS_CAPTION_LENGTH, LABEL_SMOOTHING = 32, 0.1
# Captions with this many words and punctuation marks, with [CLS] and [SEP], of 1,000 of COCO's Karpathy test split.
LENGTHS = {9: 4, 10: 51, 11: 169, 12: 208, 13: 195, 14: 142, 15: 87, 16: 53, 17: 34, 18: 18, 19: 13, 20: 8}
LENGTHS |= {21: 5, 22: 3, 23: 2, 24: 2, 25: 6}
SIDES = ("ours", "lavis", "lavis, cached", "lavis, cached, short")

Batch = dict[str, torch.Tensor]
Step = Callable[[], tuple[torch.Tensor, ...]]


def make_batch(features: str, images: int, captions: int, seed: int = 1) -> Batch:
    """Return random features `[B, N, Dv]`, captions `[B, K, 32]` of COCO's lengths, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor(list(LENGTHS.values())).float()
    drawn = shares.multinomial(images * captions, replacement=True, generator=generator)
    lengths = torch.tensor(list(LENGTHS))[drawn].view(images, captions, 1)
    mask = (torch.arange(LAVIS_CAPTION_LENGTH) < lengths).long()
    ids = torch.randint(1000, BOS, mask.shape, generator=generator)
    ids[..., 0] = CLS
    ids.scatter_(-1, lengths - 1, SEP)
    embeds = torch.randn(images, *FEATURES[features], generator=generator)
    return {"image_embeds": embeds, "input_ids": ids * mask, "attention_mask": mask}


def build_ours(features: str, dropout: float = 0.0) -> QFormerForPretraining:
    """Return our model in training mode, with random weights."""
    torch.manual_seed(0)
    _, width = FEATURES[features]
    qformer_config = QFormerConfig(
        num_query_tokens=NUM_QUERY_TOKENS, use_qformer_text_input=True, **qformer_fields(width, dropout)
    )
    config = QFormerPretrainingConfig(
        vision_config=PrecomputedFeaturesConfig(hidden_size=width),
        qformer_config=qformer_config,
        bos_token_id=BOS,
        label_smoothing=LABEL_SMOOTHING,
    )
    return QFormerForPretraining(config).train()


def qformer_fields(encoder_hidden_size: int, dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "encoder_hidden_size": encoder_hidden_size,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


class LavisPasses(nn.Module):
    """LAVIS' passes of stage 1 on transformers' Q-Former, with the weights of our model.

    Shapes: R rows, one for each caption, with its image repeated. Q queries, T tokens of a caption.
    """

    def __init__(self, ours: QFormerForPretraining):
        super().__init__()
        config = ours.qformer.config
        dropout = config.hidden_dropout_prob
        self.config = Blip2QFormerConfig(
            use_qformer_text_input=True, **qformer_fields(config.encoder_hidden_size, dropout)
        )
        self.qformer = Blip2QFormerModel._from_config(self.config)  # with sdpa
        self.embeddings = Blip2TextEmbeddings(self.config)
        self.query_tokens = nn.Parameter(torch.empty_like(ours.qformer.query_tokens))
        self.vision_projection = nn.Linear(config.hidden_size, ours.config.image_text_hidden_size)
        self.text_projection = nn.Linear(config.hidden_size, ours.config.image_text_hidden_size)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.lm_head = QFormerLMHead(config)
        self.lm_head.decoder.weight = self.embeddings.word_embeddings.weight
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.load_state_dict({self.name_of(name): weight for name, weight in ours.state_dict().items()}, strict=False)
        self.train()

    @staticmethod
    def name_of(our_name: str) -> str:
        """Return the name that a parameter of our model has here."""
        inner = our_name.removeprefix("qformer.")
        return inner if inner.startswith(("embeddings.", "query_tokens")) else our_name

    def run(
        self, embedded: torch.Tensor, queries: int, mask: torch.Tensor | None, features: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the layers on embedded rows `[R, L, D]`, of which the first `queries` attend to the features."""
        return self.qformer(
            query_embeds=embedded, query_length=queries, attention_mask=mask, encoder_hidden_states=features
        ).last_hidden_state

    def forward(
        self,
        image_embeds: torch.Tensor,  # [B, N, Dv]
        input_ids: torch.Tensor,  # [B, K, T]
        attention_mask: torch.Tensor,  # [B, K, T]
        negative_images: torch.Tensor,  # [R]
        negative_texts: torch.Tensor,  # [R]
        cached: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the losses of contrast, matching and generation."""
        captions, size = input_ids.shape[1], NUM_QUERY_TOKENS
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)  # [R, T]
        image_of_text = torch.arange(len(image_embeds)).repeat_interleave(captions)
        features = image_embeds[image_of_text]  # [R, N, Dv]
        queries = self.query_tokens.expand(len(ids), -1, -1)
        inputs = ids.clone()
        inputs[:, 0] = BOS
        pair = self.embeddings(input_ids=inputs, query_embeds=queries)  # [R, Q + T, D]
        outputs = self.run(pair, size, unified_mask(mask, size), features)
        images = outputs[:, :size] if cached else self.run(self.embeddings(query_embeds=queries), size, None, features)
        texts = self.run(self.embeddings(input_ids=ids), 0, mask, None)
        return (
            self.contrast(images[::captions], texts[:, 0], image_of_text),
            self.matching(image_embeds, ids, mask, image_of_text, negative_images, negative_texts),
            self.generation(outputs[:, size:], inputs, mask),
        )

    def contrast(self, images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor) -> torch.Tensor:
        images, texts = (
            normalize(self.vision_projection(images), dim=-1),
            normalize(self.text_projection(texts), dim=-1),
        )
        logits = (images @ texts.t()).amax(dim=1) * self.logit_scale.exp()  # [B, R]
        return softmax_contrast(
            logits, right_pairs(len(images), image_of_text, torch.arange(len(texts))), LABEL_SMOOTHING
        )

    def matching(
        self,
        image_embeds: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        image_of_text: torch.Tensor,
        negative_images: torch.Tensor,
        negative_texts: torch.Tensor,
    ) -> torch.Tensor:
        """Match each caption with its image, with a wrong image, and its image with another caption: 3 R rows."""
        features = image_embeds[torch.cat([image_of_text, negative_images, image_of_text])]
        texts = torch.cat([torch.arange(len(ids)), torch.arange(len(ids)), negative_texts])
        queries = self.query_tokens.expand(len(texts), -1, -1)
        embedded = self.embeddings(input_ids=ids[texts], query_embeds=queries)
        outputs = self.run(embedded, NUM_QUERY_TOKENS, pad(mask[texts], (NUM_QUERY_TOKENS, 0), value=1), features)
        logits = self.itm_head(outputs[:, :NUM_QUERY_TOKENS]).mean(dim=1)
        return cross_entropy(logits, (torch.arange(len(texts)) < len(ids)).long())

    def generation(self, outputs: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        targets = inputs.masked_fill(mask == 0, -100)[:, 1:]
        logits = self.lm_head(outputs)[:, :-1]
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=LABEL_SMOOTHING)


def unified_mask(mask: torch.Tensor, queries: int) -> torch.Tensor:
    """Return UniLM's mask for captions behind queries, `[R, T]` -> `[R, 1, Q + T, Q + T]`, added to the scores."""
    rows, length = mask.shape
    allowed = torch.zeros(rows, queries + length, queries + length)
    allowed[:, :, :queries] = 1
    allowed[:, queries:, queries:] = torch.ones(length, length).tril() * mask[:, None]
    return (1 - allowed)[:, None] * torch.finfo(allowed.dtype).min


def our_step(model: QFormerForPretraining, batch: Batch, negatives: Batch) -> tuple[torch.Tensor, ...]:
    """Run our step, return the losses, and keep the negatives that it draws in `negatives`."""
    model.zero_grad()
    torch.manual_seed(2)  # always the same negatives
    with onednn_linears():
        output = model(**batch)
        output.loss.backward()
    negatives |= {name: output[name] for name in ("negative_images", "negative_texts")}
    return output.itc_loss.detach(), output.itm_loss.detach(), output.itg_loss.detach()


def lavis_step(model: LavisPasses, batch: Batch, negatives: Batch, side: str) -> tuple[torch.Tensor, ...]:
    """Run the step of a side of LAVIS with these negatives, and return the losses."""
    model.zero_grad()
    if side.endswith("short"):
        longest = int(batch["attention_mask"].sum(dim=-1).max())
        batch = batch | {name: batch[name][..., :longest] for name in ("input_ids", "attention_mask")}
    losses = model(**batch, **negatives, cached="cached" in side)
    torch.stack(losses).sum().backward()
    return tuple(loss.detach() for loss in losses)


def steps_of(ours: QFormerForPretraining, batch: Batch, sides: list[str]) -> dict[str, Step]:
    """Return the steps of all sides. Ours must be the first to run, because it draws the negatives."""
    negatives: Batch = {}
    lavis = LavisPasses(ours)
    steps: dict[str, Step] = {"ours": partial(our_step, ours, batch, negatives)}
    return steps | {side: partial(lavis_step, lavis, batch, negatives, side) for side in sides if side != "ours"}


def take_gradients(step: Step) -> dict[str, torch.Tensor]:
    """Remove the gradients of our model or LAVIS', and return them by LAVIS' names."""
    model = step.args[0]  # type: ignore[attr-defined]
    weights = {name: weight for name, weight in model.named_parameters() if not name.startswith("vision_model.")}
    gradients = {LavisPasses.name_of(name): weight.grad for name, weight in weights.items()}
    model.zero_grad()
    return gradients


def check_equal(steps: dict[str, Step]) -> dict[str, Any]:
    """Check that all sides have equal losses (1e-5) and gradients (1e-4, relative), and count their products.

    Returns:
        The GFLOP of each side, and the largest differences.

    Raises:
        SystemExit: if a difference is larger.
    """
    gflop: dict[str, float] = {}
    loss_differences, gradient_differences = [], []
    for side, step in steps.items():
        losses: list[torch.Tensor] = []
        gflop[side] = count_gflop(lambda step=step, losses=losses: losses.extend(step()))
        gradients = take_gradients(step)
        if side == "ours":
            our_losses, our_gradients = losses, gradients
        loss_differences += [(our - loss).abs() for our, loss in zip(our_losses, losses, strict=True)]
        for name, expected in gradients.items():
            # The bias of the keys does not change the softmax, so its gradient is only rounding error.
            if not name.endswith("key.bias"):
                gradient_differences.append((our_gradients[name] - expected).norm() / expected.norm())
    loss, gradient = (torch.stack(differences).max().item() for differences in (loss_differences, gradient_differences))
    print(f"  losses differ by at most {loss:.1e}, gradients by at most {gradient:.1e} (relative)")
    if not (loss <= 1e-5 and gradient <= 1e-4):
        raise SystemExit("All sides must compute equal losses and gradients, and they do not. Nothing was measured.")
    return {"gflop": gflop, "loss_difference": loss, "gradient_difference": gradient}


def run_with_cpu_time(step: Step, seconds: list[float]) -> None:
    """Run a step, append the processor time that it takes, and free the gradients for the next side."""
    start = time.process_time()
    step()
    seconds.append(time.process_time() - start)
    step.args[0].zero_grad()  # type: ignore[attr-defined]


def measure_speed(features: str, images: int, captions: int, options: argparse.Namespace) -> dict[str, Any]:
    """Check that all sides are equal, then time their steps in turn."""
    batch = make_batch(features, images, captions)
    steps = steps_of(build_ours(features), batch, options.sides)
    equality = check_equal(steps)
    if options.dropout:
        steps = steps_of(build_ours(features, options.dropout), batch, options.sides)
    cpu_seconds: dict[str, list[float]] = {side: [] for side in steps}
    timed = {side: partial(run_with_cpu_time, step, cpu_seconds[side]) for side, step in steps.items()}
    seconds = {side: summarize(values) for side, values in time_in_turn(options.repetitions, **timed).items()}
    cpu = {side: summarize(values[1:]) for side, values in cpu_seconds.items()}  # without the warm-up
    # How many times as many pairs per second ours processes.
    ratios, cpu_ratios = ({side: 1 / value for side, value in time_ratios(s, "ours").items()} for s in (seconds, cpu))
    for side in steps:
        wall, gflop = seconds[side], equality["gflop"][side]
        print(
            f"  {side:<21}{wall['median']:7.2f} s  ({wall['min']:.2f} to {wall['max']:.2f}), "
            f"{images * captions / wall['median']:.2f} pairs per second, ours {ratios[side]:.2f} x; "
            f"processor {cpu[side]['median']:.2f} s, {cpu_ratios[side]:.2f} x; "
            f"{gflop:.0f} GFLOP, {gflop / equality['gflop']['ours']:.2f} x",
            flush=True,
        )
    return {**equality, "seconds": seconds, "cpu_seconds": cpu, "ratio": ratios, "cpu_ratio": cpu_ratios}


def step_memory(side: str, features: str, images: int, captions: int) -> dict[str, float]:
    """Run a step of one side in this process.

    Returns:
        In MB: `before_mb` (resident memory before the step), `peak_mb` (peak resident memory), and `asked_mb` (peak of
        the allocator, weights included).
    """
    batch = make_batch(features, images, captions)
    texts = torch.arange(images * captions)
    negatives = {"negative_images": (texts // captions + 1) % images, "negative_texts": texts.roll(captions)}
    ours = build_ours(features)
    model: nn.Module = ours
    step: Step = partial(our_step, ours, batch, negatives)
    if side != "ours":
        lavis = LavisPasses(ours)
        model, step = lavis, partial(lavis_step, lavis, batch, negatives, side)
        del ours
    before = resident_memory()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    step()
    peak = peak_memory()
    model.zero_grad()
    with profile(profile_memory=True) as profiler:
        step()
    asked = allocator_peak(profiler) + sum(parameter.nbytes for parameter in model.parameters()) / MB
    return {"before_mb": before, "peak_mb": peak, "asked_mb": asked}


def measure_memory(features: str, images: int, captions: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the memory of all sides in turn, each time in fresh processes."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.repetitions):
        for side, measurements in runs.items():
            measurements.append(run_worker("pretraining", side, features, images, captions))
    summaries = {
        side: {name: summarize([run[name] for run in measurements]) for name in measurements[0]}
        for side, measurements in runs.items()
    }
    medians = {side: {name: values["median"] for name, values in mb.items()} for side, mb in summaries.items()}
    # Memory of ours, as a share of that of the side.
    ratios = {
        side: {name: medians["ours"][name] / mb[name] for name in ("peak_mb", "asked_mb")}
        for side, mb in medians.items()
    }
    for side, mb in medians.items():
        print(
            f"  {side:<21} peak {mb['peak_mb']:6.0f} MB, before the step {mb['before_mb']:6.0f} MB, allocator "
            f"{mb['asked_mb']:6.0f} MB; ours {ratios[side]['peak_mb']:.2f} x of the peak, "
            f"{ratios[side]['asked_mb']:.2f} x of the allocator",
            flush=True,
        )
    return {"mb": summaries, "memory_ratio": ratios}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES), help="Vision encoders.")
    parser.add_argument("--images", type=int, default=32, help="Number of images in a batch.")
    parser.add_argument("--captions", nargs="+", type=int, default=[1], help="Numbers of captions per image.")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="Sides to measure.")
    parser.add_argument("--dropout", type=float, default=0.0, help="Dropout of the timed steps.")
    parser.add_argument("--memory", action="store_true", help="Measure memory instead of speed (Linux).")
    parser.add_argument("--repetitions", type=int, default=3, help="Number of timed steps, or of processes, per side.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Number of CPU threads.")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)  # arguments of step_memory: see run_worker
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.worker:
        side, features, images, captions = options.worker
        print(json.dumps(step_memory(side, features, int(images), int(captions))))
        return
    facts = machine_facts("qformer-captioner", "transformers", "torch")
    facts |= {"threads": options.threads, "images": options.images, "dropout": options.dropout}
    measure = measure_memory if options.memory else measure_speed
    for features in options.features:
        for captions in options.captions:
            print(f"{features}, {options.images} images, {captions} captions each")
            result = measure(features, options.images, captions, options)
            write_result("pretraining", facts | {"features": features, "captions": captions} | result)


if __name__ == "__main__":
    main()
