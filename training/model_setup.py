"""Model of a run, as its objective asks for it."""

from ..data.dataset import CaptionDataset
from ..modeling_qformer import QFormerCaptioner
from ..pretraining_qformer import QFormerForPretraining
from .captioner_setup import build_captioner
from .data_setup import TrainingData
from .pretraining_setup import build_pretraining_model
from .run import TrainingRun


def build_model(
    run: TrainingRun, train_data: TrainingData, eval_data: CaptionDataset | None
) -> QFormerCaptioner | QFormerForPretraining:
    """Load or build the model of a run, and run it on the first rows.

    Errors should occur here, before the run writes anything. Adapters are added later, in `lora.py`.

    Args:
        run: the run.
        train_data: the rows to train on.
        eval_data: the rows to evaluate on, if there are any.

    Raises:
        InputError: if the model cannot be loaded, built, trained or published as the options ask.
    """
    if run.objective == "pretrain":
        return build_pretraining_model(run, train_data, eval_data)
    return build_captioner(run, train_data)
