"""The parts of a model as users, peft and the Trainer ask for them: modes, frozen backbones, trainable parameters.

saving_qformer.py subclasses the class of this file.
"""

from typing import Any, ClassVar, Self

from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel

from .backbones_qformer import VisionModelPlaceholder, dtype_of, is_frozen, is_quantized
from .configuration_qformer import VisionQFormerConfig


class QFormerParts(PreTrainedModel):
    """Base class that answers for the parts of a model with a vision encoder, a Q-Former and perhaps others.

    Subclasses name their backbones, and set each as an attribute of that name.
    """

    backbones: ClassVar[tuple[str, ...]]  # "vision_model", and "language_model" if there is one
    config: VisionQFormerConfig
    vision_model: PreTrainedModel | VisionModelPlaceholder

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
        return [part for part in self.backbones if is_frozen(getattr(self, part))]

    def _freeze(self) -> None:
        for part in self.backbones:
            if getattr(self.config, f"freeze_{part}"):
                getattr(self, part).requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as `nn.Module.train` does, but keep frozen backbones in evaluation mode, without dropout."""
        super().train(mode)
        for part in self.frozen_backbones():
            getattr(self, part).eval()
        return self

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
