"""The architectures whose pruned models load by transformers' own AutoModel once l0kernels.hf is imported."""

from __future__ import annotations

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .modeling_l0 import sized

KNOWN = (
    *("bert", "distilbert", "gpt2", "llama", "mistral", "qwen2", "qwen3", "roberta", "t5", "vit"),
    *(
        "albert",
        "bart",
        "deberta-v2",
        "dinov2",
        "electra",
        "gemma2",
        "gpt_neox",
        "modernbert",
        "olmo2",
        "opt",
        "phi3",
    ),
)
"""Those that the tests run, the first ones in depth. Others are made known where they are loaded by hf."""


def make_known(model_type: str) -> None:
    """Has AutoConfig know the config of pruned models of this type; its from_dict makes the models known."""
    config = sized(CONFIG_MAPPING[model_type])
    AutoConfig.register(config.model_type, config, exist_ok=True)


def register_known() -> None:
    """All of KNOWN that this version of transformers has."""
    for model_type in KNOWN:
        if model_type in CONFIG_MAPPING:
            make_known(model_type)
