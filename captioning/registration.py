"""Makes transformers' Auto classes know ours: a captioner then opens without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from ..configuration_qformer import QFormerCaptionerConfig
from ..modeling_qformer import QFormerCaptioner
from ..processing_qformer import QFormerCaptionerProcessor

AutoConfig.register(QFormerCaptionerConfig.model_type, QFormerCaptionerConfig)
AutoModel.register(QFormerCaptionerConfig, QFormerCaptioner)
AutoModelForImageTextToText.register(QFormerCaptionerConfig, QFormerCaptioner)
AutoProcessor.register(QFormerCaptionerConfig, QFormerCaptionerProcessor)
