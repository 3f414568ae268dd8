"""Sampling of captions for reward fine-tuning, with random numbers that are drawn beforehand.

The captions of an image share its features, its soft prompt and the KV cache of its prefix, each computed once. A
caption that has ended leaves the batch.

Shapes: B images, K captions of an image, n = B*K rows, T the largest number of tokens of a caption. V is the size of
the vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from ..configuration_qformer import special_tokens_of
from ..generation_qformer import prefill_shared_prefix
from ..language_qformer import PREFIX_SHARING_MODELS, accepts
from ..modeling_qformer import QFormerCaptioner

STREAM = 1  # in the seeds, so that samples and augmentation do not draw the same numbers


def draw_uniforms(seed: int, step: int, places: Iterable[int], num_samples: int, length: int) -> torch.Tensor:
    """Draw the random numbers of the samples of images, float32 `[B, K, T]` in [0, 1).

    They depend only on the seed, the step and the place of each image in the batch of all processes. A resumed run and
    a run of several processes therefore draw the same samples.

    Args:
        seed: random seed of the run.
        step: number of the optimizer step.
        places: place of each image in the batch of all processes.
        num_samples: number of samples of each image, K.
        length: largest number of tokens of a sample, T.
    """
    generators = (torch.Generator().manual_seed(hash((seed, step, place, STREAM)) % 2**63) for place in places)
    return torch.stack([torch.rand(num_samples, length, generator=generator) for generator in generators])


def pick_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the token of each row by the inverse of its cumulative distribution, `[n]`.

    Args:
        logits (`[n, V]`): logits of the next token.
        uniforms (`[n]`): numbers in [0, 1). NaN asks for the most probable token.
        temperature: the logits are divided by it.
    """
    sums = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1)  # [n, V]
    total = sums[:, -1:]
    # A token of probability 0 is never picked: the first sum above a number below the total is one that has grown.
    targets = torch.minimum(uniforms.to(sums)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(sums, targets.nan_to_num(), right=True).squeeze(1)
    return torch.where(targets.squeeze(1).isnan(), logits.argmax(dim=-1), tokens)


def end_tokens(captioner: QFormerCaptioner) -> list[int]:
    """Return the tokens that end a caption in `generate`.

    Args:
        captioner: the captioner.
    """
    tokens = {**special_tokens_of(captioner.config), **special_tokens_of(captioner.generation_config)}
    end = tokens.get("eos_token_id", [])
    return [end] if isinstance(end, int) else list(end)


@torch.no_grad()
def sample_captions(
    captioner: QFormerCaptioner, inputs: dict[str, Any], uniforms: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Sample captions of images from the language model's own distribution, which no decoding option changes.

    Args:
        captioner: the captioner, in evaluation mode.
        inputs: images or their features, and prompts, as `generate` takes them.
        uniforms (`[B, K, T]`): the random numbers, as [`draw_uniforms`] returns them. A sample whose numbers are NaN is
            the greedy caption.
        temperature: the logits are divided by it.

    Returns:
        Token ids as labels, long `[B, K, T']`: with the end token if it was sampled, and -100 after it.
    """
    loop = SamplingLoop(uniforms.flatten(0, 1), uniforms.shape[1], temperature, end_tokens(captioner))
    length = uniforms.shape[2]
    ids = captioner.generate(
        **inputs,
        custom_generate=loop,
        do_sample=True,
        num_beams=1,
        num_return_sequences=uniforms.shape[1],
        max_new_tokens=length,
        min_new_tokens=0,
    )
    assert isinstance(ids, torch.Tensor)
    return ids.view(*uniforms.shape[:2], -1)


class SamplingLoop:
    """Decoding loop for `generate(custom_generate=...)` that picks tokens by numbers that are drawn beforehand.

    Args:
        uniforms (`[n, T]`): the random numbers of each row.
        num_copies: number of rows of each image, which are adjacent.
        temperature: the logits are divided by it.
        end_tokens: the tokens that end a row.
    """

    def __init__(self, uniforms: torch.Tensor, num_copies: int, temperature: float, end_tokens: list[int]):
        self.uniforms = uniforms
        self.num_copies = num_copies
        self.temperature = temperature
        self.end_tokens = end_tokens

    def __call__(
        self, model: Any, input_ids: torch.Tensor, generation_config: GenerationConfig, **kwargs: Any
    ) -> torch.Tensor:
        """Return the start token, if there is one, and the sampled tokens `[n, T']`, with -100 after the end token.

        Args:
            model: the language model.
            input_ids (`[n, 0]` or `[n, 1]`): the start token of an encoder-decoder.
            generation_config: the options of `generate`, of which only `use_cache` counts.
            kwargs: the arguments that `generate` has prepared.
        """
        del kwargs["logits_processor"], kwargs["stopping_criteria"]
        is_encoder_decoder = model.config.is_encoder_decoder
        may_drop = is_encoder_decoder or model.config.model_type in PREFIX_SHARING_MODELS
        if not is_encoder_decoder and generation_config.use_cache and accepts(model, "past_key_values"):
            self._share_prefix(model, kwargs)
        uniforms, ends = self.uniforms.to(input_ids.device), input_ids.new_tensor(self.end_tokens)
        sampled = input_ids.new_full(uniforms.shape, -100)
        start, rows = input_ids, torch.arange(len(uniforms), device=input_ids.device)
        running = torch.ones_like(rows, dtype=torch.bool)
        outputs = model._prefill(input_ids, generation_config, kwargs)
        for step in range(uniforms.shape[1]):
            if step > 0:
                next_length = 1 if kwargs["use_cache"] else None
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=next_length, **kwargs)
                outputs = model(**inputs, return_dict=True)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=is_encoder_decoder)
            tokens = pick_tokens(outputs.logits[:, -1], uniforms[rows, step], self.temperature)
            sampled[rows[running], step] = tokens[running]
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            running = running & ~torch.isin(tokens, ends)
            if not running.any():
                break
            if may_drop and not running.all():
                rows, input_ids, kwargs = rows[running], input_ids[running], select_rows(kwargs, running)
                running = running[running]
        return torch.cat([start, sampled[:, : step + 1]], dim=1)

    def _share_prefix(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        """Encode the prefix of each image once, for all of its rows."""
        prefix, mask = kwargs["inputs_embeds"][:: self.num_copies], kwargs["attention_mask"]
        if mask is None:  # nothing is padding
            mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        else:
            mask = mask[:: self.num_copies]
        if prefix.shape[1] > 1:
            cache = prefill_shared_prefix(model, prefix, mask, self.num_copies, self.uniforms.shape[1])
            if cache is not None:
                kwargs["past_key_values"] = cache


def select_rows(kwargs: dict[str, Any], chosen: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of a language model with some of its rows.

    Args:
        kwargs: the arguments. A KV cache among them is changed in place.
        chosen (`[n]`, bool): the rows to keep.
    """

    def select(value: Any) -> Any:
        if isinstance(value, Cache):
            value.reorder_cache(chosen.nonzero().squeeze(1))  # type: ignore[arg-type]
        elif isinstance(value, ModelOutput):
            return type(value)(**{name: select(part) for name, part in value.items()})
        elif isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == len(chosen):
            return value[chosen]
        return value

    return {name: select(value) for name, value in kwargs.items()}
