"""The parts of a captioner as users, peft and the Trainer ask for them: embeddings, modes, and trainable parameters.

saving_qformer.py subclasses the class of this file, and modeling_qformer.py that class.
"""

from typing import Any, Self

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbones_qformer import BACKBONES, VisionModelPlaceholder, dtype_of, is_frozen, is_quantized
from .configuration_qformer import QFormerCaptionerConfig


class QFormerCaptionerParts(PreTrainedModel):
    """Base class that answers for the parts of a captioner.

    Subclasses set `vision_model` and `language_model`.
    """

    config_class = QFormerCaptionerConfig
    config: QFormerCaptionerConfig
    vision_model: PreTrainedModel | VisionModelPlaceholder
    language_model: PreTrainedModel

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and keep a compiled part in place of its wrapper.

        `torch.compile(part)` returns a wrapper that changes the type of the part and the names of its weights.
        `part.compile()` changes neither.
        """
        if isinstance(value, OptimizedModule):
            wrapper, value = value, value._orig_mod
            value._compiled_call_impl = wrapper.dynamo_ctx(value._call_impl)
        super().__setattr__(name, value)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, so that transformers initialises missing weights of the backbones as it does in its own models.

        In models of other packages it skips modules without parameters of their own, such as CLIP's attention, and
        leaves their layers on another scale. The precaution is for `_init_weights` methods that overwrite loaded
        weights.
        """
        return False

    # --- Trainable and frozen parts -----------------------------------------------------------------------------------

    def frozen_backbones(self) -> list[str]:
        """Return the names of the backbones that have no trainable parameters."""
        return [part for part in BACKBONES if is_frozen(getattr(self, part))]

    def _freeze(self) -> None:
        for part in BACKBONES:
            if getattr(self.config, f"freeze_{part}"):
                getattr(self, part).requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as `nn.Module.train` does, but keep frozen backbones in evaluation mode, without dropout."""
        super().train(mode)
        for part in self.frozen_backbones():
            getattr(self, part).eval()
        # NEFTune of the Trainer adds noise to embeddings in training mode. The mode changes nothing else in them.
        self.get_input_embeddings().training = mode
        if self.language_model.is_activation_checkpointing:
            # transformers recomputes the activations of a layer only if the layer is in training mode. The mode changes
            # nothing else, except in layers that apply dropout themselves (OPT, BART), which are left out.
            for layer in self.language_model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    dropouts = [rate for name, rate in vars(layer).items() if "dropout" in name]
                    layer.training = mode and not any(dropouts)
        return self

    # --- The language model's layers ----------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embeddings of the language model, `[V, D]`."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer of the language model, which computes the logits."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer of the language model."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder of the language model, or of `modality="image"` the vision encoder.

        A decoder-only language model answers with itself, as in transformers.
        """
        if modality is None:
            return self.language_model.get_encoder()
        return super().get_encoder(modality)

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
        """Replace the module that [`~QFormerCaptioner.get_encoder`] returns."""
        if modality is None:
            self.language_model.set_encoder(encoder)
        else:
            super().set_encoder(encoder, modality)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:  # type: ignore[override]
        """Resize the vocabulary of the language model, as `PreTrainedModel.resize_token_embeddings` does."""
        embeddings = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = self.config.get_text_config().vocab_size
        return embeddings

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable parameters and of all parameters, as `PeftModel` does."""
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return trainable, self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print a line for each part with its parameters, its trainable parameters and its dtype.

        Example:

        ```python
        >>> model.print_trainable_parameters()  # doctest: +SKIP
        vision_model              22,056,576 parameters               0 trainable  float32
        qformer                    9,547,008 parameters       9,547,008 trainable  float32
        language_projection          221,760 parameters         221,760 trainable  float32
        language_model           134,515,008 parameters               0 trainable  float32
        ```
        """
        for name, part in self.named_children():
            total = sum(parameter.numel() for parameter in part.parameters())
            if isinstance(part, PreTrainedModel) and is_quantized(part):  # an element holds several weights
                total = part.num_parameters()
            trainable = sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
            dtype = str(dtype_of(part)).removeprefix("torch.")
            line = f"{name:<20} {total:>15,} parameters {trainable:>15,} trainable  {dtype}"
            print(line)  # noqa: T201 -- printing is the purpose of the method, as in peft
