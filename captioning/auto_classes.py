"""Our classes behind transformers' `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText` and `AutoProcessor`.

Importing the package is enough for a captioner to open without `trust_remote_code`, whatever the order of imports. It
does not import transformers, which takes seconds and which scoring captions does not need.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType


def register() -> None:
    """Let the Auto classes build captioners of ours from this package instead of from the code beside the weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from ..configuration_qformer import QFormerCaptionerConfig, QFormerConfig
    from ..modeling_qformer import QFormerCaptioner, QFormerModel
    from ..processing_qformer import QFormerCaptionerProcessor

    AutoConfig.register(QFormerConfig.model_type, QFormerConfig)
    AutoModel.register(QFormerConfig, QFormerModel)
    AutoConfig.register(QFormerCaptionerConfig.model_type, QFormerCaptionerConfig)
    AutoModel.register(QFormerCaptionerConfig, QFormerCaptioner)
    AutoModelForImageTextToText.register(QFormerCaptionerConfig, QFormerCaptioner)
    AutoProcessor.register(QFormerCaptionerConfig, QFormerCaptionerProcessor)


def register_with_transformers() -> None:
    """Register now if transformers is imported already, and else as soon as it is."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _WaitForTransformers())


class _WaitForTransformers(importlib.abc.MetaPathFinder):
    """Stands aside for every module but one, and for that one the first time only."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = _TransformersLoader(name, spec.origin)
        return spec


class _TransformersLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)  # lazy itself: from here on each of its parts can be imported
        register()
