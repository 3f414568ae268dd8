"""The peer of the speed benchmarks, transformers' BLIP-2, and our captioner with the same weights.

The shapes are those of CLIP ViT-B/32 or ViT-L/14, BLIP-2's Q-Former (12 layers, 768 wide, 32 query tokens) and a
language model. Weights are random, because the time of a step does not depend on their values.
"""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.onednn import has_relu, onednn_linears
from qformer_captioner.hub.convert import convert

NUM_QUERY_TOKENS, IMAGE_TOKEN_ID = 32, 3
T5_BASE = dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
SMOLLM2_135M = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
VIT_B_32 = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32)
VIT_L_14 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
DECODERS = {
    "llama": LlamaConfig(**SMOLLM2_135M, vocab_size=49152),
    "t5": T5Config(**T5_BASE, dropout_rate=0.0, decoder_start_token_id=0),
    "llama-128k": LlamaConfig(**SMOLLM2_135M, vocab_size=128256),  # the vocabulary of Llama 3
    "smollm2-1.7b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        tie_word_embeddings=True,
        vocab_size=49152,
    ),
    "llama-3.2-3b": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        vocab_size=128256,
    ),
}
TITLES = {
    "llama": "SmolLM2-135M's shape",
    "t5": "T5-base's shape",
    "llama-128k": "SmolLM2-135M's shape with a vocabulary of 128,256 tokens",
    "smollm2-1.7b": "SmolLM2-1.7B's shape",
    "llama-3.2-3b": "Llama-3.2-3B's shape",
}
LARGE_DECODERS = ("smollm2-1.7b", "llama-3.2-3b")  # benchmarks.training combines them with CLIP ViT-L/14


def save_both(
    language: PreTrainedConfig,
    folder: Path,
    vision: dict[str, int] = VIT_B_32,
    weights: PreTrainedModel | None = None,
) -> None:
    """Write BLIP-2 to `folder/peer` and our captioner with the same weights to `folder/ours`.

    Args:
        language: configuration of the language model.
        folder: folder to write.
        vision: shape of the vision encoder.
        weights: language model whose weights both sides get; by default random ones.
    """
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**vision, initializer_range=0.02).to_dict(),
        qformer_config=Blip2QFormerConfig(encoder_hidden_size=vision["hidden_size"]).to_dict(),
        text_config=language.to_dict(),
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=IMAGE_TOKEN_ID,
    )
    peer = Blip2ForConditionalGeneration(config)
    if weights is not None:
        peer.language_model.load_state_dict(weights.state_dict())
    torch.nn.init.normal_(peer.query_tokens, std=0.02)  # transformers' zeros would make all query tokens equal
    peer.save_pretrained(folder / "peer")
    convert(folder / "peer", folder / "ours", include_backbones=True)


def load(side: str, folder: Path, device: str = "cpu") -> QFormerCaptioner | Blip2ForConditionalGeneration:
    """Load one side from the folder of [`save_both`], in float32, with frozen backbones and without dropout.

    Args:
        side: `"ours"` or `"peer"`.
        folder: folder of [`save_both`].
        device: device of the model.
    """
    cls = QFormerCaptioner if side == "ours" else Blip2ForConditionalGeneration
    model = cls.from_pretrained(folder / side).eval().to(device)
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    return model


def build_both(
    language: PreTrainedConfig, vision: dict[str, int] = VIT_B_32, device: str = "cpu"
) -> tuple[QFormerCaptioner, Blip2ForConditionalGeneration]:
    """Return our captioner and BLIP-2 with the same random weights, as [`load`] does."""
    with tempfile.TemporaryDirectory() as folder:
        save_both(language, Path(folder), vision)
        return load("ours", Path(folder), device), load("peer", Path(folder), device)


def make_batch(images: int, captions: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images `[B, 3, 224, 224]` and labels `[B, K, 16]` of 10 to 16 tokens, padded with -100."""
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(images, 3, 224, 224, generator=generator)
    labels = torch.full((images, captions, 16), -100)
    for caption in labels.view(-1, 16):
        length = int(torch.randint(10, 17, (), generator=generator))
        caption[:length] = torch.randint(5, 32000, (length,), generator=generator)
    return pixel_values, labels


def image_token_inputs(batch_size: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Return the image tokens `[B, Q]` whose embeddings BLIP-2 replaces by the soft prompt, and their mask."""
    tokens = torch.full((batch_size, NUM_QUERY_TOKENS), IMAGE_TOKEN_ID, device=device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def blip2_inputs(labels: torch.Tensor, is_encoder_decoder: bool) -> dict[str, torch.Tensor]:
    """Return BLIP-2's text inputs for labels `[B, K, T]`, with one row for each image and caption.

    A decoder-only model reads image tokens and caption, `[B * K, Q + T]`. An encoder reads only the image tokens.
    """
    labels = labels.flatten(0, 1)  # [B * K, T]
    image = image_token_inputs(len(labels), labels.device)
    if is_encoder_decoder:
        return image | {"labels": labels}
    return {
        "input_ids": torch.cat([image["input_ids"], labels.clamp(min=0)], dim=1),
        "attention_mask": torch.cat([image["attention_mask"], (labels != -100).long()], dim=1),
        "labels": torch.cat([torch.full_like(image["input_ids"], -100), labels], dim=1),
    }


def training_step(
    model: QFormerCaptioner | Blip2ForConditionalGeneration,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    compiled: torch.nn.Module | None = None,
    onednn: bool = True,
) -> float:
    """Run a forward and a backward pass of either side, and return the loss.

    Args:
        model: our captioner or BLIP-2.
        pixel_values, labels: batch of [`make_batch`].
        compiled: the same model compiled by `torch.compile`, which then runs in its place.
        onednn: run our step inside [`onednn_linears`], as our Trainer does. BLIP-2 always runs without.
    """
    model.zero_grad()
    forward = model if compiled is None else compiled
    if isinstance(model, QFormerCaptioner):
        with onednn_linears(model.device, backward_only=has_relu(model)) if onednn else nullcontext():
            loss = forward(pixel_values=pixel_values, labels=labels).loss
            loss.backward()
    else:
        images = pixel_values.repeat_interleave(labels.shape[1], dim=0)  # [B * K, 3, 224, 224]
        inputs = blip2_inputs(labels, model.config.text_config.is_encoder_decoder)
        loss = forward(pixel_values=images, **inputs).loss
        loss.backward()
    return loss.item()


def differences(
    ours: QFormerCaptioner, peer: Blip2ForConditionalGeneration, pixel_values: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Return how much the losses differ, and the largest relative difference of the Q-Former's gradients."""
    our_loss, peer_loss = (training_step(model, pixel_values, labels) for model in (ours, peer))
    peer_parameters = dict(peer.qformer.named_parameters()) | {"query_tokens": peer.query_tokens}
    largest = 0.0
    for name, parameter in ours.qformer.named_parameters():
        expected = peer_parameters.get(name)
        # The bias of the keys does not change the softmax, so its gradient is only rounding error.
        if expected is not None and expected.grad is not None and not name.endswith("key.bias"):
            difference = (parameter.grad - expected.grad).norm() / expected.grad.norm()
            largest = max(largest, difference.item())
    return abs(our_loss - peer_loss), largest


def check_equal(
    ours: QFormerCaptioner, peer: Blip2ForConditionalGeneration, pixel_values: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """Check that both sides compute the same: the loss to 1e-5, and the Q-Former's gradients to 1e-4 (relative).

    Returns:
        Both differences.

    Raises:
        SystemExit: if one of them is larger.
    """
    loss, gradient = differences(ours, peer, pixel_values, labels)
    print(f"  loss differs by {loss:.1e}, the Q-Former's gradients by at most {gradient:.1e} (relative)")
    if not (loss <= 1e-5 and gradient <= 1e-4):
        raise SystemExit("Both sides must compute the same loss and gradients, and they do not. Nothing was measured.")
    return {"loss_difference": loss, "gradient_difference": gradient}
