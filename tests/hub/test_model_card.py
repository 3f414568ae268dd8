"""Model cards: their content, the check by the Hub, and the escaping of text."""

import html
import json
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from qformer_captioner import train_hf
from qformer_captioner.hub.model_card import card_for_hub, escape, render_card, write_card
from qformer_captioner.training.run_facts import describe_options, describe_parts

from ..fixtures import tiny
from ..fixtures.hub_server import check_card, front_matter
from ..fixtures.processes import command_line

HOSTILE = (
    "a | <script>y</script> ![x](javascript:1) [x](http://x) `x` **x** $x$ \n---\n# x\r\x00\x1b[2J\u202e: 'x' &lt;"
)


def facts(**changes) -> dict:
    """Return the facts of a run with backbones and a data set of the Hub."""
    part = {"revision": "0" * 40, "trained": 0, "dtype": "float32", "on_hub": True}
    data = {"name": "org/data", "on_hub": True, "revision": "1" * 40, "split": "train"}
    return {
        "model": "somebody/captioner",
        "parts": [
            part | {"name": "vision_model", "source": "org/vision", "total": 1000},
            part | {"name": "qformer", "source": "", "on_hub": False, "revision": None, "total": 200, "trained": 200},
        ],
        "data": [data | {"config": None, "rows": 10, "columns": ["image", "caption"]}],
        "options": {"learning_rate": "0.001"},
        "hardware": "2 CPU cores",
        "versions": {"torch": "2.13.0"},
        "training": {"steps": 8, "epochs": 2.0, "seconds": 90.0, "resumed": False},
        "evaluation": data
        | {"split": "test", "images": 4, "references": 20, "references_sha256": "ab" * 32}
        | {"prompt": "a photo of", "num_beams": 3, "max_new_tokens": 30},
        "scores": [{"type": "cider", "name": "CIDEr", "value": 57.321, "shuffled": 1.5}],
        "losses": {"matched": 2.5, "shuffled": 3.5},
        "step": 4,
        "chosen": "cider",
    } | changes


def rows(card: str) -> list[list[str]]:
    """Return the cells of the tables of a card."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_hub_accepts_the_metadata():
    text = render_card(facts())
    assert check_card(text)[0] == 200
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert (data.base_model, data.datasets) == (["org/vision"], ["org/data"])
    assert {"image-captioning", "q-former"} <= set(data.tags)
    (result,) = data.eval_results  # as huggingface_hub reads the model-index back
    assert (result.metric_type, result.metric_value) == ("cider", 57.32)
    assert (result.dataset_type, result.dataset_split, result.dataset_revision) == ("org/data", "test", "1" * 40)
    assert result.dataset_args == {
        "prompt": "a photo of",
        "num_beams": 3,
        "max_new_tokens": 30,
        "images": 4,
        "references": 20,
        "references_sha256": "ab" * 32,
    }


@pytest.mark.slow
def test_rendering_a_card_imports_neither_torch_nor_peft_nor_datasets():
    program = (
        "import json, sys; from qformer_captioner.hub.model_card import render_card; "
        "render_card(json.loads(sys.argv[1])); print({'torch', 'peft', 'datasets', 'bitsandbytes'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program, json.dumps(facts())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_tables_show_parts_options_and_scores():
    cells = rows(render_card(facts()))
    assert ["qformer", "", "200", "200", "float32"] in cells
    assert ["**all**", "", "1,200", "200", ""] in cells
    assert ["CIDEr", "57.32", "1.50"] in cells
    assert ["loss (nats per token)", "2.5000", "3.5000"] in cells
    assert ["learning\\_rate", "0.001"] in cells
    assert ["prompt", "a photo of"] in cells
    assert ["weights", "after step 4, chosen by the best cider on this data set"] in cells


def test_a_card_shows_the_pictures_that_exist(tmp_path):
    write_card(tmp_path, facts())
    assert "![" not in (tmp_path / "README.md").read_text()
    (tmp_path / "captions.png").touch()
    write_card(tmp_path, facts())
    assert (tmp_path / "README.md").read_text().count("](captions.png)") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"model": f"somebody/{HOSTILE}"},
        {"options": {HOSTILE: HOSTILE}},
        {"hardware": HOSTILE},
        {"versions": {"torch": HOSTILE}},
        {"evaluation": facts()["evaluation"] | {"prompt": HOSTILE, "split": HOSTILE, "name": HOSTILE, "on_hub": False}},
        {"data": [facts()["data"][0] | dict.fromkeys(("name", "config", "split"), HOSTILE) | {"on_hub": False}]},
        {"data": [facts()["data"][0] | {"columns": [HOSTILE]}]},
        {"parts": [facts()["parts"][0] | {"source": HOSTILE, "on_hub": False}, facts()["parts"][1]]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_text_from_data_and_names_cannot_become_markup(changes):
    card = render_card(facts(**changes))
    ordinary = render_card(facts())
    assert check_card(card)[0] == 200
    assert front_matter(card)["library_name"] == "transformers"
    text = ModelCard(card).text
    assert "<" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", card)
    assert [len(row) for row in rows(text)] == [len(row) for row in rows(ModelCard(ordinary).text)]
    assert re.findall(r"^#+ ", text, re.MULTILINE) == re.findall(r"^#+ ", ModelCard(ordinary).text, re.MULTILINE)
    links = re.findall(r"(?<!\\)\]\((.*?)\)", text)
    assert all(link.startswith("https://huggingface.co/") for link in links)


def test_escaped_text_renders_as_the_original():
    plain = re.sub(r"\\(.)", r"\1", escape("5 < 6 | *x* _y_ [z](w) `c`"))
    assert html.unescape(plain) == "5 < 6 | *x* _y_ [z](w) `c`"


def test_options_show_neither_folders_nor_tokens(tmp_path):
    options = {"dataset_name": [str(tmp_path / "photos")], "hub_token": "hf_x", "output_dir": "out", "seed": 3}
    assert describe_options(options) == {"dataset_name": "photos", "seed": "3"}


def test_parameters_of_an_adapter_are_counted_once():
    model = tiny.captioner()
    whole = {part["name"]: part["total"] for part in describe_parts(model)}
    target = r"language_model\..*\.q_proj"
    config = LoraConfig(r=2, target_modules=target, modules_to_save=["qformer", "language_projection"])
    parts = {part["name"]: part for part in describe_parts(get_peft_model(model, config))}
    assert {name: part["total"] for name, part in parts.items() if name != "language_model"} == {
        name: total for name, total in whole.items() if name != "language_model"
    }
    added = parts["language_model"]["total"] - whole["language_model"]
    assert parts["language_model"]["trained"] == added == 2 * 2 * (tiny.TEXT_WIDTH + tiny.TEXT_WIDTH)
    assert (parts["qformer"]["trained"], parts["vision_model"]["trained"]) == (whole["qformer"], 0)


# --- For a repository -------------------------------------------------------------------------------------------------


def test_the_usage_example_loads_the_repository(tmp_path):
    write_card(tmp_path, facts(parts=[]))
    card = card_for_hub(tmp_path, "other/name")
    assert 'from_pretrained("other/name"' in card and "somebody" not in card


def test_a_card_that_somebody_changed_is_kept(tmp_path):
    write_card(tmp_path, facts(parts=[]))
    (tmp_path / "README.md").write_text(mine := "---\nlicense: mit\n---\nMine.\n")
    assert card_for_hub(tmp_path, "other/name") == mine
    assert ModelCard(card_for_hub(tmp_path, "other/name", license="apache-2.0")).data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("licenses", "license"),
    [
        ({"org/vision": "mit", "org/language": "mit"}, "mit"),
        ({"org/vision": "mit", "org/language": "apache-2.0"}, ["apache-2.0", "mit"]),
        ({"org/vision": "mit", "org/language": None}, None),
        ({"somebody/captioner": "mit"}, "mit"),
    ],
)
def test_the_licence_is_stated_if_those_of_all_backbones_are_known(licenses, license):
    assert ModelCard(render_card(facts(licenses=licenses))).data.license == license


def test_the_card_of_a_base_links_to_its_adapter(tmp_path):
    write_card(tmp_path, facts(parts=[]))
    assert "adapter [me/lora](https://huggingface.co/me/lora)" in card_for_hub(
        tmp_path, "me/lora-base", adapter_id="me/lora"
    )


def test_a_folder_without_a_run_gets_a_card_of_its_parts(tmp_path):
    model = tiny.captioner()
    model.save_pretrained(tmp_path)
    card = card_for_hub(tmp_path, "somebody/captioner", license="mit")
    assert check_card(card)[0] == 200 and ModelCard(card).data.license == "mit"
    size = sum(parameter.numel() for parameter in model.qformer.parameters())
    assert ["qformer", "", f"{size:,}", "", "float32"] in rows(card)


@pytest.mark.slow
def test_a_run_writes_a_card_with_its_own_scores(tmp_path):
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    options = {
        "dataset_name": "scenes",
        "max_train_samples": 8,
        "max_eval_samples": 4,
        "vision_config": json.dumps({"model_type": "vit", "image_size": 16, "hidden_size": 8, **small}),
        "text_config": json.dumps({"model_type": "llama", "hidden_size": 8, **small}),
        "qformer_config": json.dumps(tiny.QFORMER),
        "output_dir": tmp_path / "run",
        "num_train_epochs": 2,
        "generation_max_length": 4,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "prompt": "a <photo> of",
    }
    train_hf.train(command_line(**options))
    card = (tmp_path / "run" / "README.md").read_text()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    best = next(entry for entry in state["log_history"] if entry["step"] == state["best_global_step"])
    losses = [f"{best[key]:.4f}" for key in ("eval_loss", "eval_loss_shuffled")]
    cells = rows(card)
    assert ["loss (nats per token)", *losses] in cells
    assert ["prompt", "a &lt;photo&gt; of"] in cells
    assert ["reference captions", "20"] in cells
    assert {"captions.png", "loss_curve.png"} == set(re.findall(r"\]\((\w+\.png)\)", card))
    assert str(tmp_path) not in card and "output" not in card


def test_options_show_no_paths():
    options = {"dataset_name": ["../clients/acme/*.tar", "org/data"], "prompt": "a/b c"}
    shown = describe_options(options | {"image_folder": ["../gone/acme"]})
    assert shown == {"dataset_name": "*.tar, org/data", "image_folder": "acme", "prompt": "a/b c"}
