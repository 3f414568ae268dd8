r"""A step of reward fine-tuning, ours and on transformers' BLIP-2: `python -m benchmarks.reward`.

A step samples captions of each image, scores them by CIDEr-D, and updates the Q-Former with leave-one-out advantages.
The shapes are those of CLIP ViT-B/32, BLIP-2's Q-Former and SmolLM2-135M. The sides have the same weights:

- `ours`: one pass of the vision encoder for the whole step, and one prefill for all samples of an image. They follow
  one prefix in the update, too.
- `blip2`: one row for each sample in `generate` and in `forward`, PyTorch's cross-entropy weighted by the advantages,
  and pycocoevalcap's CIDEr-D with its Java tokenizer.
- `blip2, best`: the same with two options that save work. `generate` gets one row for each image and
  `num_return_sequences`, and `forward` computes the logits of the samples only (`logits_to_keep`).

Needs the extra [java] and a Java runtime. Document frequencies are computed beforehand for all sides. pycocoevalcap's
tokenizer starts one process for each step, which reads samples and references.

All samples have the same number of tokens. The times of sampling are those of each side's own samples. Scoring and
update get the same samples on all sides, so rewards, losses and gradients must be equal before anything is timed.
`--language_model` takes real weights and their tokenizer. Otherwise weights are random, and the texts of the samples
are made up.
"""

import argparse
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Blip2ForConditionalGeneration

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.onednn import has_relu, onednn_linears
from qformer_captioner.rewards import RewardContext, load_rewards
from qformer_captioner.training.advantages import leave_one_out
from qformer_captioner.training.sampling import draw_uniforms, sample_captions

from .blip2 import DECODERS, IMAGE_TOKEN_ID, image_token_inputs, load, make_batch, save_both
from .common import machine_facts, summarize, time_ratios, write_result
from .metrics import random_corpus

PHASES = ("sampling", "scoring", "update")
BEST = "blip2, best"
PEERS = ("blip2", BEST)
LEARNING_RATE = 1e-5
EOS = 2

Score = Callable[[list[str], list[list[str]]], torch.Tensor]


@dataclass
class Batch:
    """Images, and samples that all sides score and learn from.

    Args:
        pixel_values: images `[B, 3, 224, 224]`.
        samples: token ids `[B, K, T]`; the last one ends the caption.
        captions: the samples as texts, n = B*K.
        references: the reference captions of each sample's image.
    """

    pixel_values: torch.Tensor
    samples: torch.Tensor
    captions: list[str]
    references: list[list[str]]


# --- Rewards ----------------------------------------------------------------------------------------------------------


def our_cider(references: list[list[str]], folder: Path) -> Score:
    """Return our reward, with document frequencies of training references."""
    context = RewardContext(run_folder=folder, train_references=lambda: references, eos_token_id=[EOS], tokenize="ptb")
    rewards = load_rewards(["cider"], None, context)

    def score(captions: list[str], references: list[list[str]]) -> torch.Tensor:
        prompts, ids = [""] * len(captions), [[EOS]] * len(captions)
        return rewards(prompts, captions, references=references, completion_ids=ids).total

    return score


def toolkit_tokens(captions: list[list[str]]) -> list[list[str]]:
    """Return captions as pycocoevalcap's Java tokenizer writes them, with the end as a last word."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = {image: [{"caption": text} for text in texts] for image, texts in enumerate(captions)}
    tokens = PTBTokenizer().tokenize(texts)
    return [[f"{text} <eos>" for text in tokens[image]] for image in range(len(captions))]


def toolkit_cider(references: list[list[str]]) -> Score:
    """Return pycocoevalcap's CIDEr-D with document frequencies of training references."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    corpus = CiderScorer()
    for texts in toolkit_tokens(references):
        corpus += (None, texts)
    corpus.compute_doc_freq()

    def score(captions: list[str], references: list[list[str]]) -> torch.Tensor:
        tokens = toolkit_tokens([[caption] for caption in captions] + references)
        scorer = CiderScorer()
        for (caption,), texts in zip(tokens[: len(captions)], tokens[len(captions) :], strict=True):
            scorer += (caption, texts)
        # `compute_score` would count document frequencies in these references. `compute_cider` takes the length of the
        # list of references as the size of the corpus.
        scorer.document_frequency = corpus.document_frequency
        scorer.crefs += [None] * (len(corpus.crefs) - len(scorer.crefs))
        return torch.tensor(np.array(scorer.compute_cider()), dtype=torch.float32)

    return score


# --- Sides ------------------------------------------------------------------------------------------------------------


class Ours:
    """A step of ours. The features of the images are kept from sampling for the update."""

    def __init__(self, model: QFormerCaptioner, score: Score):
        self.model, self.score = model, score
        self.optimizer = make_optimizer(model)
        self.features: torch.Tensor | None = None
        # All samples get the same number of tokens: they end only at a token that is hardly ever sampled.
        self.model.generation_config.eos_token_id = IMAGE_TOKEN_ID

    def sample(self, batch: Batch) -> None:
        images, samples, tokens = batch.samples.shape
        uniforms = draw_uniforms(seed=0, step=0, places=range(images), num_samples=samples, length=tokens)
        with torch.no_grad(), onednn_linears(self.model.device):
            self.features = self.model.encode_images(batch.pixel_values).last_hidden_state
            sample_captions(self.model, {"image_embeds": self.features}, uniforms)

    def loss(self, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
        """Compute the gradients, and return the loss."""
        with onednn_linears(self.model.device, backward_only=has_relu(self.model)):
            output = self.model(
                image_embeds=self.features,
                labels=batch.samples,
                label_weights=advantages,
                num_items_in_batch=advantages.numel(),
                skip_logits=True,
            )
            output.loss.backward()
        return output.loss.detach()


class Blip2:
    """A step on transformers' BLIP-2, with one row for each sample.

    Args:
        model: the model, which several sides may share.
        optimizer: its optimizer.
        score: the reward.
        saves_work: encode an image once in `generate`, and compute the logits of samples only in `forward`.
    """

    def __init__(
        self,
        model: Blip2ForConditionalGeneration,
        optimizer: torch.optim.Optimizer,
        score: Score,
        saves_work: bool,
    ):
        self.model, self.optimizer, self.score, self.saves_work = model, optimizer, score, saves_work

    def sample(self, batch: Batch) -> None:
        copies = batch.samples.shape[1]
        pixel_values = batch.pixel_values if self.saves_work else batch.pixel_values.repeat_interleave(copies, dim=0)
        with torch.no_grad():
            self.model.generate(
                pixel_values=pixel_values,
                num_return_sequences=copies if self.saves_work else 1,
                **image_token_inputs(len(pixel_values)),
                **sampling_options(batch),
            )

    def loss(self, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
        """Compute the gradients, and return the loss."""
        samples = batch.samples.flatten(0, 1)  # [n, T]
        image = image_token_inputs(len(samples))["input_ids"]
        logits = self.model(
            pixel_values=batch.pixel_values.repeat_interleave(batch.samples.shape[1], dim=0),
            input_ids=torch.cat([image, samples], dim=1),
            **({"logits_to_keep": samples.shape[1] + 1} if self.saves_work else {}),
        ).logits[:, -samples.shape[1] - 1 : -1]
        losses = cross_entropy(logits.flatten(0, 1), samples.flatten(), reduction="none").view(samples.shape)
        loss = (losses * advantages.flatten()[:, None]).sum() / len(samples)
        loss.backward()
        return loss.detach()


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=LEARNING_RATE)


def sampling_options(batch: Batch) -> dict[str, Any]:
    """Return options of `generate` for samples that all have the same number of tokens."""
    tokens = batch.samples.shape[2]
    return {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "min_new_tokens": tokens}


def score_samples(side: Ours | Blip2, batch: Batch) -> torch.Tensor:
    """Return the rewards `[B, K]`."""
    return side.score(batch.captions, batch.references).view(batch.samples.shape[:2])


# --- Measurements -----------------------------------------------------------------------------------------------------


def check_equal(sides: dict[str, Ours | Blip2], batch: Batch) -> dict[str, float]:
    """Check that all sides give equal rewards and losses to 1e-4, and equal gradients to 1e-3 (relative).

    Raises:
        SystemExit: if they do not.
    """
    rewards, losses, gradients = [], [], []
    for side in sides.values():
        side.sample(batch)
        rewards.append(score_samples(side, batch))
        losses.append(side.loss(batch, leave_one_out(rewards[-1])))
        gradients.append({name: each.grad for name, each in side.model.qformer.named_parameters()})
        side.optimizer.zero_grad()  # leaves the tensors in `gradients`
    reward, loss = ((torch.stack(values) - values[0]).abs().max().item() for values in (rewards, losses))
    gradient = max(
        ((other[name] - own).norm() / own.norm()).item()
        for other in gradients[1:]
        for name, own in gradients[0].items()
        if own is not None and other.get(name) is not None and not name.endswith("key.bias")  # only rounding errors
    )
    print(f"  mean reward {rewards[0].mean():.2f}, loss {losses[0]:.2e}")
    print(f"  rewards differ by {reward:.1e}, losses by {loss:.1e}, gradients by at most {gradient:.1e} (relative)")
    if not (reward <= 1e-4 and loss <= 1e-4 and gradient <= 1e-3):
        raise SystemExit("All sides must give equal rewards, losses and gradients, and they do not.")
    return {"reward_difference": reward, "loss_difference": loss, "gradient_difference": gradient}


def processor_seconds() -> float:
    """Return the processor time of this process and of the processes that it has waited for, such as Java."""
    return time.process_time() + sum(os.times()[2:4])  # of this process with a finer resolution


def timed_step(side: Ours | Blip2, batch: Batch) -> dict[str, dict[str, float]]:
    """Run a step. Return the seconds and the processor time of each phase and of the whole step."""
    marks = [(time.perf_counter(), processor_seconds())]

    def mark() -> None:
        marks.append((time.perf_counter(), processor_seconds()))

    side.sample(batch)
    mark()
    advantages = leave_one_out(score_samples(side, batch))
    mark()
    side.loss(batch, advantages)
    side.optimizer.step()
    side.optimizer.zero_grad()
    mark()
    clocks = {}
    for clock, times in zip(("seconds", "cpu_seconds"), zip(*marks, strict=True), strict=True):
        spans = [end - begin for begin, end in itertools.pairwise(times)]
        clocks[clock] = dict(zip(PHASES, spans, strict=True)) | {"step": sum(spans)}
    return clocks


def measure(sides: dict[str, Ours | Blip2], batch: Batch, repetitions: int) -> dict[str, Any]:
    """Check that all sides are equal, then time their steps in turn."""
    result: dict[str, Any] = check_equal(sides, batch)  # also a step of each side to warm up
    runs: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, side in sides.items():
            runs[name].append(timed_step(side, batch))
            print(f"  {name}: {runs[name][-1]['cpu_seconds']['step']:.2f} s of processor time", flush=True)
    for clock, title in (("cpu_seconds", "processor time"), ("seconds", "time")):
        print(f"  {title}")
        summaries = {
            name: {phase: summarize([step[clock][phase] for step in steps]) for phase in (*PHASES, "step")}
            for name, steps in runs.items()
        }
        # How many times as fast as each side ours is.
        steps = time_ratios({name: phases["step"] for name, phases in summaries.items()}, "ours")
        ratios = {name: 1 / ratio for name, ratio in steps.items()}
        for name, phases in summaries.items():
            step = phases["step"]
            parts = ", ".join(f"{phase} {phases[phase]['median']:.3f} s" for phase in PHASES)
            print(
                f"    {name:<19}{step['median']:7.2f} s  ({step['min']:.2f} to {step['max']:.2f}): {parts}; "
                f"scoring {phases['scoring']['median'] / step['median']:.1%}; ours {ratios[name]:.2f} x",
                flush=True,
            )
        result |= {clock: summaries, f"{clock}_ratio": ratios}
    return result


def make_samples(
    images: int, samples: int, tokens: int, references: list[list[str]], model_folder: Path, tokenizer: Any
) -> Batch:
    """Return a batch whose samples come from our model.

    Args:
        images, samples, tokens: numbers of images, of samples of an image, and of tokens of a sample.
        references: the training references.
        model_folder: folder of our model.
        tokenizer: tokenizer of real weights, or `None`.
    """
    pixel_values, _ = make_batch(images, 1)
    torch.manual_seed(0)
    ids = load("ours", model_folder).generate(
        pixel_values=pixel_values,
        do_sample=True,
        num_return_sequences=samples,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )
    ids = ids.masked_fill(ids == IMAGE_TOKEN_ID, IMAGE_TOKEN_ID + 1)  # BLIP-2 would put an image there
    ids[:, -1] = EOS
    chosen = random.Random(0).sample(references, images)
    of_sample = [texts for texts in chosen for _ in range(samples)]
    if tokenizer is not None:
        captions = [text.strip() for text in tokenizer.batch_decode(ids[:, :-1], skip_special_tokens=True)]
    else:
        captions = [made_up_caption(row, texts) for row, texts in zip(ids.tolist(), of_sample, strict=True)]
    return Batch(pixel_values, ids.view(images, samples, tokens), captions, of_sample)


def made_up_caption(ids: list[int], references: list[str]) -> str:
    """Return a caption that shares n-grams with a reference: the tokens choose the reference, and words to replace."""
    words = references[ids[0] % len(references)].strip(".").split()
    return " ".join(f"word{token % 50}" if token % 4 == 0 else word for word, token in zip(words, ids, strict=False))


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=8, help="Number of images in a batch.")
    parser.add_argument("--samples", type=int, default=5, help="Number of samples of each image.")
    parser.add_argument("--tokens", type=int, default=20, help="Number of tokens of each sample, with the end token.")
    parser.add_argument("--train_images", type=int, default=6_000, help="Images of the document frequencies.")
    parser.add_argument("--language_model", help="Folder of a decoder-only language model with its tokenizer.")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="Other sides to measure.")
    parser.add_argument("--repetitions", type=int, default=3, help="Number of timed steps of each side.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Number of CPU threads.")
    return parser.parse_args(words)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    _, references = random_corpus(options.train_images)
    language_model = tokenizer = None
    if options.language_model:
        language_model = AutoModelForCausalLM.from_pretrained(options.language_model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.language_model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_both(
            DECODERS["llama"] if language_model is None else language_model.config, folder, weights=language_model
        )
        batch = make_samples(options.images, options.samples, options.tokens, references, folder, tokenizer)
        ours, peer = load("ours", folder), load("peer", folder)
        sides: dict[str, Ours | Blip2] = {"ours": Ours(ours, our_cider(references, folder))}
    toolkit, optimizer = toolkit_cider(references), make_optimizer(peer)
    sides |= {name: Blip2(peer, optimizer, toolkit, saves_work=name == BEST) for name in options.peers}
    print(f"{options.images} images, {options.samples} samples of {options.tokens} tokens each")
    shape = {name: getattr(options, name) for name in ("images", "samples", "tokens", "train_images", "threads")}
    facts = machine_facts("qformer-captioner", "transformers", "torch", "pycocoevalcap") | shape
    facts["weights"] = "real" if options.language_model else "random"
    write_result("reward", facts | measure(sides, batch, options.repetitions))


if __name__ == "__main__":
    main()
