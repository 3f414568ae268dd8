"""The way of a captioner to the Hub and back, over HTTP and with the real client.

`PUBLISHER` is a process that trains and publishes. `STRANGER` is a process without the package, first with an empty
cache and then offline, that loads the repositories. Their findings are fixtures, and each test checks one of them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from qformer_captioner import QFormerCaptioner, QFormerCaptionerProcessor

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.hub_server import Failure, Hub, files_of
from ..fixtures.processes import command_line
from ..fixtures.travelling_files import files_behind

pytestmark = pytest.mark.slow

DECODING = dict(num_beams=2, max_new_tokens=6, min_new_tokens=6)
TOKEN = "hf_test"

PUBLISHER = """
import json, sys
sys.path.insert(0, {root!r})
import tests.conftest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from PIL import Image
from qformer_captioner import QFormerCaptioner, train_hf
from qformer_captioner.common.errors import InputError
from qformer_captioner.common.logging import setup_logging
from qformer_captioner.hub.push import publish

setup_logging()
torch.set_num_threads(1)
decoding, sizes, runs = json.load(open("publisher.json"))
images = [Image.open(f"{{number}}.png") for number in range(2)]
findings = {{"captions": {{}}, "messages": {{}}, "revisions": {{}}}}

def keep_captions(name, model):
    findings["captions"][name] = model.eval().caption(images, **decoding)

def keep_message(name, *args, **kwargs):
    try:
        publish(*args, **kwargs)
    except InputError as error:
        findings["messages"][name] = str(error)

for arguments in runs:
    train_hf.train(arguments)
train_hf.train(runs[0])  # a finished run is only pushed again
keep_captions("tester/trained", QFormerCaptioner.from_pretrained("trained"))
base = QFormerCaptioner.from_pretrained("adapter/base")
keep_captions("tester/adapter-base", base)
keep_captions("tester/adapter", PeftModel.from_pretrained(base, "adapter"))
publish("adapter", "tester/adapter", revision="v1")

model = QFormerCaptioner.from_backbones("vision", "language", **sizes)
torch.nn.init.normal_(model.language_projection.weight, std=0.2)
model.processor.push_to_hub("tester/by-hand")
findings["revisions"]["tester/by-hand"] = model.push_to_hub("tester/by-hand").oid
keep_captions("tester/by-hand", model)
with torch.no_grad():
    model.language_projection.weight.neg_()
model.push_to_hub("tester/by-hand")
keep_captions("tester/by-hand, later", model)
publish("trained", "tester/private", private=True)

keep_message("once", "trained", "tester/once")
keep_message("dropped", "trained", "tester/dropped")
keep_message("lost", "trained", "tester/lost")
with open("trained/captions.png", "ab") as file:
    file.write(b"more")
keep_message("down", "trained", "tester/once", revision="v2")
keep_message("forbidden", "trained", "tester/trained", token="hf_wrong")
keep_message("no name", "trained", "a/b/c")
keep_message("taken", "adapter", "tester/taken")
keep_message("public", "trained", "tester/trained", private=True)
json.dump(findings, open("published.json", "w"))
"""

STRANGER = """
import contextlib, importlib.util, io, json, sys, traceback

sys.modules["qformer_captioner"] = None  # not even where it is installed
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
assert importlib.util.find_spec("modeling_qformer") is None
try:
    import qformer_captioner
except ImportError:
    pass
else:
    raise AssertionError("the package can be imported")
decoding, revisions, usages, offline = json.load(open("stranger.json"))
images = [Image.open(f"{number}.png") for number in range(2)]
trust = dict(trust_remote_code=True)


def captions(model):
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model.eval().caption(images, **decoding)


def loaded(repo, auto_class=AutoModel, **kwargs):
    return lambda: captions(auto_class.from_pretrained(repo, **trust, **kwargs))


def adapter_by_peft():
    from peft import PeftModel

    base = AutoModel.from_pretrained("tester/adapter-base", **trust)
    return PeftModel.from_pretrained(base, "tester/adapter").eval().caption(images, **decoding)


def captions_of_pipeline():
    caption = pipeline(model="tester/trained", **trust)  # the card tells the task
    results = [caption(images=image, text="", return_full_text=False, generate_kwargs=decoding) for image in images]
    return [result[0]["generated_text"].strip() for result in results]


def model_and_processor():
    model = AutoModel.from_pretrained("tester/by-hand", **trust)
    processor = AutoProcessor.from_pretrained("tester/by-hand", **trust)
    ids = model.generate(**processor(images=images, text=["", ""]), **decoding)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def output_of(code):
    def check():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, {})
        return out.getvalue()

    return check


checks = {
    "auto_model": loaded("tester/trained"),
    "image_text_to_text": loaded("tester/trained", AutoModelForImageTextToText),
    "config": lambda: AutoConfig.from_pretrained("tester/trained", **trust).model_type,
    "pinned": loaded("tester/by-hand", revision=revisions["tester/by-hand"]),
    "by_hand": loaded("tester/by-hand"),
    "processor": model_and_processor,
    "adapter": loaded("tester/adapter"),
    "adapter_pinned": loaded(
        "tester/adapter",
        revision=revisions["tester/adapter-base"],
        adapter_kwargs={"revision": revisions["tester/adapter"]},
    ),
    "adapter_at_branch": loaded("tester/adapter", AutoModelForImageTextToText, revision="v1"),
    "adapter_processor": lambda: type(AutoProcessor.from_pretrained("tester/adapter", **trust)).__name__,
    "adapter_base": loaded("tester/adapter-base"),
    "peft": adapter_by_peft,
    "private": loaded("tester/private"),
}
if not offline:
    checks |= {
        "pipeline": captions_of_pipeline,
        "private_without_token": loaded("tester/private", token=False),
        **{f"usage of {repo}": output_of(code) for repo, code in usages.items()},
    }
findings = {}
for name, check in checks.items():
    try:
        with torch.no_grad():
            findings[name] = check()
    except Exception as error:
        findings[name] = f"{type(error).__name__}: {error}" if name.startswith("private_") else traceback.format_exc()
json.dump(findings, open(sys.argv[1], "w"))
"""


def training(name: str, **options) -> list[str]:
    """Return a command line that trains in the folder `name` and pushes to `tester/<name>`."""
    options = {
        "dataset_name": "scenes",
        "max_train_samples": 8,
        "max_eval_samples": 4,
        "vision_model_name_or_path": "org/vision",
        "language_model_name_or_path": "org/language",
        "qformer_config": json.dumps(tiny.QFORMER),
        "output_dir": name,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.001,
        "generation_num_beams": 1,
        "generation_max_length": 6,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "push_to_hub": "true",
        "hub_model_id": f"tester/{name}",
        "hub_always_push": "true",
        "hub_token": TOKEN,
    } | options
    return command_line(**options)


def run(python: str, program: str, folder: Path, environment: dict[str, str], *arguments: str) -> None:
    """Run a program in a folder, and append its output to `output.txt`."""
    file = folder / "program.py"
    file.write_text(program)
    environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}
    run = [python, str(file), *arguments]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    (folder / "output.txt").open("a").write(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("publisher")
    for number in range(2):
        tiny.picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def published(hub, commands, folder) -> dict:
    """Findings of the publisher: captions of its models, messages of failed uploads, and commit hashes."""
    tiny.save_vision(folder / "vision")
    tiny.save_language(folder / "language", max_position_embeddings=256)
    hub.files["model", "org/vision"] = files_of(folder / "vision") | {"README.md": b"---\nlicense: mit\n---\n"}
    hub.files["model", "org/language"] = files_of(folder / "language")
    hub.files["model", "tester/taken-base"] = {"config.json": b"{}", "model.safetensors": b"of another model"}
    hub.failures = [
        Failure("POST .*/tester/once/commit/main", 500),
        Failure("PUT /large.*tester/dropped", "drop"),
        Failure("POST .*/tester/lost/commit", "lose"),
        Failure("POST .*/tester/once/commit/v2", 503, times=9),
        Failure("POST .*/tester/adapter-base/commit/main", 500, times=3),  # all attempts of one save
    ]
    adapter = training("adapter", lora_r=2, vision_model_name_or_path="vision", seed=1, prompt="a blue")
    (folder / "publisher.json").write_text(json.dumps([DECODING, tiny.QFORMER, [training("trained"), adapter]]))
    run("python", PUBLISHER.format(root=str(ROOT)), folder, commands.environment())
    return json.loads((folder / "published.json").read_text())


def usage(hub: Hub, repo: str) -> str:
    card = hub.files["model", repo]["README.md"].decode()
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.fixture(scope="module")
def stranger(hub, published, tmp_path_factory) -> tuple[dict, dict]:
    """Findings of the stranger, first with an empty cache, then offline."""
    folder = tmp_path_factory.mktemp("stranger")
    for number in range(2):
        tiny.picture(number).save(folder / f"{number}.png")
    tiny.picture(0).save(folder / "image.png")
    commits = {repo: hub.commit_sha(("model", repo)) for repo in ("tester/adapter", "tester/adapter-base")}
    revisions = published["revisions"] | commits
    findings = []
    for offline in (False, True):
        repos = ("tester/trained", "tester/adapter", "tester/by-hand")
        usages = {repo: usage(hub, repo) for repo in repos}
        (folder / "stranger.json").write_text(json.dumps([DECODING, revisions, usages, offline]))
        environment = hub.environment(folder / "home") | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        num_requests = len(hub.requests)
        run(sys.executable, STRANGER, folder, environment, f"{offline}.json")
        assert not offline or len(hub.requests) == num_requests
        findings.append(json.loads((folder / f"{offline}.json").read_text()))
    return tuple(findings)


# --- The round trip ---------------------------------------------------------------------------------------------------

LOADS = {
    "auto_model": "tester/trained",
    "image_text_to_text": "tester/trained",
    "pinned": "tester/by-hand",
    "by_hand": "tester/by-hand, later",
    "processor": "tester/by-hand, later",
    "adapter": "tester/adapter",
    "adapter_pinned": "tester/adapter",
    "adapter_at_branch": "tester/adapter",
    "adapter_base": "tester/adapter-base",
    "peft": "tester/adapter",
    "private": "tester/trained",
}


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
@pytest.mark.parametrize("check", LOADS)
def test_a_stranger_gets_the_same_captions(published, stranger, check, offline):
    assert stranger[offline][check] == published["captions"][LOADS[check]]


def test_different_models_and_images_have_different_captions(published):
    captions = published["captions"]
    assert len({tuple(own) for own in captions.values()}) == len(captions)
    assert all(first != second for first, second in captions.values())


def test_a_pipeline_reads_its_task_from_the_card(published, stranger):
    assert stranger[0]["pipeline"] == published["captions"]["tester/trained"]


def test_the_configuration_and_the_processor_of_the_adapter_load(stranger):
    assert stranger[0]["config"] == "qformer_captioner"
    assert stranger[0]["adapter_processor"] == "QFormerCaptionerProcessor"


def test_a_private_repository_needs_a_token(stranger):
    assert "tester/private" in stranger[0]["private_without_token"]
    assert stranger[0]["private_without_token"].startswith("OSError")


@pytest.mark.parametrize("repo", ["tester/trained", "tester/adapter", "tester/by-hand"])
def test_the_usage_example_of_the_card_runs_unchanged(hub, stranger, repo):
    lines = [line for line in usage(hub, repo).splitlines() if line]
    assert len(lines) == 3 and f'"{repo}"' in lines[1]
    out = stranger[0][f"usage of {repo}"]
    assert out.strip() and "Traceback" not in out, out


# --- What is in a repository ------------------------------------------------------------------------------------------

CODE = files_behind("modeling_qformer")
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
CAPTIONER = CODE | PROCESSOR | {"README.md", "config.json", "generation_config.json", "model.safetensors"}
PICTURES = {"captions.png", "loss_curve.png"}


@pytest.mark.parametrize(
    ("repo", "files"),
    [
        ("tester/trained", CAPTIONER | PICTURES),
        ("tester/by-hand", CAPTIONER),
        ("tester/adapter-base", CAPTIONER),
        (
            "tester/adapter",
            PROCESSOR
            | PICTURES
            | {
                "README.md",
                "adapter_config.json",
                "adapter_model.safetensors",
                "cards_qformer.py",
                "encoders_qformer.py",
                "features_qformer.py",
                "images_qformer.py",
                "inputs_qformer.py",
                "processing_qformer.py",
            },
        ),
    ],
)
def test_a_repository_holds_exactly_the_files_that_a_stranger_needs(hub, published, repo, files):
    """It holds neither pickles nor the record of the run."""
    assert set(hub.files["model", repo]) == files


def test_each_save_and_the_end_of_training_are_one_commit(hub, published):
    titles = [title for repo, branch, title in hub.commit_log if repo == ("model", "tester/trained")]
    assert titles == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    bases = [
        title for repo, branch, title in hub.commit_log if repo == ("model", "tester/adapter-base") and branch == "main"
    ]
    assert bases == ["Training in progress, step 4"]  # the first failed; it does not change


def test_a_failed_push_does_not_stop_the_run(published, folder):
    out = (folder / "output.txt").read_text()
    assert "Step 2 was not published: 'tester/adapter-base' could not be published" in out
    assert "is on the Hub as tester/adapter." in out


def test_the_same_command_pushes_a_finished_run_again(published, folder):
    assert (folder / "output.txt").read_text().count("is on the Hub as tester/trained.") == 2


def test_a_push_during_training_has_a_card(hub, published):
    first = next(files for (repo, _), files in hub.snapshots.items() if repo[1] == "tester/trained" and files)
    assert set(first) == CAPTIONER | PICTURES
    assert "has not finished" in first["README.md"].decode()


def test_neither_tokens_nor_local_paths_are_published(hub, published, folder):
    for (_, repo), files in hub.files.items():
        for name, content in files.items():
            if repo.startswith("tester/"):
                assert str(folder).encode() not in content, (repo, name)
            assert TOKEN.encode() not in content, (repo, name)
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name != "publisher.json"]
    assert any(path.name == "trainer_state.json" for path in kept)
    assert not any(path.name == "training_args.bin" for path in kept)  # a pickle
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]
    assert not (folder / "trained" / "push").exists()


def test_the_card_of_a_run_names_its_backbones(hub, published):
    card = ModelCard(hub.files["model", "tester/trained"]["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert card.data.base_model == ["org/vision", "org/language"]
    assert card.data.license is None  # one of the two backbones does not state its licence
    assert {result.metric_type for result in card.data.eval_results} == {"facts", "complete", "objects", "relations"}
    assert hub.commit_sha(("model", "org/vision")) in card.text
    adapter = ModelCard(hub.files["model", "tester/adapter"]["README.md"].decode())
    assert (adapter.data.library_name, adapter.data.base_model) == ("peft", ["tester/adapter-base"])
    assert adapter.data.get("base_model_relation") == "adapter"


# --- When the Hub fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["tester/once", "tester/dropped", "tester/lost"])
def test_a_request_that_fails_once_is_repeated_and_takes_effect_once(hub, published, repo):
    assert repo.split("/")[1] not in published["messages"]
    assert set(hub.files["model", repo]) == CAPTIONER | PICTURES
    assert [title for own, _, title in hub.commit_log if own == ("model", repo)] == ["Upload captioner"]
    assert any(repo in failure.pattern and not failure.times for failure in hub.failures)


def test_a_wrong_name_and_a_wrong_token_get_one_sentence(published):
    assert "'a/b/c' is not a valid repository id" in published["messages"]["no name"]
    assert "The Hub refuses 'tester/trained' (401): log in with `hf auth login`." in published["messages"]["forbidden"]


def test_another_model_under_the_name_of_the_base_is_not_replaced(hub, published):
    assert (
        "would be published as 'tester/taken-base', which already holds another model" in published["messages"]["taken"]
    )
    assert set(hub.files["model", "tester/taken-base"]) == {"config.json", "model.safetensors"}
    assert not hub.files["model", "tester/taken"]


def test_a_push_does_not_make_a_public_repository_private(published):
    assert "'tester/trained' exists already and is public" in published["messages"]["public"]


def test_a_failed_push_does_not_change_the_branch(hub, published):
    assert published["messages"]["down"] == (
        "'tester/once' could not be published (the Hub answered 503); its branch has not changed. Try again later."
    )
    assert hub.branches["model", "tester/once", "v2"] == hub.files["model", "tester/once"]


# --- With the package -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["tester/trained", "tester/adapter"])
def test_a_captioner_is_scored_by_its_hub_id(commands, published, tmp_path, repo):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [{"file_name": f"{number}.png", "caption": "a red circle"} for number in range(2)]
    for number, row in enumerate(rows):
        tiny.picture(number).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": repo, "dataset_name": ".", "split": "train", "output_dir": "scored", "use_cpu": "true"}
    command = ["python", str(ROOT / "eval_captions.py"), *command_line(**options)]
    done = subprocess.run(command, cwd=folder, env=commands.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    weights = json.loads((folder / "scored" / "scores.json").read_text())["weights"]
    assert repo in weights
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in weights.values()), weights
    assert len(json.loads((folder / "scored" / "captions.json").read_text())) == 2


def test_the_installed_package_needs_no_remote_code(tmp_path):
    tiny.captioner().save_pretrained(tmp_path)
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        assert type(auto_class.from_pretrained(tmp_path)) is QFormerCaptioner
    assert type(AutoProcessor.from_pretrained(tmp_path)) is QFormerCaptionerProcessor
