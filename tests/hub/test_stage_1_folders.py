"""Folders and repositories of stage 1: equal answers after loading, without the package, and with adapters."""

import json
import subprocess
import sys

import jinja2
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from qformer_captioner import QFormerForPretraining
from qformer_captioner.hub.export import export
from qformer_captioner.hub.layout import check_folder

from ..fixtures import tiny
from ..fixtures.travelling_files import files_behind

FORMS = ["referenced", "included", "features", "mixed", "bfloat16"]
REPOSITORIES = ["tester/stage1-by-hand", "tester/stage1-pushed", "tester/stage1-features"]

PUBLISHER = """
from qformer_captioner import QFormerForPretraining
from qformer_captioner.hub.push import publish
for form in ("included", "features"):
    name = {"included": "tester/stage1-by-hand", "features": "tester/stage1-features"}[form]
    QFormerForPretraining.from_pretrained(form).push_to_hub(name)
publish("included", "tester/stage1-pushed")
"""

STRANGER = """
import json, sys, traceback
sys.modules["qformer_captioner"] = None  # hides an installed package
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)
texts, names = json.load(open("stranger.json"))
pictures = [Image.open(f"{number}.png") for number in range(2)]

def is_same(name, form):
    expected = torch.load(f"{form}.pt")
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    images = {"image_embeds": expected["features"]} if "features" in expected else {"images": pictures}
    answers = model.similarity(texts=texts, **images), model.match(texts=texts, **images), model.caption(**images)
    return (
        type(model).__module__.startswith("transformers_modules.")
        and all(torch.equal(mine, other) for mine, other in zip(answers[:2], expected["answers"][:2]))
        and answers[2] == expected["answers"][2]
        and torch.equal(processor(text=texts).input_ids, expected["input_ids"])
    )

findings = {}
for name, form in names.items():
    try:
        findings[name] = is_same(name, form)
    except Exception:
        findings[name] = traceback.format_exc()
json.dump(findings, open("findings.json", "w"))
"""


def model_of(form: str, folder) -> QFormerForPretraining:
    """Return a model of stage 1 with its processor."""
    torch.manual_seed(2)
    dtype = torch.bfloat16 if form in ("mixed", "bfloat16") else torch.float32
    vision = (
        None if form == "features" else tiny.save_vision(folder / f"vision-{dtype}".replace("torch.", ""), dtype=dtype)
    )
    model = QFormerForPretraining.from_backbones(
        vision,
        tiny.text_tokenizer(),
        encoder_hidden_size=tiny.VISION_WIDTH if vision is None else None,
        image_text_hidden_size=20,
        **tiny.QFORMER,
    )
    return model.bfloat16() if form == "bfloat16" else model


def answers(model: QFormerForPretraining, form: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    inputs = {"images": [tiny.picture(0), tiny.picture(1)]}
    if form == "features":
        inputs = {"image_embeds": features()}
    return (
        model.similarity(texts=tiny.CAPTIONS, **inputs),
        model.match(texts=tiny.CAPTIONS, **inputs),
        model.caption(**inputs),
    )


def features() -> torch.Tensor:
    return torch.randn(2, 5, tiny.VISION_WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder with a model of each form, and beside it the answers that it gave before it was saved."""
    root = tmp_path_factory.mktemp("folders")
    for number in range(2):
        tiny.picture(number).save(root / f"{number}.png")
    for form in FORMS:
        model = model_of(form, root)
        expected = {"answers": answers(model, form), "input_ids": model.processor(text=tiny.CAPTIONS).input_ids}
        model.save_pretrained(root / form, include_backbones=form == "included")
        torch.save(expected | ({"features": features()} if form == "features" else {}), root / f"{form}.pt")
    return root


# --- Loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_model_gives_the_same_answers(folders, form, tmp_path):
    similarity, match, captions = torch.load(folders / f"{form}.pt")["answers"]
    model = AutoModel.from_pretrained(folders / form)
    model.save_pretrained(tmp_path)
    for loaded in (model, QFormerForPretraining.from_pretrained(tmp_path)):
        found = answers(loaded, form)
        assert torch.equal(found[0], similarity) and torch.equal(found[1], match) and found[2] == captions
        vision = {"included": torch.float32, "referenced": torch.float32}.get(form, torch.bfloat16)
        assert form == "features" or next(loaded.vision_model.parameters()).dtype == vision
        assert loaded.qformer.dtype == (torch.bfloat16 if form == "bfloat16" else torch.float32)
    assert check_folder(folders / "included") is None and {path.name for path in tmp_path.glob("*.py")} == {
        *files_behind("pretraining_qformer"),
        *files_behind("processing_qformer"),
    }


def test_export_refuses_a_model_of_stage_1_in_one_sentence(folders, tmp_path):
    with pytest.raises(OSError, match="holds a Q-Former in pretraining and not a captioner: load it with") as caught:
        export(folders / "included", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# --- Without the package, and from the Hub ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def findings(folders, hub, commands, tmp_path_factory) -> dict:
    """Return whether a process without the package opens each folder and repository with equal answers."""
    done = commands.run("python", PUBLISHER, folders)
    assert done.returncode == 0, done.stderr[-3000:]
    forms = dict.fromkeys(REPOSITORIES, "included") | {"tester/stage1-features": "features"}
    (folders / "stranger.json").write_text(json.dumps([tiny.CAPTIONS, {form: form for form in FORMS} | forms]))
    environment = hub.environment(tmp_path_factory.mktemp("home")) | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    (folders / "stranger.py").write_text(STRANGER)
    subprocess.run([sys.executable, "stranger.py"], cwd=folders, env=environment, check=True)
    return json.loads((folders / "findings.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMS, *REPOSITORIES])
def test_a_process_without_the_package_gets_the_same_answers(findings, name):
    assert findings[name] is True, findings[name]


@pytest.mark.parametrize(("vision", "shown"), [("vit", '"image.png"'), (None, "image_embeds=features")])
def test_a_card_shows_captions_only_of_a_model_that_has_learned_them(vision, shown):
    for weight in (0.0, 0.5):
        model = tiny.pretraining_model(vision, itg_weight=weight)
        card = jinja2.Template(model.card_template).render(**model.card_facts())
        assert (f"print(model.caption({shown}))\n```" in card) == bool(weight)
        assert card.count("model.similarity(") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", REPOSITORIES)
def test_the_card_of_a_repository_shows_how_to_compare(findings, hub, name):
    card = ModelCard(hub.files["model", name]["README.md"].decode())
    assert f'AutoModel.from_pretrained("{name}", trust_remote_code=True)' in card.text
    assert "model.similarity(" in card.text and "[More Information Needed]" not in card.text
    assert "q-former" in card.data.tags


# --- Adapters ---------------------------------------------------------------------------------------------------------


def test_lora_adapters_on_the_q_former_train_and_load_again(folders, tmp_path):
    base = QFormerForPretraining.from_pretrained(folders / "included")
    targets = r"qformer\..*attention\.(query|value)"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, modules_to_save=["itm_head"])).train()
    inputs = base.processor(images=[tiny.picture(0), tiny.picture(1)], text=tiny.CAPTIONS[:2])
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):  # the second half of an adapter starts at zero
        model(**inputs).loss.backward()
        optimizer.step()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("lora_A" in name for name in reached) and all("lora" in n or "modules_to_save" in n for n in reached)
    expected = answers(model.eval(), "included")
    model.save_pretrained(tmp_path / "adapter")
    plain = torch.load(folders / "included.pt")["answers"]
    assert not torch.allclose(expected[1], plain[1])
    loaded = PeftModel.from_pretrained(
        QFormerForPretraining.from_pretrained(folders / "included"), tmp_path / "adapter"
    )
    opened = [
        open_model(tmp_path / "adapter") for open_model in (AutoModel.from_pretrained, type(base).from_pretrained)
    ]
    for other in (loaded, *opened):
        for mine, theirs in zip(answers(other, "included")[:2], expected[:2], strict=True):
            torch.testing.assert_close(mine, theirs)
