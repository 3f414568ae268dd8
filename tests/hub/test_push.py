"""Checks of a folder before anything is uploaded."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from qformer_captioner import QFormerCaptioner, train_hf
from qformer_captioner.cli import main as cli
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub import push
from qformer_captioner.hub.layout import check_folder
from qformer_captioner.hub.push import collect_files

from ..fixtures import tiny
from ..fixtures.hub_server import Hub
from ..fixtures.processes import command_line


@pytest.fixture
def folder(tmp_path):
    """Folder of a self-contained captioner."""
    tiny.captioner().save_pretrained(tmp_path / "captioner")
    return tmp_path / "captioner"


def test_a_captioner_and_an_adapter_can_be_published(folder, tmp_path):
    assert check_folder(folder) is None
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (adapter / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert check_folder(adapter) == str(folder)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/captioner"}))
    assert check_folder(adapter) == "org/captioner"
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/not/there"}))
    with pytest.raises(InputError, match="belongs to the captioner '/not/there', which does not exist"):
        check_folder(adapter)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b'{"model_type": "bert"}', "holds neither a captioner .* nor an adapter"),
        ("config.json", b"[]", "holds neither a captioner"),
        ("config.json", b"{", "is not valid JSON"),
        ("model.safetensors", None, "missing or damaged"),
        ("model.safetensors", b"half a fi", "missing or damaged"),
        ("run.json", b'{"finished": null}', "has not finished"),
    ],
)
def test_a_folder_without_a_finished_captioner_is_refused(folder, file, content, message):
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_folder(folder)


def test_truncated_weights_are_refused(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match="missing or damaged"):
        check_folder(folder)


def test_a_missing_shard_is_refused(folder):
    QFormerCaptioner.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    assert check_folder(folder) is None
    next(folder.glob("model-00002-of-*")).unlink()
    with pytest.raises(InputError, match="model-00002-of-.* missing or damaged"):
        check_folder(folder)


def test_a_reference_to_a_local_backbone_is_refused(tmp_path):
    vision, language = tiny.save_vision(tmp_path / "vision"), tiny.save_language(tmp_path / "language")
    model = QFormerCaptioner.from_backbones(vision, language, **tiny.QFORMER)
    model.save_pretrained(tmp_path / "captioner")
    with pytest.raises(InputError, match=f"refers to the vision model '{vision}', which only this machine has"):
        check_folder(tmp_path / "captioner")
    model.save_pretrained(tmp_path / "whole", include_backbones=True)
    assert check_folder(tmp_path / "whole") is None
    config = json.loads(collect_files(tmp_path / "whole", "a/b")["config.json"])
    assert config["vision_model_name_or_path"] is config["language_model_name_or_path"] is None
    assert str(tmp_path) not in json.dumps(config)


def test_only_the_files_of_a_captioner_are_published(folder):
    files = set(collect_files(folder, "a/b"))
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "run.json",
        "notes.txt",
        ".env",
        "checkpoint-1/model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert set(collect_files(folder, "a/b")) == files
    assert {"model.safetensors", "modeling_qformer.py", "processor_config.json", "README.md"} <= files


def test_files_are_published_unchanged(folder):
    files = collect_files(folder, "a/b")
    assert load_file(files["model.safetensors"]).keys() == load_file(folder / "model.safetensors").keys()
    for name in ("processor_config.json", "tokenizer_config.json", "generation_config.json"):
        assert json.loads(files[name]) == json.loads((folder / name).read_text())


def test_a_missing_folder_ends_the_command_with_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["qformer-captioner", "push", str(tmp_path / "nothing"), "me/captioner"])
    with pytest.raises(SystemExit, match=f"^error: The folder '{tmp_path / 'nothing'}' does not exist.$"):
        cli.main()


def test_an_unreadable_file_ends_the_command_with_one_line(monkeypatch, tmp_path):
    (tmp_path / "config.json").mkdir()
    monkeypatch.setattr(sys, "argv", ["qformer-captioner", "push", str(tmp_path), "me/captioner"])
    with pytest.raises(SystemExit, match="^error: [^\n]*config.json"):
        cli.main()


def test_help_shows_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qformer-captioner", "push", "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "qformer-captioner push outputs/own_images somebody/my-captioner" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_strategy": "checkpoint"}, "--hub_strategy checkpoint would publish .* pickles"),
        ({"include_backbones": "false"}, "leaves out backbones that only this machine has"),
    ],
)
def test_a_run_that_could_not_be_published_does_not_start(tmp_path, options, message):
    options = {
        "dataset_name": "scenes",
        "max_train_samples": 4,
        "max_eval_samples": 4,
        "vision_model_name_or_path": tiny.save_vision(tmp_path / "vision"),
        "language_model_name_or_path": tiny.save_language(tmp_path / "language"),
        "qformer_config": json.dumps(tiny.QFORMER),
        "output_dir": tmp_path / "run",
        "use_cpu": "true",
        "push_to_hub": "true",
    } | options
    with pytest.raises(InputError, match=message):
        train_hf.train(command_line(**options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", b"{", "is not valid JSON"),
        ("run.json", b"[]", "has not finished"),
        ("card.json", b"{", "cannot be used"),
        ("card.json", b"{}", "cannot be used"),
        ("README.md", b"---\n: : [\n---\nMine.\n", "cannot be used"),
        ("model.safetensors.index.json", b"{}", "is not an index of weights"),
        ("model.safetensors.index.json", b'{"weight_map": [1]}', "is not an index of weights"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "../canary.safetensors"}}',
            "is not an index of weights",
        ),
        ("processor_config.json", None, "nobody could use it"),
        ("modeling_qformer.py", None, "nobody could use it"),
    ],
)
def test_a_damaged_folder_gets_one_sentence(folder, file, content, message, monkeypatch):
    monkeypatch.setattr(push, "open_repository", lambda repo_id, *_: repo_id)
    monkeypatch.setattr(push, "_commit", lambda *_: pytest.fail("published"))
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        push.publish(folder, "me/captioner", license="mit")


def test_unknown_backbones_and_an_adapter_on_itself_get_one_sentence(folder):
    config = json.loads((folder / "config.json").read_text())
    for referenced in (["evil"], 7):
        (folder / "config.json").write_text(json.dumps(config | {"referenced_backbones": referenced}))
        with pytest.raises(InputError):
            push.publish(folder, "me/captioner")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (folder / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError):
        push.publish(folder, "me/captioner")


@pytest.mark.parametrize("error", [RuntimeError("Error while uploading 'model.safetensors' to the Hub."), OSError("x")])
def test_a_failed_upload_is_repeated_and_then_reported(error, monkeypatch):
    """huggingface_hub raises a `RuntimeError` if a large file does not arrive."""
    monkeypatch.setattr(push, "RETRY_DELAYS", (0, 0))
    attempts = []

    def request():
        attempts.append(1)
        raise error

    with pytest.raises(
        InputError, match=f"'me/captioner' could not be published .{error}.; its branch has not changed"
    ):
        push._call_hub(request, "me/captioner")
    assert len(attempts) == 3


@pytest.mark.slow
def test_pushing_imports_neither_peft_nor_bitsandbytes_nor_datasets(folder, tmp_path):
    program = (
        "import sys; from qformer_captioner.hub.push import publish; print(publish(sys.argv[1], 'captioner')); "
        "print({'peft', 'bitsandbytes', 'datasets', 'evaluate'} & {*sys.modules})"
    )
    with Hub() as hub:
        command = [sys.executable, "-c", program, str(folder)]
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["tester/captioner", "set()"], done.stderr
    assert "gemm" not in done.stderr
