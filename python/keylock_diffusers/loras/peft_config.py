"""What PEFT's settings say about a LoRA's scale: in ``adapter_config.json``, or in the header that diffusers writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keylock_diffusers.checks import number, shown, whole
from keylock_diffusers.files import strict_json
from keylock_diffusers.loras.adapter import component_name

HEADER_KEY = "lora_adapter_metadata"  # of files that diffusers saved: one JSON object, "unet.lora_alpha" and so on

# Settings that say nothing about the weights of a trained adapter: training, bookkeeping, and which modules to wrap,
# which the file's own keys tell.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type", "bias"}
_READ |= {"init_lora_weights"}
# Ways to begin that change the model's own weights too: without that change the pair alone is another update.
_CHANGES_BASE = re.compile("pissa|olora|corda|loftq|lora_ga")
_EXPRESSION = re.compile(r"[\\*+?\[\](){}|$^]")


@dataclass(frozen=True)
class PeftConfig:
    """The settings that a LoRA's scale follows from."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]  # by the end of a module's name
    alphas: Mapping[str, float]
    rank_stabilised: bool
    dora: bool

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Of one module, by the name that the file gives it."""
        return _by_name(self.ranks, module, self.rank), _by_name(self.alphas, module, self.alpha)


def parse(fields: Mapping[str, Any]) -> PeftConfig:
    """Read the settings of one component.

    Raises:
        ValueError: a value is not what it should be, or a setting that changes the mathematics is not supported.
    """
    if fields.get("peft_type") not in (None, "LORA"):
        raise ValueError(f"PEFT's {shown(fields['peft_type'])} is not supported, only LORA")
    for name, value in fields.items():
        if name not in _READ | _HARMLESS and value:
            raise ValueError(f"PEFT's setting {name:.80} = {shown(value)} is not supported")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"PEFT's setting bias = {shown(fields['bias'])} is not supported: it changes biases")
    begin = fields.get("init_lora_weights")
    if isinstance(begin, str) and _CHANGES_BASE.match(begin.lower()):
        raise ValueError(
            f"PEFT's setting init_lora_weights = {shown(begin)}: such a LoRA belongs to weights that the setting "
            f"changed; save it with path_initial_model_for_weight_conversion"
        )
    for name in ("use_rslora", "use_dora"):
        if not isinstance(fields.get(name, False), bool):
            raise ValueError(f"{name} must be true or false, got {shown(fields[name])}")
    return PeftConfig(
        whole(fields.get("r", 8), "r", 1),
        number(fields.get("lora_alpha", 8), "lora_alpha"),
        {name: whole(value, f"rank_pattern of {name:.80}", 1) for name, value in _pattern(fields, "rank_pattern")},
        {name: number(value, f"alpha_pattern of {name:.80}") for name, value in _pattern(fields, "alpha_pattern")},
        fields.get("use_rslora", False),
        fields.get("use_dora", False),
    )


def parse_header(text: str) -> dict[int, PeftConfig]:
    """Read the settings of every component in a header that diffusers wrote: -1 is the denoiser, 0 and above are text
    encoders.

    Raises:
        ValueError: the text is no JSON object of settings, or as `parse`.
    """
    fields = strict_json(text)
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, got {shown(fields)}")
    components = {"unet": -1, "transformer": -1} | {component_name(number): number for number in range(3)}
    found: dict[int, dict[str, Any]] = {}
    for name, value in fields.items():
        prefix, _, setting = name.partition(".")
        if prefix not in components or not setting:
            raise ValueError(f"{name:.80}: expected a setting of {', '.join(components)}")
        found.setdefault(components[prefix], {})[setting] = value
    return {component: parse(settings) for component, settings in found.items()}


def _pattern(fields: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{name} must be an object, got {shown(pattern)}")
    for key in pattern:
        if _EXPRESSION.search(key):
            raise ValueError(f"{name}: {shown(key)} is a regular expression; only modules' names are supported")
    return list(pattern.items())


def _by_name(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first of the values whose key is the module's name or its end, as PEFT matches them."""
    return next((v for key, v in values.items() if module == key or module.endswith(f".{key}")), default)
