"""Options of `precompute_features.py`. Nothing here imports torch, so that `--help` is quick."""

from dataclasses import dataclass

from ..common.arguments import option


@dataclass
class FeatureArguments:
    """Options for the vision encoder, the data set and the storage of the features."""

    vision_model_name_or_path: str | None = option(
        None, "Vision encoder (Hub id or folder). Required unless --embeddings_column is given.", "model"
    )
    vision_model_revision: str | None = option(None, "Branch, tag or commit of the vision encoder.", "model")
    compute_dtype: str = option(
        "auto",
        "Dtype of the forward pass: float32, bfloat16, float16 or auto. auto is bfloat16 on GPUs that support "
        "it, otherwise float32.",
        "model",
    )
    dataset_name: str = option(None, "Data set (Hub id, folder or files). Required.", "data")
    dataset_config_name: str | None = option(None, "Configuration of the data set.", "data")
    dataset_revision: str | None = option(None, "Branch, tag or commit of the data set on the Hub.", "data")
    splits: list[str] | None = option(None, "Splits to compute features for; by default all.", "data")
    split_column: str = option(
        "split", "Column that names the split of each row, for data sets that keep all rows in one split.", "data"
    )
    image_column: str = option("image", "Column of images or of paths.", "data")
    image_folder: str | None = option(
        None, "Folder that paths in the image column are relative to; by default the folder of the data set.", "data"
    )
    allowed_image_folders: list[str] | None = option(
        None, "Further folders that paths of images may lead into; by default only the image folder.", "data"
    )
    embeddings_column: str | None = option(
        None,
        "Column of features to store instead: lists [D], [N, D] or [1, N, D] in each row, also with different N. They "
        "may be those of any encoder, for example of audio or of proteins.",
        "data",
    )
    max_samples: int | None = option(
        None, "Largest number of rows of each split, taken from its beginning; by default all.", "data"
    )
    max_skipped: float = option(
        0.1, "Largest share of rows, or number above 1, whose image may be unreadable before a run stops.", "data"
    )
    dataloader_num_workers: int = option(0, "Number of workers that open images, for each process.", "data")
    train_split: str = option("train", "Split whose images get several views. Other splits get one.", "augmentation")
    views: int = option(
        1, "Number of views of each training image: the whole image and random crops of it.", "augmentation"
    )
    random_resized_crop_scale: float | None = option(
        None, "Lower bound of the share of the image's area that a random crop keeps.", "augmentation"
    )
    horizontal_flip_prob: float = option(
        0.0, "Probability that a view other than the whole image is mirrored left to right.", "augmentation"
    )
    seed: int = option(0, "Random seed for crops and flips.", "augmentation")
    dtype: str = option(
        "float16", "Dtype of the stored features: float16, or float32, which takes twice the space.", "run"
    )
    batch_size: int = option(64, "Number of images in a forward pass.", "run")
    rows_per_shard: int = option(
        2048, "Number of rows in a file. An interrupted run computes unfinished files again.", "run"
    )
    engine: str = option("local", "Processes that compute: local (this one), or ray (workers of Ray).", "run")
    num_workers: int = option(2, "Number of workers of --engine ray.", "run")
    gpus_per_worker: float = option(0.0, "Number of GPUs of each worker of --engine ray, such as 0.5.", "run")
    use_cpu: bool = option(False, "Compute on the CPU even if there is a GPU.", "run")
    output_dir: str = option("outputs/features", "Folder to store the features in.", "run")
    overwrite_output_dir: bool = option(False, "Delete the features that are in the output folder.", "run")
