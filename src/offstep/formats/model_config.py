"""The JSON of a Keras model, which quotes the learning rate of the moment when it is saved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

LONGEST_NUMBER = 24  # of a float64, as in -2.2250738585072014e-308

_MARK = "offstep: the learning rate"


@dataclass(frozen=True)
class ModelConfig:
    """A model's JSON, in two pieces around its learning rate; `after` is `None` where it has none."""

    before: str
    after: str | None = None

    def encode(self, rate: float | None) -> bytes:
        """Returns the JSON with this learning rate, as Keras writes it."""
        if self.after is None:
            return self.before.encode()
        return f"{self.before}{json.dumps(rate)}{self.after}".encode()

    def missing_bytes(self, encoded: bytes) -> int:
        """Returns how much longer the JSON could be with another learning rate."""
        if self.after is None:
            return 0
        return len(self.before.encode()) + LONGEST_NUMBER + len(self.after.encode()) - len(encoded)


def parse_config(text: str, *, quotes_rate: bool) -> ModelConfig:
    """Cuts a model's JSON at the optimizer's learning rate, if it quotes one that is a number."""
    data = json.loads(text)
    holder = _find_rate_holder(data) if quotes_rate else None
    if holder is None or json.dumps(data) != text:
        return ModelConfig(text)
    holder["learning_rate"] = _MARK
    before, *after = json.dumps(data).split(json.dumps(_MARK))
    return ModelConfig(before, after[0]) if len(after) == 1 else ModelConfig(text)


def _find_rate_holder(data: Any) -> dict[str, Any] | None:  # JSON
    """Returns the object of the config that holds the learning rate: the innermost optimizer's."""
    optimizer = (data.get("compile_config") or {}).get("optimizer")
    while isinstance(optimizer, dict) and isinstance(optimizer.get("config"), dict):
        config: dict[str, Any] = optimizer["config"]
        if isinstance(config.get("learning_rate"), float):
            return config
        optimizer = config.get("inner_optimizer")
    return None
