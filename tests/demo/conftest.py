"""A captioner for the demo, and an environment without a network."""

from pathlib import Path

import pytest

from ..fixtures import tiny


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Set the environment of a machine without a network, with temporary folders for gradio and Hugging Face."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MODEL_ID", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder of a captioner with an example image, and a text file among the examples."""
    folder = tmp_path_factory.mktemp("captioner")
    model = tiny.captioner()
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(folder)
    (folder / "examples").mkdir()
    tiny.picture(7).save(folder / "examples" / "seven.png")
    (folder / "examples" / "text.png").write_text("text")
    return folder
