"""Who competes, and how is each read back?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Reader = Literal["keras_directory", "tree_directory", "manager", "keras", "weights"]


@dataclass(frozen=True)
class Peer:
    """One way to save.

    Attributes:
        name: Key.
        label: What the text shows.
        reader: How the verifier, which has no offstep, reads a checkpoint.
        keep: How many of the newest checkpoints the trainee is set up to keep.
        file: The one file that each save replaces; `None` where each step is a directory of its own.
        is_ours: Whether it is offstep.
        in_fit: Whether it saves from a real `fit`, rather than from a loop of JAX.
    """

    name: str
    label: str
    reader: Reader
    keep: int = 2
    file: str | None = None
    is_ours: bool = False
    in_fit: bool = True

    @property
    def suffix(self) -> str:
        """Of each file; empty for directories."""
        return {"keras": ".keras", "weights": ".weights.h5"}.get(self.reader, "")

    def with_each_step(self) -> Peer:
        """Returns this peer with a file of its own for each step."""
        return replace(self, file=None, keep=2)


_ALL = (
    Peer("offstep", "offstep, directories", "keras_directory", is_ours=True),
    Peer("offstep_keras", "offstep, .keras", "keras", keep=1, file="model.keras", is_ours=True),
    Peer("offstep_weights", "offstep, .weights.h5", "weights", keep=1, file="model.weights.h5", is_ours=True),
    Peer("offstep_tree", "offstep Checkpointer", "tree_directory", is_ours=True, in_fit=False),
    Peer("model_checkpoint", "ModelCheckpoint, .keras", "keras", keep=1, file="model.keras"),
    Peer("model_checkpoint_weights", "ModelCheckpoint, .weights.h5", "weights", keep=1, file="model.weights.h5"),
    Peer("orbax_checkpoint", "OrbaxCheckpoint", "keras_directory"),
    Peer("orbax_manager", "Orbax CheckpointManager", "manager", in_fit=False),
)
PEERS = {peer.name: peer for peer in _ALL}
OURS = tuple(peer.name for peer in _ALL if peer.is_ours)
ALL = tuple(PEERS)
CALLBACKS = tuple(peer.name for peer in _ALL if peer.in_fit)
DIRECTORIES = tuple(peer.name for peer in _ALL if peer.file is None)
