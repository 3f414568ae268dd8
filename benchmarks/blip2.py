"""The peer of the speed benchmarks, transformers' BLIP-2, and our captioner with the same weights.

Shapes are those of CLIP ViT-B/32, BLIP-2's Q-Former (12 layers, 768 wide, 32 queries) and a small language model, or of
CLIP ViT-L/14 and one that a GPU is for. Weights are random: what takes time does not depend on them.
"""

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
    T5Config,
)

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.onednn import has_relu, onednn_linears
from qformer_captioner.hub.convert import convert

QUERIES, IMAGE_TOKEN = 32, 3
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
    "llama-128k": LlamaConfig(**SMOLLM2_135M, vocab_size=128256),  # Llama 3's vocabulary
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
    "llama-128k": "SmolLM2-135M's shape with 128,256 words",
    "smollm2-1.7b": "SmolLM2-1.7B's shape",
    "llama-3.2-3b": "Llama-3.2-3B's shape",
}
LARGE = ("smollm2-1.7b", "llama-3.2-3b")  # which read what ViT-L/14 sees


def save_both(language: PreTrainedConfig, folder: Path, vision: dict[str, int] = VIT_B_32) -> None:
    """Write BLIP-2 to `folder/peer` and the same weights as our captioner to `folder/ours`."""
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**vision, initializer_range=0.02).to_dict(),
        qformer_config=Blip2QFormerConfig(encoder_hidden_size=vision["hidden_size"]).to_dict(),
        text_config=language.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    peer = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(peer.query_tokens, std=0.02)  # transformers' zeros would stay equal
    peer.save_pretrained(folder / "peer")
    convert(folder / "peer", folder / "ours", include_backbones=True)


def load(side: str, folder: Path, device: str = "cpu") -> QFormerCaptioner | Blip2ForConditionalGeneration:
    """One of the two, in float32, backbones frozen, no dropout."""
    cls = QFormerCaptioner if side == "ours" else Blip2ForConditionalGeneration
    model = cls.from_pretrained(folder / side).eval().to(device)
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    return model


def make_batch(images: int, captions: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[B, 3, 224, 224]` and labels `[B, K, T]` of 10 to 16 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(images, 3, 224, 224, generator=generator)
    labels = torch.full((images, captions, 16), -100)
    for own in labels.view(-1, 16):
        length = int(torch.randint(10, 17, (), generator=generator))
        own[:length] = torch.randint(5, 32000, (length,), generator=generator)
    return pixel_values, labels


def image_tokens(rows: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """What stands for the image in the input of BLIP-2: the places of its soft prompt."""
    tokens = torch.full((rows, QUERIES), IMAGE_TOKEN, device=device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def rows_of(labels: torch.Tensor, is_encoder_decoder: bool) -> dict[str, torch.Tensor]:
    """BLIP-2's batch, a row for each image and caption: image tokens and caption, or with an encoder the former."""
    labels = labels.flatten(0, 1)
    image = image_tokens(len(labels), labels.device)
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
        model: one of the two.
        pixel_values, labels: batch of [`make_batch`].
        compiled: the same model behind `torch.compile`, to run that.
        onednn: run our step inside [`onednn_linears`], as our Trainer does. BLIP-2's never is.
    """
    model.zero_grad()
    run = model if compiled is None else compiled
    if isinstance(model, QFormerCaptioner):
        context = onednn_linears(model.device, backward_only=has_relu(model)) if onednn else nullcontext()
        with context:
            loss = run(pixel_values=pixel_values, labels=labels).loss
            loss.backward()
    else:
        images = pixel_values.repeat_interleave(labels.shape[1], dim=0)
        loss = run(pixel_values=images, **rows_of(labels, model.config.text_config.is_encoder_decoder)).loss
        loss.backward()
    return loss.item()


def differences(
    ours: QFormerCaptioner, peer: Blip2ForConditionalGeneration, pixel_values: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Between the two sides: of the loss, and the largest of the Q-Former's gradients (relative)."""
    losses = [training_step(model, pixel_values, labels) for model in (ours, peer)]
    worst, theirs = 0.0, dict(peer.qformer.named_parameters())
    for name, weight in ours.qformer.named_parameters():
        expected = peer.query_tokens if name == "query_tokens" else theirs.get(name)
        # The bias of a key changes nothing, so its gradient is nothing but rounding.
        if expected is not None and expected.grad is not None and not name.endswith("key.bias"):
            worst = max(worst, ((weight.grad - expected.grad).norm() / expected.grad.norm()).item())
    return abs(losses[0] - losses[1]), worst


def compare(
    ours: QFormerCaptioner, peer: Blip2ForConditionalGeneration, pixel_values: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """See that both sides compute the same thing: loss to 1e-5, each of the Q-Former's gradients to 1e-4 relative.

    Raises:
        SystemExit: if they do not.
    """
    loss, gradients = differences(ours, peer, pixel_values, labels)
    print(f"  loss differs by {loss:.1e}; the Q-Former's gradients by {gradients:.1e} at most (relative)")
    if not (loss <= 1e-5 and gradients <= 1e-4):
        raise SystemExit("The two sides do not compute the same thing: no timing.")
    return {"loss_difference": loss, "gradient_difference": gradients}
