r"""Captioners in lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), which finds this by itself.

    pip install lmms-eval qformer-captioner
    python -m lmms_eval --model qformer_captioner --model_args pretrained=USER/CAPTIONER \
        --tasks coco2017_cap_val,nocaps_val,flickr30k_test --batch_size 32 --gen_kwargs num_beams=5

Captions follow the captioner's own prompt, or `--model_args pretrained=...,prompt=A photo of`. What a task says to its
models (such as "Provide a one-sentence caption for the provided image.") is for those that were trained on
instructions: with `use_task_prompt=True`.
"""

import json
from itertools import groupby

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm


def manifest() -> ModelManifest:
    """What lmms-eval's entry points `lmms_eval.models` ask for."""
    return ModelManifest("qformer_captioner", simple_class_path=f"{__name__}.{Captioner.__name__}")


class Captioner(lmms):
    """A captioner, or an adapter on one, as a model of lmms-eval.

    Args:
        pretrained: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        prompt: text that captions follow; by default the captioner's own.
        use_task_prompt: let captions follow what the task says instead.
        batch_size: images at a time, of each process.
        max_batch_size, device: lmms-eval gives these, too. The device is each process's own.
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
        # lmms-eval imports this file whenever it starts, whatever model it is to run.
        from ..hub.load import load_captioner

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._model = load_captioner(pretrained, revision).to(self.accelerator.device)
        self.prompt, self.use_task_prompt, self.batch_size = prompt, use_task_prompt, int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Caption the image of each request.

        Raises:
            ValueError: for a task whose questions are about no image, or about several.
        """
        captions = []
        progress = tqdm(total=len(requests), desc="captions", disable=self.rank != 0)
        for options, group in groupby(requests, key=lambda request: json.dumps(request.args[1], sort_keys=True)):
            stops, options = _generation_options(json.loads(options))
            group = list(group)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                said = [request.args[0] for request in batch]
                prompts = said if self.use_task_prompt else [self.prompt or ""] * len(batch)
                pictures = [self._picture(*request.args[2:]) for request in batch]
                for request, caption in zip(batch, self._model.caption(pictures, prompts, **options), strict=True):
                    for stop in stops:
                        caption = caption.split(stop)[0]
                    self.cache_hook.add_partial("generate_until", request.args[:2], caption)
                    captions.append(caption)
                progress.update(len(batch))
        progress.close()
        return captions

    def _picture(self, doc_to_visual, doc_id, task, split):
        pictures = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(pictures) != 1:
            raise ValueError(f"A captioner looks at one image, but task {task!r} shows {len(pictures)} at a time.")
        return pictures[0]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("A captioner writes: it takes no task that asks for likelihoods.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("A captioner writes once: it takes no task of several rounds.")


def _generation_options(asked: dict) -> tuple[list[str], dict]:
    """What ends a caption, and what remains for `generate`: tasks name the temperature even where nothing is drawn."""
    stops = asked.pop("until", [])
    if not asked.get("do_sample"):
        asked = {name: value for name, value in asked.items() if name not in ("temperature", "top_p", "top_k")}
    return [stops] if isinstance(stops, str) else stops, asked
