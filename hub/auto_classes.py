"""Our classes behind transformers' `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText` and `AutoProcessor`.

Importing the package is enough for a captioner to open without `trust_remote_code`, whatever is imported first. Nothing
is imported for it: transformers takes seconds, and scoring captions does not need it. So stand-ins are registered, as
soon as the Auto classes are imported, and our classes when a stand-in is used.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType

CONFIGS, PROCESSORS = (f"transformers.models.auto.{name}_auto" for name in ("configuration", "processing"))


def register() -> None:
    """Let the Auto classes build captioners of ours from this package, and not from the code beside the weights."""
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


class StandIn(type):
    """A class of ours that is imported, and registered with the others, when something is asked of it."""

    def __getattr__(cls, name: str):
        return getattr(cls.load(), name)

    def __call__(cls, *args, **kwargs):
        return cls.load()(*args, **kwargs)

    def load(cls) -> type:
        register()
        return getattr(sys.modules[__name__.split(".")[0]], cls.__name__)


class QFormerConfig(metaclass=StandIn):
    pass


class QFormerCaptionerConfig(metaclass=StandIn):
    pass


class QFormerCaptionerProcessor(metaclass=StandIn):
    pass


def register_stand_ins(name: str, module: ModuleType) -> None:
    """Register those that an Auto module is for."""
    if name == CONFIGS:
        module.AutoConfig.register("qformer", QFormerConfig)
        module.AutoConfig.register("qformer_captioner", QFormerCaptionerConfig)
    else:
        module.AutoProcessor.register(QFormerCaptionerConfig, QFormerCaptionerProcessor)


def register_with_transformers() -> None:
    """Register stand-ins: now, with an Auto module that is imported already, and else as soon as it is."""
    sys.meta_path.insert(0, _AutoModuleFinder())
    for name in (CONFIGS, PROCESSORS):
        if name in sys.modules:
            register_stand_ins(name, sys.modules[name])


class _AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Finds two modules, by asking all other finders."""

    def __init__(self):
        self.looks_for = {CONFIGS, PROCESSORS}

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in self.looks_for:
            return None
        self.looks_for.remove(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _AutoModuleLoader(name, spec.origin)
        return spec


class _AutoModuleLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        register_stand_ins(module.__name__, module)
