"""An axolotl plugin that trains with SimPO (``rl: simpo``).

In the YAML::

    rl: simpo
    rl_beta: 2.0
    simpo_gamma: 1.0
    cpo_alpha: 0.0
    plugins:
      - simpo_ext.integrations.axolotl.SimPOPlugin
    simpo_fused_linear: true  # optional, like the next two
    simpo_empty: drop
    simpo_logits_budget_bytes: 1073741824

The trainer then derives from :class:`simpo_ext.integrations.trl.SimPOMixin` and axolotl's
AxolotlCPOTrainer. ``simpo_fused_linear``, ``simpo_empty`` and ``simpo_logits_budget_bytes`` are the
mixin's options with a prefix. The plugin does not change any other ``rl``.

Supports axolotl 0.15 to 0.21. The module makes two classes on first access, because they need
axolotl or pydantic: ``SimPOPlugin`` derives from :class:`PluginHooks` and axolotl's BasePlugin, and
``SimPOArgs`` is a pydantic model of the three options.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    SimPOArgs: type
    SimPOPlugin: type

__all__ = ["PluginHooks", "SimPOArgs", "SimPOPlugin"]

_PREFIX = "simpo_"
# SimPOMixin's options and the types that the YAML may hold. None means the mixin's default.
_OPTIONS: dict[str, Any] = {
    "fused_linear": bool | None,
    "empty": Literal["drop", "nan"] | None,
    "logits_budget_bytes": int | None,
}


class PluginHooks:
    """The hooks that SimPOPlugin adds to BasePlugin.

    axolotl does not pass the model to a trainer class of a plugin. So a hook that runs before
    axolotl makes the trainer keeps the model.
    """

    _model: Any = None

    def get_input_args(self) -> str:
        """The import path of the options' pydantic model."""
        return f"{__name__}.SimPOArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Keeps the model for the trainer, which axolotl makes next.

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
        """Makes the trainer's class.

        Args:
            cfg: axolotl's configuration.

        Returns:
            A subclass of SimPOMixin and AxolotlCPOTrainer, or None if ``rl`` is not simpo.

        Raises:
            ValueError: ``simpo_gamma`` is missing, and axolotl would pass None to the trainer; or
                ``trainer_cls`` is set, and axolotl would ignore it.
        """
        if not _is_simpo(cfg):
            return None
        if cfg.simpo_gamma is None:
            raise ValueError(
                "simpo_gamma: expected a number (the target margin of the loss; axolotl has no "
                "default), got None"
            )
        if cfg.trainer_cls:
            raise ValueError(
                "trainer_cls: expected no value, because axolotl ignores it with simpo_ext's "
                f"plugin, got {cfg.trainer_cls!r}"
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
        """Returns the kept model and drops the reference to it."""
        model, self._model = self._model, None
        return model


class _FromPlugin:
    """Passes SimPOMixin the model and the options, which axolotl does not pass."""

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
    """Makes SimPOPlugin or SimPOArgs when axolotl looks it up by name."""
    if name == "SimPOPlugin":
        return _simpo_plugin()
    if name == "SimPOArgs":
        return _simpo_args()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
