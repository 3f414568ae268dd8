"""Registration of our classes with transformers' `AutoConfig`, `AutoModel` and `AutoProcessor`.

transformers cannot discover classes of other packages, so a package must call `AutoConfig.register` itself. A call on
import would load transformers and torch, which takes seconds, even in a program that only scores captions. Therefore an
import hook registers placeholders when a program imports the Auto classes, and the first use of a placeholder loads our
classes.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]
CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"
MODELING_AUTO = "transformers.models.auto.modeling_auto"
PROCESSING_AUTO = "transformers.models.auto.processing_auto"


def register_classes() -> None:
    """Register our classes, so that the Auto classes prefer them to the code next to the weights."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from ..configuration_qformer import QFormerCaptionerConfig, QFormerConfig, QFormerPretrainingConfig
    from ..modeling_qformer import QFormerCaptioner
    from ..pretraining_qformer import QFormerForPretraining
    from ..processing_qformer import QFormerCaptionerProcessor, QFormerPretrainingProcessor
    from ..querying_qformer import QFormerModel

    AutoConfig.register(QFormerConfig.model_type, QFormerConfig)
    AutoModel.register(QFormerConfig, QFormerModel)
    AutoConfig.register(QFormerCaptionerConfig.model_type, QFormerCaptionerConfig)
    AutoModel.register(QFormerCaptionerConfig, QFormerCaptioner)
    AutoModelForImageTextToText.register(QFormerCaptionerConfig, QFormerCaptioner)
    AutoModelForMultimodalLM.register(QFormerCaptionerConfig, QFormerCaptioner)
    AutoProcessor.register(QFormerCaptionerConfig, QFormerCaptionerProcessor)
    AutoConfig.register(QFormerPretrainingConfig.model_type, QFormerPretrainingConfig)
    AutoModel.register(QFormerPretrainingConfig, QFormerForPretraining)
    AutoProcessor.register(QFormerPretrainingConfig, QFormerPretrainingProcessor)


class Placeholder(type):
    """Metaclass of placeholders, which defer the import of our classes until they are used.

    The first access to an attribute or the first call registers our classes, and forwards to the class of the same
    name.
    """

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._load(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._load()(*args, **kwargs)

    def _load(cls) -> type:
        register_classes()
        return getattr(importlib.import_module(PACKAGE), cls.__name__)


class QFormerConfig(metaclass=Placeholder):
    pass


class QFormerCaptionerConfig(metaclass=Placeholder):
    pass


class QFormerModel(metaclass=Placeholder):
    pass


class QFormerCaptioner(metaclass=Placeholder):
    pass


class QFormerCaptionerProcessor(metaclass=Placeholder):
    pass


class QFormerPretrainingConfig(metaclass=Placeholder):
    pass


class QFormerForPretraining(metaclass=Placeholder):
    pass


class QFormerPretrainingProcessor(metaclass=Placeholder):
    pass


def register_placeholders(module: ModuleType) -> None:
    """Register the placeholders that belong to one of the Auto modules.

    The Auto classes of models and processors look up the type of a configuration, which a placeholder cannot replace.
    """
    if module.__name__ == CONFIGURATION_AUTO:
        module.AutoConfig.register("qformer", QFormerConfig)
        module.AutoConfig.register("qformer_captioner", QFormerCaptionerConfig)
        module.AutoConfig.register("qformer_pretraining", QFormerPretrainingConfig)
        return
    configuration = importlib.import_module(f"{PACKAGE}.configuration_qformer")  # imports no torch
    if module.__name__ == MODELING_AUTO:
        module.MODEL_MAPPING.register(configuration.QFormerConfig, QFormerModel)
        module.MODEL_MAPPING.register(configuration.QFormerCaptionerConfig, QFormerCaptioner)
        module.MODEL_MAPPING.register(configuration.QFormerPretrainingConfig, QFormerForPretraining)
        module.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.register(configuration.QFormerCaptionerConfig, QFormerCaptioner)
        module.MODEL_FOR_MULTIMODAL_LM_MAPPING.register(configuration.QFormerCaptionerConfig, QFormerCaptioner)
    else:
        module.AutoProcessor.register(configuration.QFormerCaptionerConfig, QFormerCaptionerProcessor)
        module.AutoProcessor.register(configuration.QFormerPretrainingConfig, QFormerPretrainingProcessor)


class AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Import hook for one of transformers' Auto modules.

    Args:
        name: full name of the module. The hook ignores all other modules, and removes itself after its first use.
    """

    def __init__(self, name: str):
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = AutoModuleLoader(spec.loader)
        return spec


class AutoModuleLoader(importlib.abc.Loader):
    """Loader that executes a module with its own loader and then registers the placeholders.

    Args:
        loader: the module's own loader.
    """

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        register_placeholders(module)


def register_with_transformers() -> None:
    """Register the placeholders with the Auto modules, for those not yet imported through an import hook."""
    for name in (CONFIGURATION_AUTO, MODELING_AUTO, PROCESSING_AUTO):
        if name in sys.modules:
            register_placeholders(sys.modules[name])
        else:
            sys.meta_path.insert(0, AutoModuleFinder(name))
