#!/usr/bin/env python
r"""Run a vision encoder once over a data set, and store the features on disk.

    python precompute_features.py --vision_model_name_or_path facebook/dinov2-small --dataset_name my_folder \
        --output_dir outputs/features
    torchrun --nproc_per_node 8 precompute_features.py --vision_model_name_or_path google/siglip-base-patch16-224 \
        --dataset_name coco --views 4 --random_resized_crop_scale 0.4 --output_dir outputs/features
    python precompute_features.py --dataset_name proteins.parquet --embeddings_column esm2

`train_hf.py --features outputs/features` then trains without the vision encoder. An interrupted run resumes when the
same command is given again. A column of features that a data set already holds can also be stored. They may be those of
any encoder, and rows may differ in length.
"""

from qformer_captioner.common.command import run_command
from qformer_captioner.common.machine_faults import explain_faults
from qformer_captioner.common.option_parser import OptionParser
from qformer_captioner.data.feature_arguments import FeatureArguments


def precompute(words: list[str]) -> None:
    """Compute the features that a command line asks for, and store them (`data/feature_store.py`).

    All checks run before anything is computed. The processes of a distributed run share the missing shards. A shard is
    written as a whole or not at all, so an interrupted run resumes with the next one. The index is written last. A
    folder without an index is not yet a feature store.

    Args:
        words: the command line.

    Raises:
        InputError: if options contradict each other, or a model, data set or column that they name cannot be used. Also
            if the folder holds another run, the disk is too small, or no row of a split can be used.
        OSError: if the folder cannot be written.

    Example:

    ```python
    >>> words = ["--vision_model_name_or_path", "facebook/dinov2-small", "--dataset_name", "my_folder"]
    >>> precompute(words)  # doctest: +SKIP
    ```
    """
    (args,) = OptionParser((FeatureArguments,), __doc__ or "").parse(words)

    # These modules import torch and datasets, which takes seconds, so `--help` runs before these imports.
    from qformer_captioner.data.feature_run import claim_folder, finish, resolve, write_shards

    run = resolve(args)
    with explain_faults(run.folder, "Finished shards are kept, and the same command continues."):
        run_folder = claim_folder(run)
        write_shards(run)
        run.state.wait_for_everyone()
        run.state.destroy_process_group()  # every process but the main one ends here
        if run_folder is not None:
            finish(run, run_folder)


def main() -> None:
    """Run the command."""
    run_command(precompute)


if __name__ == "__main__":
    main()
