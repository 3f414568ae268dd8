"""Captioners as models of lmms-eval. All tests are skipped without lmms-eval, which the package does not need."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import datasets
import pytest
from transformers import AutoModel

from ..fixtures import tiny

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install lmms-eval")

ROOT = Path(__file__).parents[2]
NUMBER = 5
# Fields of lmms-eval's own task `coco2017_cap_val`, with local data and a metric that needs no Java.
TASK = """
task: tiny_cap_val
dataset_path: parquet
dataset_kwargs:
  data_files: {{val: {data}}}
test_split: val
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "Provide a one-sentence caption for the provided image."
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 6, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}}
process_results: !function utils.process_results
metric_list:
  - metric: same
    aggregation: !function utils.mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, result):
    return {"same": float(result[0] == doc["answer"][0])}


def mean(values):
    return sum(values) / len(values)
"""


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    model = tiny.captioner()
    model.processor.prompt = "a star"
    model.save_pretrained(folder)
    return folder


def expected(captioner: Path, prompt: str | None = None, **generation) -> list[str]:
    model = AutoModel.from_pretrained(captioner)
    return [
        model.caption(tiny.picture(number), prompt, **dict(max_new_tokens=6) | generation) for number in range(NUMBER)
    ]


@pytest.fixture
def make(captioner):
    """Return a function that creates the model and the requests of a task as lmms-eval does."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import MODEL_REGISTRY_V2

    from qformer_captioner.evaluation.lmms_eval import manifest

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    instruction = "Provide a one-sentence caption for the provided image."

    def make(options: str = "", pictures: int = 1, **generation):
        model = MODEL_REGISTRY_V2.get_model_class("qformer_captioner").create_from_arg_string(
            f"pretrained={captioner}{options}", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
        )
        model.task_dict["tiny"] = {"val": list(map(tiny.picture, range(NUMBER)))}
        generation = dict(max_new_tokens=6, temperature=0, top_p=1.0, num_beams=1, do_sample=False) | generation
        requests = [
            Instance(
                request_type="generate_until",
                arguments=(instruction, generation, lambda picture: [picture] * pictures, number, "tiny", "val"),
                idx=0,
                metadata={"task": "tiny", "doc_id": number, "repeats": 1},
            )
            for number in range(NUMBER)
        ]
        return model, requests

    return make


def test_captions_continue_the_captioners_own_prompt(make, captioner):
    model, requests = make()
    assert model.generate_until(requests) == expected(captioner)


def test_captions_continue_a_given_prompt_or_that_of_the_task(make, captioner):
    model, requests = make(",prompt=a red circle")
    assert model.generate_until(requests) == expected(captioner, "a red circle") != expected(captioner)
    model, requests = make(",use_task_prompt=True")
    assert model.generate_until(requests) == expected(captioner, requests[0].args[0]) != expected(captioner)


def test_options_reach_generate_and_stop_strings_end_a_caption(make, captioner):
    model, requests = make(num_beams=3)
    assert model.generate_until(requests) == expected(captioner, num_beams=3)
    model, requests = make(until=[" "])
    assert model.generate_until(requests) == [caption.split(" ")[0] for caption in expected(captioner)]


def test_tasks_of_several_images_are_refused(make):
    model, requests = make(pictures=2)
    with pytest.raises(ValueError, match="needs one image for each caption, but task 'tiny' gives 2"):
        model.generate_until(requests)


@pytest.mark.slow
def test_lmms_eval_finds_and_runs_the_model_by_its_entry_point(captioner, tmp_path):
    """Run a captioning task from the entry point of pyproject.toml and the command line to the scores."""
    (tmp_path / "tasks").mkdir()
    rows = {
        "image": list(map(tiny.picture, range(NUMBER))),
        "question_id": list(range(NUMBER)),
        "answer": [[caption] for caption in expected(captioner)],
    }
    rows["answer"][0] = ["another caption"]
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "data.parquet")
    (tmp_path / "tasks" / "tiny_cap_val.yaml").write_text(TASK.format(data=tmp_path / "data.parquet"))
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)

    # Write the metadata of our entry points as pip does, for a checkout that is not installed.
    metadata = tmp_path / "site" / "qformer_captioner-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: qformer-captioner\nVersion: 0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    (metadata / "entry_points.txt").write_text(
        "[lmms_eval.models]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
    )
    (tmp_path / "site" / "qformer_captioner").symlink_to(ROOT)
    options = ["--model", "qformer_captioner", "--model_args", f"pretrained={captioner}", "--tasks", "tiny_cap_val"]
    options += ["--include_path", tmp_path / "tasks", "--batch_size", "2", "--output_path", tmp_path / "scores"]
    python_path = os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *map(str, options)],
        env=os.environ | {"PYTHONPATH": python_path, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "scores").rglob("*results.json")
    scores = json.loads(results.read_text())["results"]["tiny_cap_val"]
    assert scores["same,none"] == pytest.approx(1 - 1 / NUMBER)


def test_the_tasks_in_our_examples_exist():
    from lmms_eval.tasks import TaskManager

    assert {"coco2017_cap_val", "nocaps_val", "flickr30k_test"} <= set(TaskManager().all_tasks)
