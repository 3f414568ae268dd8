"""Captioners out of BLIP-2 and InstructBLIP checkpoints, tensor by tensor.

    qformer-captioner convert Salesforce/blip2-opt-2.7b outputs/blip2
    qformer-captioner convert Salesforce/instructblip-flan-t5-xl outputs/instructblip --include_backbones

SOURCE is a folder or Hub id of transformers' `Blip2ForConditionalGeneration`, `InstructBlipForConditionalGeneration` or
`Blip2ForImageTextRetrieval`. Of the last, which writes no captions, the Q-Former is kept, and beside it its stage-1
heads. Without --include_backbones OUT holds the Q-Former and the projection and refers to SOURCE for the rest.

Nothing is computed: parts and parameters have nearly the same names on both sides, so tensors are renamed and copied,
a few hundred megabytes at a time.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..backbones_qformer import (
    CAPTIONERS,
    blip2_vision_config,
    check_number_of_layers,
    commit_of,
    open_weights,
    weight_files,
)
from ..common.arguments import CommandParser
from ..common.command import run_command
from ..common.errors import UNUSABLE, InputError
from ..configuration_qformer import QFormerCaptionerConfig, QFormerConfig
from ..modeling_qformer import QFormerCaptioner, QFormerModel
from ..processing_qformer import QFormerCaptionerProcessor, load_qformer_tokenizer

SHARD_SIZE = 400_000_000  # bytes that are in memory at a time
STAGE_1_HEADS = ("vision_projection.", "text_projection.", "itm_head.")


class Checkpoint:
    """The tensors of a folder or Hub repository, opened one at a time.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: if there is no such checkpoint, or one of its files is missing or cut off.
    """

    def __init__(self, source: str | os.PathLike, revision: str | None = None):
        self.source, self.revision = os.fspath(source), revision
        try:
            model_type = PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")
            ours = {each.model_type: each for each in (QFormerConfig, QFormerCaptionerConfig)}
            kwargs = {} if model_type in ours else {"trust_remote_code": False}
            self.config = ours.get(model_type, AutoConfig).from_pretrained(source, revision=revision, **kwargs)
            check_number_of_layers(self.config)
            files = weight_files(source, revision=revision)
        except (*UNUSABLE, OSError) as error:
            raise InputError(
                f"The checkpoint {self.source!r} cannot be read: {str(error).splitlines()[0]} Give a folder or Hub id "
                "with a config.json and safetensors files."
            ) from error
        self.file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in files:
            try:
                with open_weights(file) as tensors:
                    for name in tensors.keys():  # noqa: SIM118, it is no dictionary
                        part = tensors.get_slice(name)
                        self.file_of[name] = file
                        self.shapes[name] = tuple(part.get_shape())
                        self.dtypes[name] = str(part.get_dtype())
            except OSError as error:
                raise InputError(f"The checkpoint {self.source!r} cannot be read: {error}") from error

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """These tensors, in memory."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file_of[name], []).append(name)
        read = {}
        for file, own in by_file.items():
            with open_weights(file) as tensors:  # opened each time: what was read stays mapped until then
                read |= {name: tensors.get_tensor(name) for name in own}
        return read


# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------


def our_name(name: str) -> str | None:
    """A tensor's name in a captioner; `None` for what is computed and only some versions saved."""
    if name.endswith((".position_ids", "rotary_emb.inv_freq")):
        return None
    if name == "query_tokens":
        return "qformer.query_tokens"
    name = re.sub(r"^embeddings\.", "qformer.embeddings.", name)  # of Blip2ForImageTextRetrieval
    return name.replace("qformer.embeddings.layernorm.", "qformer.layernorm.")  # of InstructBLIP


def our_bert_names(name: str) -> list[str]:
    """The names in a Q-Former of a tensor of BERT, whose feed-forward part serves queries and words alike."""
    name = re.sub(r"^bert\.", "", name).replace(".gamma", ".weight").replace(".beta", ".bias")
    name = name.replace("embeddings.LayerNorm.", "layernorm.").replace(".attention.self.", ".attention.attention.")
    if re.search(r"layer\.\d+\.(intermediate|output)\.", name):
        return [name, re.sub(r"(layer\.\d+\.(?:intermediate|output))\.", r"\1_query.", name)]
    return [name]


def qformer_fields(config: PreTrainedConfig) -> dict[str, object]:
    """The fields of [`QFormerConfig`] that another configuration has, too."""
    theirs = config.to_dict()
    return {name: theirs[name] for name in QFormerConfig.field_names() if name in theirs}


def load_qformer(source: str | os.PathLike, revision: str | None = None) -> tuple[dict, dict[str, torch.Tensor]]:
    """Fields and weights of a Q-Former in a checkpoint: BLIP-2, InstructBLIP, a captioner or Q-Former of ours, or BERT.

    Weights have the names of a [`QFormerModel`]. BERT has no queries and no cross-attention, BLIP-2 no text side.

    Raises:
        InputError: for a checkpoint of another architecture, or one that cannot be read.
    """
    checkpoint = Checkpoint(source, revision)
    config = checkpoint.config
    if config.model_type == "bert":
        names = {ours: name for name in checkpoint.file_of for ours in our_bert_names(name)}
        names = {
            ours: name for ours, name in names.items() if ours.startswith(("encoder.", "embeddings.", "layernorm."))
        }
        names = {ours: name for ours, name in names.items() if not ours.startswith("embeddings.token_type")}
        fields = qformer_fields(config)
    elif config.model_type in (*CAPTIONERS, QFormerCaptionerConfig.model_type):
        names = {our_name(name): name for name in checkpoint.file_of}
        names = {
            ours.removeprefix("qformer."): name for ours, name in names.items() if ours and ours.startswith("qformer.")
        }
        fields = qformer_fields(config.qformer_config)
        if config.model_type in CAPTIONERS:  # theirs stands beside the Q-Former's other fields
            fields["num_query_tokens"] = config.num_query_tokens
    elif config.model_type == QFormerConfig.model_type:
        names = {name: name for name in checkpoint.file_of if not name.startswith(STAGE_1_HEADS)}
        fields = qformer_fields(config)
    else:
        raise InputError(
            f"{checkpoint.source!r} is a {config.model_type!r}, and has no Q-Former: give a BLIP-2, an InstructBLIP, a "
            "captioner of ours, or a BERT."
        )
    fields["use_qformer_text_input"] = "embeddings.word_embeddings.weight" in names
    tensors = checkpoint.read(set(names.values()))
    return fields, {ours: tensors[name] for ours, name in names.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Conversion
# ----------------------------------------------------------------------------------------------------------------------


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    include_backbones: bool = False,
    revision: str | None = None,
) -> None:
    """Write a captioner's folder (of `Blip2ForImageTextRetrieval`: a Q-Former's) out of a checkpoint.

    Args:
        source: folder or Hub id.
        out: folder to make.
        include_backbones: copy the vision encoder and the language model, too, instead of referring to `source`.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: for another architecture, tensors that are missing, left over or of another shape, a file that is
            cut off, or a folder that is not empty. Nothing is written then.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{str(out)!r} is there already and not empty. Choose another folder.")
    checkpoint = Checkpoint(source, revision)
    config, architectures = checkpoint.config, checkpoint.config.architectures or []
    if config.model_type not in CAPTIONERS:
        raise InputError(
            f"{checkpoint.source!r} is a {config.model_type!r}: what converts is Blip2ForConditionalGeneration, "
            "Blip2ForImageTextRetrieval and InstructBlipForConditionalGeneration."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        unfinished = Path(folder) / "captioner"
        try:
            if "Blip2ForImageTextRetrieval" in architectures:
                _convert_retrieval(checkpoint, unfinished)
            else:
                _convert_captioner(checkpoint, unfinished, include_backbones)
        except InputError:
            raise
        except UNUSABLE as error:  # sizes or names that cannot be
            raise InputError(
                f"The configuration of {checkpoint.source!r} cannot be used: {' '.join(str(error).split())}"
            ) from error
        if out.exists():
            out.rmdir()
        unfinished.rename(out)


def _convert_captioner(checkpoint: Checkpoint, out: Path, include_backbones: bool) -> None:
    source = checkpoint.config
    names = {ours: name for name in checkpoint.file_of if (ours := our_name(name))}
    reads_text = "qformer.embeddings.word_embeddings.weight" in names
    if not reads_text:  # some BLIP-2 checkpoints have the words' feed-forward parts, but never words to go through them
        names = {
            ours: name for ours, name in names.items() if not re.search(r"^qformer.*\d\.(intermediate|output)\.", ours)
        }
    fields = {"num_query_tokens": source.num_query_tokens, "use_qformer_text_input": reads_text}
    config = QFormerCaptionerConfig(
        vision_config=blip2_vision_config(source.vision_config),
        qformer_config=QFormerConfig.from_fields(**qformer_fields(source.qformer_config) | fields),
        text_config=source.text_config,
        freeze_vision_model=True,
        freeze_language_model=True,
    )
    with torch.device("meta"):
        model = QFormerCaptioner(config)
    names = _match(checkpoint, names, model.state_dict(), model.all_tied_weights_keys)
    parts = {name: [ours for ours in names if ours.startswith(f"{name}.")] for name, _ in model.named_children()}
    config.dtypes = {part: _dtype(checkpoint, [names[ours] for ours in own]) for part, own in parts.items()}
    config.dtype = getattr(torch, config.dtypes["language_model"])
    config.referenced_backbones = []
    if not include_backbones:
        place = os.path.abspath(checkpoint.source) if os.path.isdir(checkpoint.source) else checkpoint.source
        commit = commit_of(checkpoint.source, checkpoint.revision)
        config.vision_model_name_or_path = config.language_model_name_or_path = place
        config.vision_model_revision = config.language_model_revision = commit
        config.referenced_backbones = ["vision_model", "language_model"]
    kept = [ours for ours in names if ours.split(".")[0] not in config.referenced_backbones]

    processor = _processor(checkpoint, config.is_encoder_decoder, reads_text)
    _write(checkpoint, model, config, {ours: names[ours] for ours in kept}, out)
    model.generation_config.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)


def _convert_retrieval(checkpoint: Checkpoint, out: Path) -> None:
    source = checkpoint.config
    names = {ours: name for name in checkpoint.file_of if (ours := our_name(name))}
    heads = {ours: name for ours, name in names.items() if ours.startswith(STAGE_1_HEADS)}
    names = {ours.removeprefix("qformer."): name for ours, name in names.items() if ours.startswith("qformer.")}
    fields = {"num_query_tokens": source.num_query_tokens, "use_qformer_text_input": True}
    config = QFormerConfig.from_fields(**qformer_fields(source.qformer_config) | fields)
    with torch.device("meta"):
        model = QFormerModel(config)
    names = _match(checkpoint, names, model.state_dict(), {})
    config.dtype = getattr(torch, _dtype(checkpoint, list(names.values())))
    _write(checkpoint, model, config, names, out)
    tensors = checkpoint.read(heads.values())
    save_file({ours: tensors[name] for ours, name in heads.items()}, out / "stage_1_heads.safetensors")


def _match(
    checkpoint: Checkpoint, names: dict[str, str], expected: dict[str, torch.Tensor], tied: dict[str, str]
) -> dict[str, str]:
    """Which tensor of the checkpoint each of ours is, in our order, and of tied ones the first alone."""
    for alias, original in tied.items():  # whichever of them was saved
        if original not in names and alias in names:
            names[original] = names[alias]
    head, words = "language_model.lm_head.weight", "language_model.shared.weight"
    if head in expected and head not in tied and head not in names and words in names:
        names[head] = names[words]  # transformers 5 ties every T5's output layer, and saved that one tensor
    wanted = [name for name in expected if name not in tied]
    for kind, offenders in (
        ("has no", [name for name in wanted if name not in names]),
        ("has an unknown", [name for name in names if name not in expected]),
        (
            "has another shape of",
            [n for n in wanted if n in names and checkpoint.shapes[names[n]] != tuple(expected[n].shape)],
        ),
    ):
        if offenders:
            more = f" ({len(offenders)} tensors are so)" if len(offenders) > 1 else ""
            raise InputError(
                f"The checkpoint {checkpoint.source!r} {kind} {offenders[0]!r}{more}: it cannot be converted."
            )
    return {name: names[name] for name in wanted}


def _dtype(checkpoint: Checkpoint, names: list[str]) -> str:
    """What most of these tensors are."""
    kinds = [checkpoint.dtypes[name] for name in names]
    most = max(sorted(set(kinds)), key=kinds.count)
    return {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(most, "float32")


def _processor(checkpoint: Checkpoint, is_encoder_decoder: bool, reads_text: bool) -> QFormerCaptionerProcessor | None:
    source, revision = checkpoint.source, checkpoint.revision
    try:
        processor = QFormerCaptionerProcessor.from_backbones(
            source, source, revision, revision, is_encoder_decoder=is_encoder_decoder
        )
        if reads_text:
            processor.qformer_tokenizer = load_qformer_tokenizer(
                None, source, revision, checkpoint.config.qformer_config.vocab_size
            )
        return processor
    except (OSError, ValueError) as error:
        print(f"{source!r} has no processor ({str(error).splitlines()[0]}), so neither has the captioner.")
        return None


def _write(
    checkpoint: Checkpoint,
    model: QFormerCaptioner | QFormerModel,
    config: PreTrainedConfig,
    names: dict[str, str],
    out: Path,
) -> None:
    """Configuration, source files, and weights shard by shard."""
    out.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    custom_object_save(model, out, config=config)
    config.save_pretrained(out)
    shards = list(_shards(checkpoint, names))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SAFE_WEIGHTS_NAME
        tensors = checkpoint.read(names[ours] for ours in shard)
        copies = {ours: tensors[names[ours]] for ours in shard}
        if len(tensors) < len(copies):  # one tensor serves as two, and a file holds none twice
            copies = {ours: tensor.clone() for ours, tensor in copies.items()}
        save_file(copies, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _shards(checkpoint: Checkpoint, names: dict[str, str]) -> Iterator[list[str]]:
    """Our names, in groups of `SHARD_SIZE` bytes."""
    shard, size = [], 0
    for ours, name in names.items():
        bits = int(re.search(r"\d+", checkpoint.dtypes[name])[0])
        own = bits // 8 * torch.Size(checkpoint.shapes[name]).numel()
        if shard and size + own > SHARD_SIZE:
            yield shard
            shard, size = [], 0
        shard.append(ours)
        size += own
    yield shard


def convert_command(words: list[str]) -> None:
    """Convert the checkpoint that a command line names."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("source", help="folder or Hub id of a BLIP-2 or InstructBLIP")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--include_backbones", action="store_true", help="copy vision encoder and language model, too")
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    options = parser.parse_args(words)
    convert(options.source, options.out, options.include_backbones, options.revision)
    print(f"The captioner is in {options.out}.")


def main() -> None:
    run_command(convert_command)


if __name__ == "__main__":
    main()
