"""Models of transformers whose layers have sizes of their own: what `l0kernels.hf.export` saves.

This file needs torch and transformers only. It lies in every folder that holds such a model, so that
`AutoModel.from_pretrained(folder, trust_remote_code=True)` loads it where l0kernels is not installed.
For each class of transformers there is one here with L0 before its name: it builds what that class builds,
and gives parameters and attributes the sizes that stand in its config.
"""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import transformers
from torch import nn

PREFIX = "L0"
FORMAT = 1
AUTOS = [name for name in dir(transformers) if name.startswith("AutoModel")]
REFUSAL = (
    "this folder holds a model pruned by l0kernels, whose layers have sizes of their own: load it by "
    "l0kernels.hf.from_pretrained, by AutoModel.from_pretrained after `import l0kernels.hf`, or with "
    "trust_remote_code=True"
)
"""Stands in config.json where classes of transformers read a number, which refuse it with this text."""


def _once(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return cache(fn)


def sizes_of(model: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """Where `model` differs from `stock` in shapes of tensors or in whole numbers among its attributes.

    Raises:
        ValueError: it differs in more than that.
    """
    shapes, attributes = {}, {}
    theirs = dict(stock.named_modules())
    for name, module in model.named_modules():
        other = theirs.get(name)
        if other is None or (name and type(module) is not type(other)):
            got = "no such module" if other is None else type(other).__name__
            raise ValueError(
                f"model must have the modules of {type(stock).__name__}, whose sizes alone may differ: got "
                f"{type(module).__name__} as {name!r} where that has {got}"
            )
        for of, known in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
            for key, value in of.items():
                full = known.get(key)
                if value is not None and full is not None and value.shape != full.shape:
                    shapes[f"{name}.{key}"] = list(value.shape)
        found = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(module).items()
            if not key.startswith("_")
            and _is_size(value)
            and key in vars(other)
            and value != vars(other)[key]
        }
        if found:
            attributes[name] = found
    of = PREFIX + type(stock).__name__
    return {"of": of, "shapes": shapes, "attributes": attributes} if shapes or attributes else {}


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_size, value))
    return isinstance(value, int) and not isinstance(value, bool)


def resize_(model: nn.Module, sizes: dict[str, Any]) -> None:
    """Gives a model as transformers builds it the sizes of one that was pruned."""
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "") + "."
    is_base = not any(name.startswith(prefix) for name in (*sizes["shapes"], *sizes["attributes"]))

    def module_of(name: str) -> nn.Module | None:
        """Under this name; of another class than the saved one what both have, the base model."""
        if type(model).__name__ == sizes["of"]:
            return modules[name]
        if is_base:
            return modules.get(name, modules.get(prefix + name))
        own = modules.get(name, modules.get(name.removeprefix(prefix)))
        return own if name.startswith(prefix) else None

    made: dict[int, Any] = {}
    for name, shape in sizes["shapes"].items():
        owner, _, key = name.rpartition(".")
        module = module_of(owner)
        if module is None:
            continue
        values: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
        value = values.get(key)
        if value is None:
            continue
        if id(value) not in made:  # what is tied stays so
            part = value.detach()[tuple(map(slice, shape))].clone()
            is_parameter = isinstance(value, nn.Parameter)
            made[id(value)] = value, nn.Parameter(part, value.requires_grad) if is_parameter else part
        values[key] = made[id(value)][1]
    for name, attributes in sizes["attributes"].items():
        module = module_of(name)
        for key, size in attributes.items() if module is not None else ():
            setattr(module, key, tuple(size) if isinstance(size, list) else size)


class SizedConfig:
    """Mixin of configs with `l0`, the sizes in which a model differs from what the rest of it says."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of every config; classes for the sizes are made known to transformers."""
        sizes = config_dict.get("l0")
        if sizes is not None:
            if sizes["format"] != FORMAT:
                raise ValueError(
                    f"config must be of format {FORMAT}, got {sizes['format']}: a newer l0kernels"
                )
            config_dict = {**config_dict, "l0": dict(sizes)}
            if "id2label" in sizes:  # which stands elsewhere in a file
                config_dict["id2label"] = config_dict["l0"].pop("id2label")
                if config_dict["id2label"] is None:
                    del config_dict["id2label"]
            register(cls)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def __getattribute__(self, name: str) -> Any:
        # Layers with sizes of their own are built with those of all, and resized: no reason to warn of that.
        spec = object.__getattribute__(self, "__dict__").get("_heterogeneity_spec")
        if spec is not None:
            own = type(self).attribute_map.get(name, name)  # type: ignore[attr-defined]
            if own in spec.per_layer_attributes:
                return object.__getattribute__(self, own)
        return super().__getattribute__(name)

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """As of every config, with a refusal for classes that would ignore the sizes."""
        config = json.loads(self.to_json_string(use_diff=use_diff))
        config["l0"]["id2label"] = config.get("id2label")
        config["id2label"] = {REFUSAL: ""}
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


class SizedModel:
    """Mixin of models whose layers have the sizes of their config."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if getattr(config, "l0", None) is None:
            raise ValueError(
                f"config must have sizes in its attribute l0, got a {type(config).__name__} without"
            )
        resize_(self, config.l0)  # type: ignore[arg-type]


@_once
def sized(stock: Any) -> Any:
    """The class here for a class of transformers, a model's or a config's."""
    name = PREFIX + stock.__name__
    attributes: dict[str, Any] = {"__module__": __name__, "__qualname__": name, "__doc__": stock.__doc__}
    if issubclass(stock, transformers.PretrainedConfig):
        attributes |= {"model_type": f"l0_{stock.model_type}", "_auto_class": "AutoConfig"}
        return type(name, (SizedConfig, stock), attributes)
    auto = next((auto for auto, model in models_of(stock.config_class).items() if model is stock), None)
    attributes |= {"config_class": sized(stock.config_class), "_auto_class": auto}
    return type(name, (SizedModel, stock), attributes)


@_once
def models_of(config: Any) -> dict[str, Any]:
    """The class of transformers that each AutoModel... makes of a config of transformers, by their names."""
    found = {}
    for name in AUTOS:
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", None) or {}
        models = mapping.get(config, ())
        models = models if isinstance(models, list | tuple) else (models,)
        own = [model for model in models if getattr(model, "config_class", None) is config]
        if own:
            found[name] = own[0]
    return found


def auto_map(config: Any) -> dict[str, str]:
    """What transformers loads from this file: class of this file by name of the Auto class."""
    classes = {"AutoConfig": config, **models_of(config)}
    return {auto: f"{__name__.rpartition('.')[2]}.{PREFIX}{cls.__name__}" for auto, cls in classes.items()}


@_once
def register(config: Any) -> None:
    """Has AutoModel and its kin make the classes here of a config of this file."""
    stock = config.__mro__[config.__mro__.index(SizedConfig) + 1]
    for name, model in models_of(stock).items():
        getattr(transformers, name).register(config, sized(model), exist_ok=True)


def __getattr__(name: str) -> type:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(
        stock, (transformers.PretrainedConfig, transformers.PreTrainedModel)
    ):
        return sized(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
