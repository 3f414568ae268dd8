r"""Captioners as models of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which discovers this module.

    pip install lmms-eval qformer-captioner
    python -m lmms_eval --model qformer_captioner --model_args pretrained=USER/CAPTIONER \
        --tasks coco2017_cap_val,nocaps_val,flickr30k_test --batch_size 32 --gen_kwargs num_beams=5

Captions continue the captioner's own prompt, or another prompt: `--model_args pretrained=...,prompt=A photo of`. Tasks
have instructions such as "Provide a one-sentence caption for the provided image." Captioners that were trained on
instructions can use them with `use_task_prompt=True`.
"""

import json
from collections.abc import Callable
from itertools import groupby
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from ..common.onednn import onednn_linears


def manifest() -> ModelManifest:
    """Return the manifest of the model, for the entry point `lmms_eval.models`."""
    return ModelManifest("qformer_captioner", simple_class_path=f"{__name__}.{Captioner.__name__}")


class Captioner(lmms):
    """Captioner, or adapter on a captioner, as a model of lmms-eval.

    Args:
        pretrained: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        prompt: text that captions continue. The default is the captioner's own prompt.
        use_task_prompt: let captions continue the instruction of the task instead.
        batch_size: number of images in a batch of each process.
        max_batch_size: ignored; lmms-eval passes it to every model.
        device: ignored; every process uses its own device.

    Raises:
        InputError: if the captioner cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        prompt: str | None = None,
        use_task_prompt: bool = False,
        batch_size: int = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        from ..hub.load import load_captioner  # here, because lmms-eval imports this module even for other models

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._model = load_captioner(pretrained, revision, device=self.accelerator.device)
        self.prompt, self.use_task_prompt, self.batch_size = prompt, use_task_prompt, int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Caption the image of each request.

        Args:
            requests: requests of a task. Each has an instruction, arguments of `generate`, a function that returns the
                images of a document, and the document's id, task and split.

        Returns:
            The captions, in the order of the requests.

        Raises:
            ValueError: for a request with no image or with several images.
        """
        captions = []
        progress = tqdm(total=len(requests), desc="captions", disable=self.rank != 0)
        for options, group in groupby(requests, key=lambda request: json.dumps(request.args[1], sort_keys=True)):
            stop_strings, generation = _generation_arguments(json.loads(options))
            same_options = list(group)
            for start in range(0, len(same_options), self.batch_size):
                batch = same_options[start : start + self.batch_size]
                for request, caption in zip(batch, self._caption(batch, generation), strict=True):
                    for stop_string in stop_strings:
                        caption = caption.split(stop_string)[0]
                    self.cache_hook.add_partial("generate_until", request.args[:2], caption)
                    captions.append(caption)
                progress.update(len(batch))
        progress.close()
        return captions

    def _caption(self, requests: list[Instance], generation: dict[str, Any]) -> str | list[str]:
        images = [self._image(*request.args[2:]) for request in requests]
        if self.use_task_prompt:
            prompts = [request.args[0] for request in requests]
        else:
            prompts = [self.prompt or ""] * len(requests)
        with onednn_linears(self._model.device):
            return self._model.caption(images, prompts, **generation)

    def _image(self, doc_to_visual: Callable[[Any], list[Image.Image]], doc_id: int, task: str, split: str):
        images = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(images) != 1:
            raise ValueError(f"A captioner needs one image for each caption, but task {task!r} gives {len(images)}.")
        return images[0]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse tasks that compare likelihoods."""
        raise NotImplementedError("A captioner generates text: it cannot run tasks that ask for likelihoods.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks with several rounds."""
        raise NotImplementedError("A captioner generates one caption: it cannot run tasks of several rounds.")


def _generation_arguments(options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the strings that end a caption, and the arguments of `generate`.

    Tasks give arguments of sampling even if they do not sample. These are left out, because transformers warns about
    them.

    Args:
        options: the generation arguments of a task.
    """
    stop_strings = options.pop("until", [])
    if not options.get("do_sample"):
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
    return [stop_strings] if isinstance(stop_strings, str) else stop_strings, options
