"""Calls a plugin as axolotl does when it trains ``rl: simpo``, from YAML to trainer.

Written from the public interface of BasePlugin and PluginManager (axolotl.integrations.base), of
the merge of their arguments into the configuration (axolotl.integrations.config), and of
HFRLTrainerBuilder (axolotl.core.builders.rl) in axolotl 0.15 to 0.21.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from enum import Enum
from types import ModuleType
from typing import Any

import pydantic
import pytest


class RLType(str, Enum):
    DPO = "dpo"
    SIMPO = "simpo"


class Config(dict):
    """A configuration whose missing keys are None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


class InputConfig(pydantic.BaseModel):
    """axolotl's keys of a run with ``rl: simpo``."""

    model_config = pydantic.ConfigDict(extra="forbid")

    rl: RLType | None = None
    rl_beta: float | None = None
    simpo_gamma: float | None = None
    cpo_alpha: float | None = None
    trainer_cls: str | None = None
    plugins: list[str] | None = None


class BasePlugin:
    """The hooks that the builder calls. They do nothing."""

    def register(self, cfg: Any) -> None: ...

    def get_input_args(self) -> str | None: ...

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None: ...

    def get_trainer_cls(self, cfg: Any) -> type | None: ...

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []


class Run:
    """A run of axolotl: its plugins, the configuration that they extend, and the builder."""

    def __init__(self, yaml: dict[str, Any]) -> None:
        self.plugins = [self._load(name) for name in yaml.get("plugins", [])]
        assert all(isinstance(plugin, BasePlugin) for plugin in self.plugins)
        for plugin in self.plugins:
            plugin.register(yaml)
        names = [name for plugin in self.plugins if (name := plugin.get_input_args())]
        model = type("InputConfig", (InputConfig, *map(self._attribute, names)), {})
        self.cfg = Config(model(**yaml).model_dump(exclude_none=True))

    @staticmethod
    def _attribute(dotted: str) -> Any:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def _load(self, dotted: str) -> Any:
        return self._attribute(dotted)()

    def training_arguments(self) -> dict[str, Any]:
        """The keywords of CPOConfig: always simpo_gamma, and the others if they are set."""
        arguments: dict[str, Any] = {"loss_type": "simpo", "simpo_gamma": self.cfg.simpo_gamma}
        if self.cfg.rl_beta is not None:
            arguments["beta"] = self.cfg.rl_beta
        if self.cfg.cpo_alpha is not None:
            arguments["cpo_alpha"] = self.cfg.cpo_alpha
        for plugin in self.plugins:
            arguments.update(plugin.get_training_args(self.cfg) or {})
        return arguments

    def build(self, model: Any, default: type, *, args: Any = None, **data: Any) -> Any:
        """Creates the trainer, of the class ``default`` if no plugin has one.

        axolotl does not pass the model to the class of a plugin.
        """
        found = (plugin.get_trainer_cls(self.cfg) for plugin in self.plugins)
        trainer_class = next((each for each in found if each is not None), None)
        positional = [] if trainer_class is not None else [model]
        trainer_class = trainer_class or default
        has_tokenizer = "tokenizer" in inspect.signature(trainer_class).parameters
        callbacks: list[Any] = []
        for plugin in self.plugins:
            callbacks.extend(plugin.add_callbacks_pre_trainer(cfg=self.cfg, model=model))
        return trainer_class(
            *positional,
            args=args,
            callbacks=callbacks,
            **{"tokenizer" if has_tokenizer else "processing_class": "the tokenizer"},
            **data,
        )


def install_package(monkeypatch: pytest.MonkeyPatch, trainer_class: type) -> None:
    """Installs modules that a plugin imports from."""
    names = ["axolotl", "axolotl.core", "axolotl.core.trainers", "axolotl.integrations"]
    for name in (*names, "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.core.trainers"].AxolotlCPOTrainer = trainer_class
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
