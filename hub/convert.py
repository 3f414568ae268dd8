"""Convert BLIP-2 and InstructBLIP checkpoints of transformers to captioners.

    qformer-captioner convert Salesforce/blip2-opt-2.7b outputs/blip2
    qformer-captioner convert Salesforce/instructblip-flan-t5-xl outputs/instructblip --include_backbones

SOURCE is a folder or Hub id of a `Blip2ForConditionalGeneration`, `InstructBlipForConditionalGeneration` or
`Blip2ForImageTextRetrieval`. By default OUT holds the Q-Former and the projection, and keeps the backbones of SOURCE by
reference. For a `Blip2ForImageTextRetrieval`, OUT is a `QFormerForPretraining`.

Both libraries use nearly the same names for modules and parameters. Tensors are renamed and copied without changes, a
few hundred megabytes at a time.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..backbones_qformer import BACKBONES, CAPTIONERS, check_number_of_layers, commit_of
from ..checkpoint_qformer import (
    find_qformer,
    is_retrieval_model,
    names_to_read,
    our_name,
    read_config_dict,
    read_renamed,
)
from ..common.arguments import CommandParser
from ..common.command import run_command
from ..common.errors import UNUSABLE, InputError, one_line
from ..common.logging import get_logger
from ..configuration_qformer import QFormerCaptionerConfig, QFormerConfig
from ..modeling_qformer import QFormerCaptioner
from ..pretraining_qformer import QFormerForPretraining
from ..processing_qformer import QFORMER_TOKENIZER, QFormerCaptionerProcessor
from ..querying_qformer import QFormerModel
from ..weights_qformer import read_shapes
from .checkpoint import Checkpoint

logger = get_logger(__name__)

MAX_SHARD_BYTES = 400_000_000  # also about the memory that conversion needs
TEXT_FEED_FORWARD = re.compile(r"^qformer.*\d\.(intermediate|output)\.")


# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------


def our_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Map the names of tensors in a captioner to their names in a BLIP-2 or InstructBLIP checkpoint."""
    return {ours: theirs for theirs in checkpoint.tensors if (ours := our_name(theirs)) is not None}


def qformer_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration that are also fields of [`QFormerConfig`]."""
    fields = config.to_dict()
    return {name: fields[name] for name in QFormerConfig.field_names() if name in fields}


# ----------------------------------------------------------------------------------------------------------------------
# A pretrained Q-Former
# ----------------------------------------------------------------------------------------------------------------------


def load_qformer(
    source: str | os.PathLike, revision: str | None = None, module_name: str | None = None, **fields
) -> QFormerModel:
    """Load the Q-Former of a checkpoint, to train it between other backbones.

    The checkpoint is one that [`QFormerModel.from_pretrained`] loads, such as a BLIP-2, a model of stage 1 or a BERT.
    Weights that the checkpoint lacks, such as the query tokens of a BERT, are newly initialised, and a warning says so.
    The Q-Former of a model of stage 1 is loaded without its text part, unless `use_qformer_text_input=True`.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        module_name: name of the Q-Former's module, if the checkpoint has several Q-Formers.
        fields: fields of [`QFormerConfig`] that the checkpoint does not determine, such as `num_query_tokens` for a
            BERT.

    Returns:
        The Q-Former, for `QFormerCaptioner.from_backbones(..., qformer=...)`.

    Raises:
        InputError: for a checkpoint of another architecture, a checkpoint that cannot be read, or shapes that
            contradict the fields.
        TypeError: for a keyword that is not a field of [`QFormerConfig`].

    Example:

    ```python
    >>> qformer = load_qformer("Salesforce/blip2-opt-2.7b")  # doctest: +SKIP
    >>> qformer.query_tokens.shape  # doctest: +SKIP
    torch.Size([1, 32, 768])
    ```
    """
    with _explain(source):
        stored = read_config_dict(source, revision=revision)
        found = find_qformer(os.fspath(source), stored, read_shapes(source, revision=revision), module_name)
    config = QFormerConfig.from_fields(**found.fields | fields)
    with _explain(source):
        check_number_of_layers(config)
        weights = read_renamed(source, names_to_read(found, config), revision=revision)
    qformer = QFormerModel(config)
    expected = qformer.state_dict()
    misfits = [name for name in weights if name in expected and weights[name].shape != expected[name].shape]
    if misfits:
        raise InputError(
            f"The pretrained Q-Former has {misfits[0]!r} of shape {tuple(weights[misfits[0]].shape)}, but the fields "
            f"ask for {tuple(expected[misfits[0]].shape)} ({len(misfits)} tensors differ). Leave out the fields that "
            "the checkpoint decides."
        )
    missing, unexpected = qformer.load_state_dict(weights, strict=False)
    if missing:
        logger.warning(
            "%d of %d tensors of the Q-Former are newly initialised, such as %r: the checkpoint lacks them.",
            len(missing),
            len(expected),
            missing[0],
        )
    if unexpected:
        logger.warning(
            "%d of %d tensors of the pretrained Q-Former are left out, such as %r: the new one lacks them.",
            len(unexpected),
            len(weights),
            unexpected[0],
        )
    return qformer.eval()


@contextmanager
def _explain(source: str | os.PathLike) -> Iterator[None]:
    """Convert errors of a checkpoint to an `InputError` that names it."""
    try:
        yield
    except ValueError as error:
        raise InputError(one_line(error)) from error
    except (OSError, *UNUSABLE) as error:
        raise InputError(
            f"The checkpoint {os.fspath(source)!r} cannot be read: {str(error).splitlines()[0]} Give a folder or Hub "
            "id with a config.json and safetensors files."
        ) from error


def load_qformer_tokenizer(
    vocab_size: int,
    *,
    name: str | os.PathLike | None = None,
    qformer: str | os.PathLike | None = None,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Q-Former that reads the prompt.

    Args:
        vocab_size: vocabulary of the Q-Former, in tokens.
        name: Hub id or folder of the tokenizer. By default it is that of `qformer`, otherwise that of BERT-base.
        qformer: Hub id or folder that the Q-Former comes from.
        revision: branch, tag or commit of `qformer`.

    Returns:
        The tokenizer, for `QFormerCaptioner.from_backbones(..., qformer_tokenizer=...)`.

    Raises:
        OSError: if the tokenizer cannot be fetched or has another vocabulary than the Q-Former; the message names it.

    Example:

    ```python
    >>> tokenizer = load_qformer_tokenizer(30523, qformer="Salesforce/instructblip-flan-t5-xl")  # doctest: +SKIP
    ```
    """
    subfolder = ""
    if name is None and qformer is not None:
        name, file = qformer, f"{QFORMER_TOKENIZER}/tokenizer_config.json"
        if cached_file(qformer, file, revision=revision, _raise_exceptions_for_missing_entries=False) is not None:
            subfolder = QFORMER_TOKENIZER
    else:
        name, revision = name or "google-bert/bert-base-uncased", None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, subfolder=subfolder, trust_remote_code=False)
        # If its files are missing, transformers silently creates a tokenizer of a few tokens.
        if not vocab_size // 2 < len(tokenizer) <= vocab_size or tokenizer.pad_token is None:
            raise ValueError(
                f"it has {len(tokenizer)} tokens and pads with {tokenizer.pad_token}; the Q-Former has {vocab_size} "
                "tokens and needs a padding token"
            )
        return tokenizer
    except (OSError, ValueError) as error:
        raise OSError(
            f"The Q-Former reads text, but its tokenizer cannot be loaded from {str(name)!r}: name one with "
            f"`qformer_tokenizer` ({str(error).splitlines()[0]})."
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# Conversion
# ----------------------------------------------------------------------------------------------------------------------


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    include_backbones: bool = False,
    revision: str | None = None,
) -> None:
    """Convert a checkpoint to the folder of a captioner, or of a model of stage 1 for `Blip2ForImageTextRetrieval`.

    Args:
        source: folder or Hub id of a BLIP-2 or InstructBLIP checkpoint of transformers.
        out: folder to write.
        include_backbones: copy the vision encoder and the language model, instead of keeping them by reference. The
            weights of a `Blip2ForImageTextRetrieval` are then in memory together.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: if `out` is not empty or the checkpoint cannot be converted. Nothing is written then.

    Example:

    ```python
    >>> convert("Salesforce/blip2-opt-2.7b", "outputs/blip2")  # doctest: +SKIP
    >>> QFormerCaptioner.from_pretrained("outputs/blip2").caption("dog.jpg")  # doctest: +SKIP
    'a dog running on the grass'
    ```
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{str(out)!r} exists already and is not empty: choose another folder.")
    checkpoint = Checkpoint(source, revision)
    if checkpoint.config.model_type not in CAPTIONERS:
        raise InputError(
            f"{checkpoint.source!r} is a {checkpoint.config.model_type!r}. Only Blip2ForConditionalGeneration, "
            "Blip2ForImageTextRetrieval and InstructBlipForConditionalGeneration can be converted."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        unfinished = Path(folder) / "captioner"
        try:
            if is_retrieval_model(checkpoint.config.to_dict()):
                _convert_retrieval_model(checkpoint, unfinished, include_backbones)
            else:
                _convert_captioner(checkpoint, unfinished, include_backbones)
        except InputError:
            raise
        except UNUSABLE as error:  # from sizes or names in the configuration that contradict each other
            raise InputError(f"The configuration of {checkpoint.source!r} cannot be used: {one_line(error)}") from error
        if out.exists():
            out.rmdir()
        unfinished.rename(out)


def _convert_captioner(checkpoint: Checkpoint, out: Path, include_backbones: bool) -> None:
    names = our_names(checkpoint)
    reads_text = "qformer.embeddings.word_embeddings.weight" in names
    if not reads_text:  # some BLIP-2 checkpoints have feed-forward layers for text, but no word embeddings
        names = {ours: theirs for ours, theirs in names.items() if not TEXT_FEED_FORWARD.search(ours)}
    config = _captioner_config(checkpoint.config, reads_text)
    with torch.device("meta"):
        model = QFormerCaptioner(config)
    names = _match(checkpoint, names, model.state_dict(), model.all_tied_weights_keys)
    config.dtypes = {
        part: checkpoint.most_common_dtype(theirs for ours, theirs in names.items() if ours.startswith(f"{part}."))
        for part, _ in model.named_children()
    }
    config.dtype = getattr(torch, config.dtypes["language_model"])
    config.referenced_backbones = []
    if not include_backbones:
        _refer_to_backbones(config, checkpoint)
    written = {ours: theirs for ours, theirs in names.items() if ours.split(".")[0] not in config.referenced_backbones}
    processor = _load_processor(checkpoint, config, reads_text)
    _write_model(checkpoint, model, config, written, out)
    model.generation_config.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)


def _captioner_config(source: PreTrainedConfig, reads_text: bool) -> QFormerCaptionerConfig:
    """Convert the configuration of a BLIP-2 or InstructBLIP to that of a captioner."""
    return QFormerCaptionerConfig(
        vision_config=source.vision_config,
        qformer_config=_qformer_config(source, reads_text),
        text_config=source.text_config,
        freeze_vision_model=True,
        freeze_language_model=True,
    )


def _qformer_config(source: PreTrainedConfig, reads_text: bool) -> QFormerConfig:
    fields = qformer_fields(source.qformer_config)
    fields |= {"num_query_tokens": source.num_query_tokens, "use_qformer_text_input": reads_text}
    return QFormerConfig.from_fields(**fields)


def _refer_to_backbones(config: QFormerCaptionerConfig, checkpoint: Checkpoint) -> None:
    """Keep both backbones by reference to the checkpoint at its current commit."""
    is_folder = os.path.isdir(checkpoint.source)
    source = os.path.abspath(checkpoint.source) if is_folder else checkpoint.source
    config.vision_model_name_or_path = config.language_model_name_or_path = source
    commit = commit_of(checkpoint.source, checkpoint.revision)
    config.vision_model_revision = config.language_model_revision = commit
    config.referenced_backbones = list(BACKBONES)


def _convert_retrieval_model(checkpoint: Checkpoint, out: Path, include_backbones: bool) -> None:
    model, info = QFormerForPretraining.from_pretrained(
        checkpoint.source,
        revision=checkpoint.revision or "main",
        load_vision_model=include_backbones,
        output_loading_info=True,
    )
    new = ("lm_head.", "logit_scale", "vision_model.nothing")
    _refuse(checkpoint, "lacks", sorted(name for name in info["missing_keys"] if not name.startswith(new)))
    _refuse(checkpoint, "has an unknown", sorted(info["unexpected_keys"]))
    model.save_pretrained(out, include_backbones=include_backbones)


def _match(
    checkpoint: Checkpoint, names: dict[str, str], expected: dict[str, torch.Tensor], tied: dict[str, str]
) -> dict[str, str]:
    """Check that a checkpoint holds exactly the tensors of a model.

    Args:
        checkpoint: the checkpoint.
        names: names in the model, mapped to names in the checkpoint.
        expected: state dict of the model.
        tied: tied weights of the model, mapped to the weight that they share.

    Returns:
        `names` in the order of the model. Tied weights occur once, under the name of the shared weight.

    Raises:
        InputError: for a tensor that is missing, unknown or of another shape.
    """
    names = {
        **names,
        **{shared: names[alias] for alias, shared in tied.items() if alias in names and shared not in names},
    }
    head, embedding = "language_model.lm_head.weight", "language_model.shared.weight"
    if head in expected and head not in tied and embedding in names:
        # transformers 5 ties the output layer of every T5, so the checkpoint may have one tensor for both.
        names.setdefault(head, names[embedding])
    wanted = [name for name in expected if name not in tied]
    _refuse(checkpoint, "lacks", [name for name in wanted if name not in names])
    _refuse(checkpoint, "has an unknown", [name for name in names if name not in expected])
    shapes = {name: checkpoint.tensors[names[name]].shape for name in wanted}
    _refuse(
        checkpoint, "has another shape of", [name for name in wanted if shapes[name] != tuple(expected[name].shape)]
    )
    return {name: names[name] for name in wanted}


def _refuse(checkpoint: Checkpoint, problem: str, offenders: list[str]) -> None:
    if offenders:
        count = f" ({len(offenders)} tensors in all)" if len(offenders) > 1 else ""
        raise InputError(
            f"The checkpoint {checkpoint.source!r} {problem} {offenders[0]!r}{count}, so it cannot be converted."
        )


def _load_processor(
    checkpoint: Checkpoint, config: QFormerCaptionerConfig, reads_text: bool
) -> QFormerCaptionerProcessor | None:
    """Load the processor of the captioner from the checkpoint, if the checkpoint has one."""
    source, revision = checkpoint.source, checkpoint.revision
    try:
        processor = QFormerCaptionerProcessor.from_backbones(
            source, source, revision, revision, is_encoder_decoder=config.is_encoder_decoder
        )
        if reads_text:
            vocab_size = checkpoint.config.qformer_config.vocab_size
            processor.qformer_tokenizer = load_qformer_tokenizer(vocab_size, qformer=source, revision=revision)
        return processor
    except (OSError, ValueError) as error:
        logger.warning("The captioner gets no processor, because %r has none (%s).", source, one_line(error))
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def _write_model(
    checkpoint: Checkpoint,
    model: QFormerCaptioner,
    config: PreTrainedConfig,
    names: dict[str, str],
    out: Path,
) -> None:
    """Write configuration, source files and weights.

    Args:
        checkpoint: the checkpoint that holds the weights.
        model: the model, on the meta device.
        config: configuration to write.
        names: names of the weights to write, mapped to names in the checkpoint.
        out: folder to create.
    """
    out.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    custom_object_save(model, out, config=config)  # type: ignore[arg-type]  # it takes configurations, too
    config.save_pretrained(out)
    shards = list(_split_into_shards(checkpoint, names))
    shard_of: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SAFE_WEIGHTS_NAME
        tensors = checkpoint.read(names[ours] for ours in shard)
        weights = {ours: tensors[names[ours]] for ours in shard}
        if len(tensors) < len(weights):  # safetensors refuses one tensor under two names
            weights = {ours: tensor.clone() for ours, tensor in weights.items()}
        save_file(weights, out / file, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": shard_of}
        (out / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _split_into_shards(checkpoint: Checkpoint, names: dict[str, str]) -> Iterator[list[str]]:
    """Yield names of tensors in groups of at most `MAX_SHARD_BYTES`. A larger tensor is a separate group."""
    shard: list[str] = []
    shard_bytes = 0
    for ours, theirs in names.items():
        num_bytes = checkpoint.tensors[theirs].num_bytes
        if shard and shard_bytes + num_bytes > MAX_SHARD_BYTES:
            yield shard
            shard, shard_bytes = [], 0
        shard.append(ours)
        shard_bytes += num_bytes
    yield shard


def convert_command(words: list[str]) -> None:
    """Convert the checkpoint that a command line names."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("source", help="Folder or Hub id of a BLIP-2 or InstructBLIP checkpoint.")
    parser.add_argument("out", help="Folder to write.")
    parser.add_argument(
        "--include_backbones", action="store_true", help="Also copy the vision encoder and the language model."
    )
    parser.add_argument("--revision", help="Branch, tag or commit of SOURCE on the Hub.")
    options = parser.parse_args(words)
    convert(options.source, options.out, options.include_backbones, options.revision)
    logger.info("The captioner is in %s.", options.out)


def main() -> None:
    """Run the command `qformer-captioner convert`."""
    run_command(convert_command)


if __name__ == "__main__":
    main()
