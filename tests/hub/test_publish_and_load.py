"""From here to the Hub and back, over HTTP and with its real client.

One process with the package trains and pushes (`PUBLISHER`), another without it and with an empty cache loads by
repository (`STRANGER`), a third the same from the cache alone. What they find are fixtures; each test states one
property of it.
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
from qformer_captioner.captioning import InputError
from qformer_captioner.hub.push import publish

torch.set_num_threads(1)
decoding, sizes, runs = json.load(open("publisher.json"))
pictures = [Image.open(f"{{number}}.png") for number in range(2)]
found = {{"captions": {{}}, "messages": {{}}, "revisions": {{}}}}

def keep(name, model):
    found["captions"][name] = model.eval().caption(pictures, **decoding)

def attempt(name, *args, **kwargs):
    try:
        publish(*args, **kwargs)
    except InputError as error:
        found["messages"][name] = str(error)

for words in runs:
    train_hf.train(words)
train_hf.train(runs[0])  # once more: it is finished, and pushed again
keep("tester/trained", QFormerCaptioner.from_pretrained("trained"))
base = QFormerCaptioner.from_pretrained("adapter/base")
keep("tester/adapter-base", base)
keep("tester/adapter", PeftModel.from_pretrained(base, "adapter"))
publish("adapter", "tester/adapter", revision="v1")

model = QFormerCaptioner.from_backbones("vision", "language", **sizes)
torch.nn.init.normal_(model.language_projection.weight, std=0.2)
model.processor.push_to_hub("tester/by-hand")
found["revisions"]["tester/by-hand"] = model.push_to_hub("tester/by-hand").oid
keep("tester/by-hand", model)
with torch.no_grad():
    model.language_projection.weight.neg_()
model.push_to_hub("tester/by-hand")
keep("tester/by-hand, later", model)
publish("trained", "tester/private", private=True)

attempt("once", "trained", "tester/once")
attempt("dropped", "trained", "tester/dropped")
attempt("lost", "trained", "tester/lost")
with open("trained/captions.png", "ab") as file:
    file.write(b"more")
attempt("down", "trained", "tester/once", revision="v2")
attempt("forbidden", "trained", "tester/trained", token="hf_wrong")
attempt("no name", "trained", "a/b/c")
attempt("taken", "adapter", "tester/taken")
attempt("public", "trained", "tester/trained", private=True)
json.dump(found, open("published.json", "w"))
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
pictures = [Image.open(f"{number}.png") for number in range(2)]
trust = dict(trust_remote_code=True)


def captions(model):
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model.eval().caption(pictures, **decoding)


def loaded(repo, auto_class=AutoModel, **kwargs):
    return lambda: captions(auto_class.from_pretrained(repo, **trust, **kwargs))


def peft():
    from peft import PeftModel

    base = AutoModel.from_pretrained("tester/adapter-base", **trust)
    return captions_of_peft(PeftModel.from_pretrained(base, "tester/adapter"))


def captions_of_peft(model):
    return model.eval().caption(pictures, **decoding)


def piped():
    caption = pipeline(model="tester/trained", **trust)  # which task it is stands in the card
    results = [caption(images=each, text="", return_full_text=False, generate_kwargs=decoding) for each in pictures]
    return [result[0]["generated_text"].strip() for result in results]


def in_two_parts():
    model = AutoModel.from_pretrained("tester/by-hand", **trust)
    processor = AutoProcessor.from_pretrained("tester/by-hand", **trust)
    ids = model.generate(**processor(images=pictures, text=["", ""]), **decoding)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def used(code):
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
    "processor": in_two_parts,
    "adapter": loaded("tester/adapter"),
    "adapter_pinned": loaded(
        "tester/adapter",
        revision=revisions["tester/adapter-base"],
        adapter_kwargs={"revision": revisions["tester/adapter"]},
    ),
    "adapter_at_branch": loaded("tester/adapter", AutoModelForImageTextToText, revision="v1"),
    "adapter_processor": lambda: type(AutoProcessor.from_pretrained("tester/adapter", **trust)).__name__,
    "adapter_base": loaded("tester/adapter-base"),
    "peft": peft,
    "private": loaded("tester/private"),
}
if not offline:
    checks |= {
        "pipeline": piped,
        "private_without_token": loaded("tester/private", token=False),
        **{f"usage of {repo}": used(code) for repo, code in usages.items()},
    }
found = {}
for name, check in checks.items():
    try:
        with torch.no_grad():
            found[name] = check()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}" if name.startswith("private_") else traceback.format_exc()
json.dump(found, open(sys.argv[1], "w"))
"""


def training(name: str, **options) -> list[str]:
    """A command line that trains and pushes `tester/<name>`, its folder being `name`."""
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


def run(program: str, folder: Path, environment: dict[str, str], *words: str) -> None:
    file = folder / "program.py"
    file.write_text(program)
    environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(file), *words]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    (folder / "output.txt").open("a").write(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("publisher")
    for number in range(2):
        tiny.picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def published(hub, folder) -> dict:
    """What the publisher's models caption, what it was told where a push failed, and commits."""
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
        Failure("POST .*/tester/adapter-base/commit/main", 500, times=3),  # of all that one save tries
    ]
    adapter = training("adapter", lora_r=2, vision_model_name_or_path="vision", seed=1, prompt="a blue")
    (folder / "publisher.json").write_text(json.dumps([DECODING, tiny.QFORMER, [training("trained"), adapter]]))
    run(PUBLISHER.format(root=str(ROOT)), folder, hub.environment(folder / "home"))
    return json.loads((folder / "published.json").read_text())


def usage(hub: Hub, repo: str) -> str:
    card = hub.files["model", repo]["README.md"].decode()
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.fixture(scope="module")
def stranger(hub, published, tmp_path_factory) -> tuple[dict, dict]:
    """What another makes of the repositories, first with an empty cache, then offline."""
    folder = tmp_path_factory.mktemp("stranger")
    for number in range(2):
        tiny.picture(number).save(folder / f"{number}.png")
    tiny.picture(0).save(folder / "image.png")
    commits = {repo: hub.commit_sha(("model", repo)) for repo in ("tester/adapter", "tester/adapter-base")}
    revisions = published["revisions"] | commits
    found = []
    for offline in (False, True):
        repos = ("tester/trained", "tester/adapter", "tester/by-hand")
        usages = {repo: usage(hub, repo) for repo in repos}
        (folder / "stranger.json").write_text(json.dumps([DECODING, revisions, usages, offline]))
        environment = hub.environment(folder / "home") | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        asked = len(hub.requests)
        run(STRANGER, folder, environment, f"{offline}.json")
        assert not offline or len(hub.requests) == asked
        found.append(json.loads((folder / f"{offline}.json").read_text()))
    return tuple(found)


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


def test_the_captions_are_worth_comparing(published):
    captions = published["captions"]
    assert len({tuple(own) for own in captions.values()}) == len(captions)
    assert all(first != second for first, second in captions.values())


def test_a_pipeline_knows_its_task_from_the_card(published, stranger):
    assert stranger[0]["pipeline"] == published["captions"]["tester/trained"]


def test_configuration_and_the_adapters_processor_load(stranger):
    assert stranger[0]["config"] == "qformer_captioner"
    assert stranger[0]["adapter_processor"] == "QFormerCaptionerProcessor"


def test_a_private_repository_wants_a_token(stranger):
    assert "tester/private" in stranger[0]["private_without_token"]
    assert stranger[0]["private_without_token"].startswith("OSError")


@pytest.mark.parametrize("repo", ["tester/trained", "tester/adapter", "tester/by-hand"])
def test_the_three_lines_of_usage_run_as_they_stand(hub, stranger, repo):
    lines = [line for line in usage(hub, repo).splitlines() if line]
    assert len(lines) == 3 and f'"{repo}"' in lines[1]
    out = stranger[0][f"usage of {repo}"]
    assert out.strip() and "Traceback" not in out, out


# --- What is in a repository ------------------------------------------------------------------------------------------

CODE = {f"{name}_qformer.py" for name in ("backbones", "configuration", "language", "modeling", "processing", "saving")}
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
            | {"README.md", "adapter_config.json", "adapter_model.safetensors", "processing_qformer.py"},
        ),
    ],
)
def test_a_repository_holds_what_a_stranger_needs_and_nothing_else(hub, published, repo, files):
    """No pickle, no record of the run."""
    assert set(hub.files["model", repo]) == files


def test_each_save_and_the_end_is_one_commit(hub, published):
    titles = [title for repo, branch, title in hub.commit_log if repo == ("model", "tester/trained")]
    assert titles == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    bases = [
        title for repo, branch, title in hub.commit_log if repo == ("model", "tester/adapter-base") and branch == "main"
    ]
    assert bases == ["Training in progress, step 4"]  # the first failed; it does not change


def test_a_save_that_cannot_be_pushed_does_not_stop_the_run(published, folder):
    out = (folder / "output.txt").read_text()
    assert "Step 2 is not on the Hub: 'tester/adapter-base' could not be published" in out
    assert "It is on the Hub as tester/adapter." in out


def test_the_same_command_pushes_a_finished_run_again(published, folder):
    assert (folder / "output.txt").read_text().count("It is on the Hub as tester/trained.") == 2


def test_an_unfinished_captioner_has_a_card_and_loads(hub, published):
    first = next(files for (repo, _), files in hub.snapshots.items() if repo[1] == "tester/trained" and files)
    assert set(first) == CAPTIONER | PICTURES
    assert "has not finished yet" in first["README.md"].decode()


def test_no_token_and_no_path_of_this_machine_leaves_it(hub, published, folder):
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


def test_the_card_of_a_run_names_its_origins(hub, published):
    card = ModelCard(hub.files["model", "tester/trained"]["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert card.data.base_model == ["org/vision", "org/language"]
    assert card.data.license is None  # of two backbones one does not say
    assert {result.metric_type for result in card.data.eval_results} == {"facts", "complete", "objects", "relations"}
    assert hub.commit_sha(("model", "org/vision")) in card.text
    adapter = ModelCard(hub.files["model", "tester/adapter"]["README.md"].decode())
    assert (adapter.data.library_name, adapter.data.base_model) == ("peft", ["tester/adapter-base"])
    assert adapter.data.get("base_model_relation") == "adapter"


# --- When the Hub fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["tester/once", "tester/dropped", "tester/lost"])
def test_what_fails_once_is_tried_again_and_done_once(hub, published, repo):
    assert repo.split("/")[1] not in published["messages"]
    assert set(hub.files["model", repo]) == CAPTIONER | PICTURES
    assert [title for own, _, title in hub.commit_log if own == ("model", repo)] == ["Upload captioner"]
    assert any(repo in failure.pattern and not failure.times for failure in hub.failures)


def test_a_wrong_name_and_a_wrong_token_are_one_sentence(published):
    assert "'a/b/c' is not a valid repository id" in published["messages"]["no name"]
    assert "The Hub refuses 'tester/trained' (401): log in with `hf auth login`." in published["messages"]["forbidden"]


def test_another_model_by_the_name_of_the_base_stays(hub, published):
    assert (
        "would be published as 'tester/taken-base', which already holds another model" in published["messages"]["taken"]
    )
    assert set(hub.files["model", "tester/taken-base"]) == {"config.json", "model.safetensors"}
    assert not hub.files["model", "tester/taken"]


def test_what_everybody_sees_does_not_become_private_by_a_push(published):
    assert "'tester/trained' exists already and is public" in published["messages"]["public"]


def test_a_hub_that_is_down_leaves_the_branch_as_it_was(hub, published):
    assert published["messages"]["down"] == (
        "'tester/once' could not be published (the Hub answered 503); its branch has not changed. Try again later."
    )
    assert hub.branches["model", "tester/once", "v2"] == hub.files["model", "tester/once"]


# --- With the package -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["tester/trained", "tester/adapter"])
def test_a_captioner_is_scored_by_its_name_on_the_hub(hub, published, tmp_path, repo):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [{"file_name": f"{number}.png", "caption": "a red circle"} for number in range(2)]
    for number, row in enumerate(rows):
        tiny.picture(number).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": repo, "dataset_name": ".", "split": "train", "output_dir": "scored", "use_cpu": "true"}
    command = [sys.executable, str(ROOT / "eval_captions.py"), *command_line(**options)]
    done = subprocess.run(command, cwd=folder, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    weights = json.loads((folder / "scored" / "scores.json").read_text())["weights"]
    assert repo in weights
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in weights.values()), weights
    assert len(json.loads((folder / "scored" / "captions.json").read_text())) == 2


def test_installed_our_classes_serve_without_remote_code(tmp_path):
    tiny.captioner().save_pretrained(tmp_path)
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        assert type(auto_class.from_pretrained(tmp_path)) is QFormerCaptioner
    assert type(AutoProcessor.from_pretrained(tmp_path)) is QFormerCaptionerProcessor
