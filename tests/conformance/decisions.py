"""The common tests that do not apply, each with its reason. `make conformance` skips these and no others.

A name stands for all tests that begin with it.
"""

import unittest
from collections.abc import Callable

# transformers' own tester of BLIP-2 skips these for the same reasons.
AS_BLIP2 = {
    "test_hidden_states_output": "The states are those of three models: tests/model/test_outputs.py compares them.",
    "test_retain_grad_hidden_states_attentions": "The states are those of three models.",
    "test_inputs_embeds": "Embeddings of text alone do not caption an image.",
    "test_model_base_model_prefix": "There is no base model without a head.",
}
# The tester of BLIP-2 with T5 skips this one, because the test does not know all inputs.
EAGER_AND_SDPA = {
    "test_eager_matches_sdpa_inference": (
        "The test reads `hidden_states`, or `language_model_outputs` of classes with BLIP in their names. "
        "tests/model/test_prefix.py compares both kinds of attention."
    )
}

# Deliberate differences of a captioner.
CAPTIONER = {
    **AS_BLIP2,
    **EAGER_AND_SDPA,
    "test_model_weights_reload_no_missing_tied_weights": (
        "The test loads a folder without weights. A captioner refuses a folder that lacks most of its weights, because "
        "the rest would be random."
    ),
    "test_causal_lm_loss_honors_shift_labels": (
        "Labels are captions that the model also reads, so nothing is shifted and the loss depends on them. Captions "
        "are too short to be split over processes."
    ),
}

# Deliberate differences of a model of stage 1.
PRETRAINING = {
    **{name: reason for name, reason in AS_BLIP2.items() if name != "test_inputs_embeds"},
    "test_eager_matches_sdpa_inference": (
        "The test reads `hidden_states`, which packed passes do not keep. tests/hub/test_stage_1.py compares both "
        "kinds of attention with transformers."
    ),
    "test_can_capture_specific_layers_hidden_states": "Packed passes keep no hidden states.",
    "test_capture_outputs_decorator": "Packed passes keep no hidden states.",
    "test_training_gradient_checkpointing_use_reentrant_true": (
        "Matching computes its gradients in the forward pass, for which torch needs `use_reentrant=False`, the default."
    ),
    "test_batching_equivalence": (
        "Losses compare the rows of a batch. tests/model/test_pretraining_inputs.py compares the vectors of rows alone "
        "and in a batch."
    ),
    "test_model_outputs_equivalence": "Matching draws wrong pairs at random, so the losses of two calls differ.",
    "test_get_image_features": "The outputs are those of the queries, and packed passes keep no hidden states.",
    "test_get_text_features": "The configuration of texts is that of the Q-Former, and there is no `text_config`.",
    "test_resize": (
        "The size of the vocabulary is in the configuration of the Q-Former. tests/model/test_pretraining_inputs.py "
        "resizes it."
    ),
    "test_model_weights_reload_no_missing_tied_weights": CAPTIONER["test_model_weights_reload_no_missing_tied_weights"],
}

# Deliberate differences of a Q-Former.
WITHOUT_PROMPT = {
    "test_eager_matches_sdpa_inference": (
        "The test passes the mask of a prompt without a prompt. tests/model/test_qformer.py compares both kinds of "
        "attention."
    ),
    "test_model_get_set_embeddings": "A Q-Former without text input has no embeddings.",
    "test_resize": "A Q-Former without text input has no embeddings.",
}

# Deliberate differences of the processor.
PROCESSOR = {
    "test_processor_text_has_no_visual": "Each prompt belongs to an image.",
    "test_replacement_offsets": "There is no token for an image, so nothing is replaced.",
    "test_init_arguments_not_in_processor_kwargs": (
        "As in video processors of transformers, `num_frames` has a default that a call may replace."
    ),
    "test_processor_from_and_save_pretrained": (
        "Saving notes the file of the class in the processor, as for all code outside transformers."
    ),
}


def skip(decisions: dict[str, str]) -> Callable[[type], type]:
    """Return a decorator that skips these tests of a class of tests."""

    def decorate(test_class: type) -> type:
        for name in dir(test_class):
            for beginning, reason in decisions.items():
                if name.startswith(beginning) and callable(getattr(test_class, name)):
                    setattr(test_class, name, unittest.skip(reason)(getattr(test_class, name)))
        return test_class

    return decorate
