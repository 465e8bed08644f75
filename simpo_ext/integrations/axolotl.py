"""SimPO in axolotl (``rl: simpo``), as a plugin of it.

In the YAML::

    rl: simpo
    rl_beta: 2.0
    simpo_gamma: 1.0
    cpo_alpha: 0.0
    plugins:
      - simpo_ext.integrations.axolotl.SimPOPlugin
    simpo_fused_linear: true  # this and what follows may be left out
    simpo_empty: drop
    simpo_logits_budget_bytes: 1073741824

The trainer is then axolotl's own AxolotlCPOTrainer with
:class:`simpo_ext.integrations.trl.SimPOMixin` before it, of which ``simpo_fused_linear``,
``simpo_empty`` and ``simpo_logits_budget_bytes`` are the options without their prefix. Any other
``rl`` is left alone. For axolotl 0.15 to 0.21, whose classes this module makes its own from when
they are asked for: ``SimPOPlugin``, of axolotl's BasePlugin and :class:`PluginHooks`, and
``SimPOArgs``, a pydantic model of the three options.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    SimPOArgs: type
    SimPOPlugin: type

__all__ = ["PluginHooks", "SimPOArgs", "SimPOPlugin"]

_PREFIX = "simpo_"
# Of each option, as SimPOMixin has them, what the YAML may hold; left out, its default is the
# mixin's.
_OPTIONS: dict[str, Any] = {
    "fused_linear": bool | None,
    "empty": Literal["drop", "nan"] | None,
    "logits_budget_bytes": int | None,
}


class PluginHooks:
    """What SimPOPlugin has that BasePlugin has not.

    axolotl's builder of RL trainers gives a class that comes from a plugin no model. The model is
    kept from the hook before the trainer is made, until it is.
    """

    _model: Any = None

    def get_input_args(self) -> str:
        """Where the options' pydantic model is found."""
        return f"{__name__}.SimPOArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Keeps the model for the trainer, which is made next.

        Args:
            cfg: axolotl's configuration.
            model: The model to train.

        Returns:
            No callbacks.
        """
        if _is_simpo(cfg):
            self._model = model
        return []

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """The trainer's class.

        Args:
            cfg: axolotl's configuration.

        Returns:
            A class made of SimPOMixin and AxolotlCPOTrainer, or None if ``rl`` is not simpo.

        Raises:
            ValueError: ``simpo_gamma`` is missing, which axolotl passes on as None in place of any
                default; or there is a ``trainer_cls``, which it would ignore.
        """
        if not _is_simpo(cfg):
            return None
        if cfg.simpo_gamma is None:
            raise ValueError(
                "simpo_gamma: expected a number, the target margin of the loss, for which axolotl "
                "has no default, got None"
            )
        if cfg.trainer_cls:
            raise ValueError(
                "trainer_cls: expected none beside simpo_ext's plugin, in whose favour axolotl "
                f"ignores it, got {cfg.trainer_cls!r}"
            )
        from axolotl.core.trainers import AxolotlCPOTrainer

        from .trl import SimPOMixin

        options = {name: getattr(cfg, _PREFIX + name) for name in _OPTIONS}
        return type(
            "SimPOTrainer",
            (_FromPlugin, SimPOMixin, AxolotlCPOTrainer),
            {
                "__module__": __name__,
                "plugin": self,
                "options": {name: value for name, value in options.items() if value is not None},
            },
        )

    def _take_model(self) -> Any:
        """The kept model, which is the trainer's from then on."""
        model, self._model = self._model, None
        return model


class _FromPlugin:
    """Before SimPOMixin in the bases: what axolotl does not pass to its ``__init__``."""

    plugin: PluginHooks
    options: dict[str, Any]

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        kept = self.plugin._take_model()
        if model is None:
            model = kept
        super().__init__(model, *args, **{**self.options, **kwargs})  # type: ignore[call-arg]


def _is_simpo(cfg: Any) -> bool:
    """Whether ``rl`` is simpo, as a string or as axolotl's enumeration of strings."""
    return bool(cfg.rl == "simpo")


@cache
def _simpo_plugin() -> type:
    from axolotl.integrations.base import BasePlugin

    return type("SimPOPlugin", (PluginHooks, BasePlugin), {"__module__": __name__})


@cache
def _simpo_args() -> type:
    from pydantic import create_model

    fields: dict[str, Any] = {_PREFIX + name: (kind, None) for name, kind in _OPTIONS.items()}
    model: type = create_model("SimPOArgs", __module__=__name__, **fields)
    return model


def __getattr__(name: str) -> type:
    """SimPOPlugin and SimPOArgs, which axolotl looks up here by name."""
    if name == "SimPOPlugin":
        return _simpo_plugin()
    if name == "SimPOArgs":
        return _simpo_args()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
