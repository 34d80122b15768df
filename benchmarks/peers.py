"""Who competes, and what may be said about each?

Only names and facts, so that the process that starts the runs imports neither Keras nor JAX; `peer_callbacks` builds
the callback of each.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Peer:
    """One way to save, or not to save.

    Attributes:
        name: Key, and the name of the factory in `peer_callbacks`.
        label: What tables show.
        finished: How the time at which a save was finished is known: when the call returns, when the final name
            appears in the directory (watched from outside), or from the peer's own record.
        durable: Whether finished means durable: every file and directory was fsynced.
        needs: Modules without which it cannot run.
    """

    name: str
    label: str
    finished: Literal["never", "call", "name", "own"] = "name"
    durable: bool = False
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """The first module that is needed and not installed."""
        return next((module for module in self.needs if importlib.util.find_spec(module) is None), None)


BASELINE = "none"
OURS = "offstep"
STOCK = "orbax_checkpoint"

# Peers by name: what their writer leaves out.
LEAVING_OUT = {
    "offstep_without_directory_fsyncs": ("directory_fsyncs",),
    "offstep_without_count": ("count",),
    "offstep_without_checks": ("checks",),
    "offstep_without_all": ("directory_fsyncs", "count", "checks"),
}

_ALL = (
    Peer(BASELINE, "no callback", "never"),
    Peer("idle", "callback that does nothing", "never"),
    Peer(OURS, "offstep", "own", durable=True, needs=("offstep.callbacks",)),
    Peer("model_checkpoint", "keras ModelCheckpoint (.keras)", "call"),
    Peer(STOCK, "keras OrbaxCheckpoint", needs=("orbax.checkpoint",)),
    Peer("orbax_checkpoint_tuned", "keras OrbaxCheckpoint, tuned", needs=("orbax.checkpoint",)),
    Peer("thread_npz", "thread + copy + numpy.savez"),
    Peer("orbax_async", "orbax AsyncCheckpointer", needs=("orbax.checkpoint",)),
    Peer("orbax_async_tuned", "orbax AsyncCheckpointer, tuned", needs=("orbax.checkpoint",)),
    Peer("orbax_manager", "orbax CheckpointManager", needs=("orbax.checkpoint",)),
    Peer("orbax_manager_tuned", "orbax CheckpointManager, tuned", needs=("orbax.checkpoint",)),
    Peer("thread_safetensors", "thread + copy + safetensors", needs=("safetensors",)),
    Peer("torch_dcp", "PyTorch DCP async_save", "own", needs=("torch",)),
    Peer("offstep_keras", "offstep (.keras)", "own", durable=True, needs=("offstep.callbacks",)),
    Peer("offstep_weights", "offstep (.weights.h5)", "own", durable=True, needs=("offstep.callbacks",)),
    Peer("model_checkpoint_weights", "keras ModelCheckpoint (.weights.h5)", "call"),
    Peer("offstep_never", "offstep that never saves", "never", needs=("offstep.callbacks",)),
    Peer("model_checkpoint_never", "keras ModelCheckpoint that never saves", "never"),
    *(
        Peer(name, f"offstep without {', '.join(parts).replace('_', ' ')}", "own", durable=True)
        for name, parts in LEAVING_OUT.items()
    ),
)
PEERS = {peer.name: peer for peer in _ALL}
DEFAULT_PEERS = tuple(peer.name for peer in _ALL[:7])


def select_peers(names: list[str]) -> tuple[list[Peer], dict[str, str]]:
    """Returns the peers that can run here, and for each other one the module that it lacks."""
    chosen = [PEERS[name] for name in dict.fromkeys([BASELINE, *names])]
    missing = {peer.name: lacks for peer in chosen if (lacks := _lacks(peer))}
    return [peer for peer in chosen if peer.name not in missing], missing


def _lacks(peer: Peer) -> str | None:
    try:
        return peer.missing
    except ModuleNotFoundError as error:  # The parent package itself is absent.
        return error.name
