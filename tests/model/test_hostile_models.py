"""Files from strangers: recipes, captioners, image features, captions. Each ends in one clear error or a safe page.

No file may run code, exhaust the memory, or read a file outside its folder.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from qformer_captioner import QFormerCaptioner, eval_captions, train_hf
from qformer_captioner.common.errors import InputError, printable
from qformer_captioner.common.run_folder import RunFolder
from qformer_captioner.data.feature_shards import FeatureBatch, SplitLayout
from qformer_captioner.data.feature_store import FeatureStore, finish_store
from qformer_captioner.data.vision_fingerprint import VisionFingerprint
from qformer_captioner.hub.convert import convert, load_qformer
from qformer_captioner.hub.export import export
from qformer_captioner.hub.legacy import LegacyCaptioner
from qformer_captioner.training.training_arguments import QFormerTrainingArguments

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.processes import command_line

SECRET = "hf_nobodyMayReadThis"


class Runs:
    """Object that runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# ----------------------------------------------------------------------------------------------------------------------
# Recipes
# ----------------------------------------------------------------------------------------------------------------------

LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
RECIPES = {
    "code": "prompt: !!python/object/apply:os.system ['touch ran']",
    "a class": "prompt: !!python/object:os._wrap_close {}",
    "billion laughs": "a0: &a0 [lol]\n" + LAUGHS,
    "a list in itself": "prompt: &a [*a]",
    "a merged alias": "qformer_config: &a {hidden_size: 8}\nvision_config:\n  <<: *a",
    "brackets 100,000 deep": "prompt: " + "[" * 100_000,
    "a key twice": "learning_rate: 1\nlearning_rate: 2",
    "a key twice, inside": "qformer_config: {hidden_size: 8, hidden_size: 16}",
    "100 MB": "prompt: " + "a" * 100_000_000,
    "no text": b"\xff\xfe\x00prompt",
    "NULs": b"\0" * 100,
    "nothing": "",
    "a list": "- prompt",
    "a word": "prompt",
    "a date in a mapping": "qformer_config: {hidden_size: 2001-01-01}",
    "another type": "learning_rate: {a: b}",
    "text for a number": "num_train_epochs: many",
    "a number of 5,000 digits": "seed: " + "9" * 5000,
    "a recipe outside": "recipe: ../../../../../../etc/passwd",
    "an unknown option": "os.system: touch ran",
    "a key that is no text": "? [a, b]\n: c",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_ends_in_one_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = RECIPES[name]
    (tmp_path / "stranger.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        train_hf.train(["--recipe", "stranger.yaml", "--output_dir", "out"])
    except InputError as error:
        assert len(str(error)) <= 500
        assert "root:" not in str(error)  # not a line of another's file
    else:
        pytest.fail("trained")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stranger.yaml"]


# ----------------------------------------------------------------------------------------------------------------------
# Captioners
# ----------------------------------------------------------------------------------------------------------------------

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def captioners(tmp_path_factory):
    """A self-contained captioner, and one that keeps its backbones by reference."""
    root = tmp_path_factory.mktemp("captioners")
    tiny.captioner().save_pretrained(root / "whole", include_backbones=True)
    parts = tiny.save_vision(root / "vision"), tiny.save_language(root / "language")
    QFormerCaptioner.from_backbones(*parts, **tiny.QFORMER).save_pretrained(root / "refers", include_backbones=False)
    return root


def config(**changes):
    """Return a function that changes `config.json`; `__` leads into a part."""

    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            *path, last = name.split("__")
            inside = content
            for each in path:
                inside = inside[each]
            inside[last] = value
        (folder / "config.json").write_text(json.dumps(content))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def index_of(*names):
    def change(folder):
        shutil.move(folder / WEIGHTS, folder.parent / "canary.safetensors")
        content = {"metadata": {}, "weight_map": {str(number): name for number, name in enumerate(names)}}
        (folder / INDEX).write_text(json.dumps(content))

    return change


def index_that_is_not_json(folder):
    (folder / WEIGHTS).unlink()  # the whole file is read first
    (folder / INDEX).write_bytes(b"[1")


def pickled(name):
    """Return a function that replaces the weights by a pickle that runs a command."""

    def change(folder):
        weights = QFormerCaptioner.from_pretrained(folder).state_dict()
        (folder / WEIGHTS).unlink()
        torch.save({**weights, "evil": Runs(folder.parent / "ran")}, folder / name)

    return change


def with_code(folder):
    """Add classes to the folder for every Auto class, as a Hub repository may."""
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\nclass Evil: pass\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor"), "evil.Evil")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {**auto_map, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "Evil"
        (folder / name).write_text(json.dumps(content))


def backbone_with_code(folder):
    backbone = folder.parent / "backbone"
    shutil.copytree(folder.parent / "language", backbone)
    config(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(backbone)
    (backbone / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config(language_model_name_or_path=str(backbone), referenced_backbones=["language_model"])(folder)


def without_language_model(folder):
    """Remove the weights of the language model and make its configuration a thousand times larger."""
    weights = QFormerCaptioner.from_pretrained(folder).state_dict()
    save_file({k: v.clone() for k, v in weights.items() if not k.startswith("language_model.")}, folder / WEIGHTS)
    config(text_config__hidden_size=20_000)(folder)


CHECKPOINTS = {
    "cut off": lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100),
    "header of 2**60 bytes": write(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"),
    "no bytes": write(WEIGHTS, b""),
    "a pickle by the name of safetensors": pickled(WEIGHTS),
    "a pickle alone": pickled("pytorch_model.bin"),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "an index that leads outside": index_of("../canary.safetensors"),
    "an index of pickles": index_of("pytorch_model.bin"),
    "an index of numbers": index_of(1, 2),
    "an index of nothing": index_of(),
    "an index that is not JSON": index_that_is_not_json,
    "configuration cut off": lambda folder: os.truncate(folder / "config.json", 300),
    "decoding defaults cut off": write("generation_config.json", b"{"),
    "configuration is a list": write("config.json", b"[]"),
    "configuration 100,000 deep": write("config.json", b'{"a":' + b"[" * 100_000),
    "hidden_size 10**9": config(qformer_config__hidden_size=10**9),
    "hidden_size is text": config(qformer_config__hidden_size="8"),
    "hidden_size below 0": config(qformer_config__hidden_size=-8),
    "10**9 layers": config(qformer_config__num_hidden_layers=10**9),
    "10**10 queries": config(qformer_config__num_query_tokens=10**10),
    "10**9 layers of the language model": config(text_config__num_hidden_layers=10**9),
    "10**12 words": config(text_config__vocab_size=10**12),
    "images of 10**7 pixels": config(vision_config__image_size=10**7),
    "no weights of a part": without_language_model,
    "an unknown language model": config(text_config__model_type="evil"),
    "attention off the Hub": config(
        _attn_implementation="evil/kernel", text_config___attn_implementation="evil/kernel"
    ),
    "unknown dtypes": config(dtypes={"qformer": "load"}),
    "a reference to an unknown backbone": config(referenced_backbones=["../processor", "qformer"]),
    "a backbone that is a file": config(
        referenced_backbones=["language_model"], language_model_name_or_path="../../../etc/passwd"
    ),
    "a backbone without a name": config(referenced_backbones=["vision_model"], vision_model_name_or_path=None),
    "weights of another name": config(transformers_weights="../canary.safetensors", referenced_backbones=[]),
    "code of its own": with_code,
    "a backbone with code": backbone_with_code,
    "an adapter without base": write("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": null}'),
    "an adapter on a path": write(
        "adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "../../etc/passwd"}'
    ),
    "an unknown adapter": write("adapter_config.json", b'{"peft_type": "EVIL", "base_model_name_or_path": "x"}'),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_captioner_ends_in_one_error(name, captioners, tmp_path):
    for part in ("language", "whole"):
        shutil.copytree(captioners / part, tmp_path / part)
    CHECKPOINTS[name](tmp_path / "whole")
    with pytest.raises((InputError, OSError)) as caught:
        export(tmp_path / "whole", tmp_path / "out")
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cut off", "an index that leads outside", "10**9 layers", "10**10 queries"])
def test_a_hostile_captioner_without_backbones_ends_in_one_error(name, captioners, tmp_path):
    shutil.copytree(captioners / "refers", tmp_path / "refers")
    CHECKPOINTS[name](tmp_path / "refers")
    with pytest.raises((InputError, OSError)):
        export(tmp_path / "refers", tmp_path / "out")


@pytest.mark.parametrize("command", [convert, lambda source, out: load_qformer(source)], ids=["convert", "qformer"])
@pytest.mark.parametrize("name", ["cut off", "a pickle alone", "an index that leads outside", "10**9 layers"])
def test_a_hostile_checkpoint_is_not_converted(name, command, captioners, tmp_path):
    shutil.copytree(captioners / "whole", tmp_path / "whole")
    CHECKPOINTS[name](tmp_path / "whole")
    with pytest.raises(InputError):
        command(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_weights_of_the_old_scripts_run_no_code(tmp_path):
    torch.save({"query_tokens": torch.zeros(1, 2, 4), "fc.weight": Runs(tmp_path / "ran")}, tmp_path / "qformer.pt")
    with pytest.raises(InputError, match="is not a state dict"):
        LegacyCaptioner.from_state_dict(tmp_path / "qformer.pt", "vision", "language")
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Features, and records of runs
# ----------------------------------------------------------------------------------------------------------------------


def store(folder, **changes):
    """Write a feature store of four rows whose index has other values."""
    layout = SplitLayout(folder / "train", rows=4, rows_per_shard=2, views=1, shape=(3, 5), dtype="float16")
    for shard in layout.shards:
        layout.write(shard, [FeatureBatch(np.zeros((6, 5), np.float16), np.full((2, 1), 3), [])])
    names = ("name", "config_name", "revision", "split_column", "image_column", "image_folder", "embeddings_column")
    finish_store(folder, VisionFingerprint("model", None, None, {}), dict.fromkeys(names), {"train": layout})
    index = json.loads((folder / "index.json").read_text())
    index["splits"]["train"] |= changes
    (folder / "index.json").write_text(json.dumps(index))
    return index


STORES = {
    "10**12 rows": {"rows": 10**12},
    "10**12 rows in one file": {"rows": 10**12, "rows_per_shard": 10**12},
    "rows below 0": {"rows": -1},
    "no rows in a file": {"rows_per_shard": 0},
    "rows that are true": {"rows": True},
    "an absurd shape": {"shape": [10**9, 10**9]},
    "a shape of one": {"shape": [15]},
    "a shape that is a number": {"shape": 15},
    "objects": {"dtype": "object"},
    "an unknown dtype": {"dtype": "evil"},
    "a field of its own": {"size": "/"},
}


@pytest.mark.parametrize("name", STORES)
def test_hostile_features_end_in_one_error(name, tmp_path):
    store(tmp_path, **STORES[name])
    with pytest.raises(InputError, match="is missing or damaged"):
        FeatureStore(tmp_path).split("train")


@pytest.mark.parametrize("split", ["../outside", "/etc", "a/b", "..", ""])
def test_a_split_of_features_is_inside_its_store(split, tmp_path):
    index = store(tmp_path / "store")
    shutil.copytree(tmp_path / "store" / "train", tmp_path / "outside")
    index["splits"] = {split: index["splits"]["train"]}
    (tmp_path / "store" / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is not a valid name of a folder"):
        FeatureStore(tmp_path / "store")


@pytest.mark.parametrize("kind", ["pickle", "npz", "nothing", "text"])
def test_the_error_for_a_hostile_feature_file_names_it(kind, tmp_path):
    store(tmp_path)
    with (tmp_path / "train" / "00000.npy").open("wb") as file:
        if kind == "pickle":
            np.save(file, np.array([Runs(tmp_path / "ran")], dtype=object), allow_pickle=True)
        elif kind == "npz":
            np.savez(file, np.zeros((2, 1, 3, 5), np.float16))
        elif kind == "text":
            file.write(b"<script>")
    with pytest.raises(InputError, match=r"00000.npy' of the features is missing or damaged"):
        FeatureStore(tmp_path).split("train")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"settings": 5, "finished": 1}', b"\xff", b"[" * 100_000])
def test_a_hostile_run_record_is_refused(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "checkpoint-evil").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        RunFolder(tmp_path, {})
    assert RunFolder(tmp_path, {}, overwrite=True).last_checkpoint is None


# ----------------------------------------------------------------------------------------------------------------------
# Secrets
# ----------------------------------------------------------------------------------------------------------------------


def test_options_are_recorded_without_the_token(tmp_path):
    args = QFormerTrainingArguments(output_dir=str(tmp_path), hub_token=SECRET, report_to="none", use_cpu=True)
    assert args.hub_token == SECRET
    for written in (args.to_json_string(), str(args)):
        assert SECRET not in written


def test_a_misspelt_token_is_not_shown():
    with pytest.raises(InputError) as caught:
        train_hf.train([f"--hub_tokn={SECRET}"])
    assert SECRET not in str(caught.value)


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\x9b\u202eb\ud800 é\n") == "a\\x1b[2J\\x9b\\u202eb\\ud800 é\n"


# ----------------------------------------------------------------------------------------------------------------------
# Files of captions, and the page about them
# ----------------------------------------------------------------------------------------------------------------------

MARKUP = [
    "<script>document.title = 'ran'</script>",
    "</script><script>document.title = 'ran'</script>",
    "<img src=x onerror=\"document.title = 'ran'\">",
    "'\"><svg onload=\"document.title = 'ran'\">",
    "</td></table></textarea></title></style><script>document.title = 'ran'</script>",
    "&lt;script&gt;document.title = 'ran'&lt;/script&gt;",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} [a](javascript:alert(1)) ![](http://127.0.0.1:9/x.png)",
    "\u202e<b>dog</b>\x1b[2J\0\ud800",
]


@pytest.fixture
def page(tmp_path):
    """Report in which captions, references, ids, file names and domains are all markup."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "canary.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "canary.png")
    names = ["../canary.png", str(tmp_path / "canary.png"), "link.png", "http://127.0.0.1:9/x.png", *MARKUP]
    images = [
        {"id": f"{n}{MARKUP[n % 8]}", "file_name": name, "domain": MARKUP[-n % 8]} for n, name in enumerate(names)
    ]
    rows = [{"image_id": image["id"], "caption": f"a dog {MARKUP[n % 8]}"} for n, image in enumerate(images)]
    (tmp_path / "references.json").write_text(json.dumps({"images": images, "annotations": rows}))
    (tmp_path / "<b>predictions.json").write_text(json.dumps(rows))
    options = {"predictions": tmp_path / "<b>predictions.json", "references": tmp_path / "references.json"}
    options |= {"image_folder": tmp_path / "images", "report": tmp_path / "report.html"}
    eval_captions.evaluate(command_line(**options, output=tmp_path / "scores.json"))
    return tmp_path / "report.html"


class Tags(HTMLParser):
    """Parser that counts the tags of a page and collects the names of their attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = Counter(), set()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}


def test_a_report_has_only_its_own_tags_and_no_image_from_outside(page):
    parsed = Tags()
    parsed.feed(page.read_text())
    assert (parsed.tags["script"], parsed.tags["svg"]) == (1, 0)
    assert parsed.tags["img"] == 1, "the histogram; the canary would be a picture more"
    assert not any(name.startswith("on") for name in parsed.attributes)


def test_printed_scores_hold_no_control_characters(capsys, page):
    assert not {"\x1b", "\0", "\u202e", "\ud800"} & set(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_runs_no_script_of_a_stranger(page, tmp_path):
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    browser += ["--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(browser, capture_output=True, text=True, timeout=60).stdout
    assert "<title>Captions of" in shown  # which each of the scripts would change
    assert shown.count("<script") == 1


PREDICTIONS = {
    "brackets 100,000 deep": b"[" * 100_000,
    "lines of brackets": b'{"image_id": 1, "caption": "a"}\n' + b"[" * 100_000,
    "true for an id": b'[{"image_id": true, "caption": "a"}]',
    "no number for an id": b'[{"image_id": NaN, "caption": "a"}]',
    "a list for an id": b'[{"image_id": [1], "caption": "a"}]',
    "an id of 5,000 digits": b'[{"image_id": ' + b"9" * 5000 + b', "caption": "a"}]',
    "an id of 5,000 digits in the second line": b'{"image_id": 1, "caption": "a"}\n{"image_id": ' + b"9" * 5000 + b"}",
    "an id twice": b'[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]',
    "a caption of none": b'[{"image_id": 1, "caption": null}]',
    "captions in a list": b'[{"image_id": 1, "caption": ["a", "b"]}]',
    "Latin-1": b'[{"image_id": 1, "caption": "caf\xe9"}]',
    "NULs": b"\0" * 100,
    "cut off": b'[{"image_id": 1, "capt',
    "a pickle": pickle.dumps(Runs("ran")),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_hostile_caption_file_ends_in_one_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "references.json").write_text('[{"image_id": 1, "captions": ["a dog"]}]')
    (tmp_path / "predictions.json").write_bytes(PREDICTIONS[name])
    with pytest.raises(InputError) as caught:
        eval_captions.evaluate(command_line(predictions="predictions.json", references="references.json"))
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file_name", ["5", "[1]", "{}"])
def test_a_file_name_in_the_references_must_be_text(file_name, tmp_path):
    images = f'[{{"id": 1, "file_name": {file_name}}}]'
    path = tmp_path / "references.json"
    path.write_text(f'{{"images": {images}, "annotations": [{{"image_id": 1, "caption": "a dog"}}]}}')
    with pytest.raises(InputError, match="the file name of image 1 is"):
        eval_captions.evaluate(command_line(predictions=path, references=path))


# ----------------------------------------------------------------------------------------------------------------------
# From the command line
# ----------------------------------------------------------------------------------------------------------------------


DEEP = '{"image": "a.png", "caption": ' + "[" * 50_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, options",
    [
        ("train_hf", {"dataset_name": "rows.jsonl", "output_dir": "out"}),
        ("eval_captions", {"predictions": "rows.jsonl", "references": "rows.jsonl", "report": "out"}),
    ],
)
def test_the_command_line_shows_one_line_without_a_traceback(commands, script, options, tmp_path):
    (tmp_path / "rows.jsonl").write_text(DEEP)
    run = ["python", str(ROOT / f"{script}.py"), *command_line(**options)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=commands.environment())
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
