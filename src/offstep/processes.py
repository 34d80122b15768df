"""What saves of a state that spans several training processes begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from offstep.coordination import PRIMARY, Group, find_group
from offstep.errors import UnsupportedLeaf
from offstep.formats import orbax_directory
from offstep.holders import Array, find_home, list_holders, spans_processes
from offstep.joint_commit import JointCommits
from offstep.options import Options
from offstep.records import Leaf, PathKey, Plan
from offstep.shares import Shares, digest_structure, keep_all, share_out
from offstep.writer import Writer

_DIRECTORY = "orbax_directory"


@dataclass(frozen=True)
class Membership:
    """This process's part in the saves of one structure.

    Attributes:
        group: The processes.
        plan: Where the leaves lie in this process's slots.
        digest: Tells whether the others have the same structure.
        shares: Who writes what into a directory, or store, of all; `None` where nothing is written there.
        is_local: Whether each has a disk of its own, and writes all that it holds. With `shares`, what it copies from
            there into a store.
    """

    group: Group
    plan: Plan
    digest: str
    shares: Shares | None
    is_local: bool

    @property
    def has_lock(self) -> bool:
        """Whether this process takes the lock of the target, and sweeps there."""
        return self.is_local or self.group.index == PRIMARY

    def open(self, writer: Writer, documents: dict[str, Any] | None, options: Options) -> tuple[int, JointCommits]:
        """Tells the writer of the plans; returns the number of that of the saves, and what commits them.

        Args:
            writer: This process's.
            documents: What an Orbax directory takes.
            options: How to work.
        """
        share = merged = None
        if self.shares is not None:
            own = {"process": self.group.index, "commits": self.group.index == PRIMARY}
            # What is copied is what this process writes alone: a counter need not even be on its disk.
            plan = self.shares.plan(self.group.index, has_all_counters=False) if self.is_local else self.plan
            share = writer.add_plan(plan, "orbax_share", own)
        if self.shares is not None and self.group.index == PRIMARY:
            about = {"model": documents, "places": self.shares.places, "processes": self.group.count}
            merged = writer.add_plan(self.plan, "orbax_merged", about)
        joint = JointCommits(
            self.group,
            writer,
            digest=self.digest,
            share_plan=share,
            merged_plan=merged,
            is_local=self.is_local,
            commit_seconds=options.commit_seconds,
        )
        if self.is_local:
            return writer.add_plan(self.plan, _DIRECTORY, documents), joint
        assert share is not None
        return share, joint


def find_membership(
    leaves: Sequence[Leaf],
    arrays: Sequence[Array],
    format: str,  # noqa: A002  the word that records and formats use
    empty_nodes: Sequence[tuple[tuple[PathKey, ...], str]],
    options: Options,
) -> Membership | None:
    """Returns this process's part, where an array spans several; `None` where all are its own.

    Raises:
        UnsupportedLeaf: such a state cannot be saved in this format, or the processes cannot be reached.
        ValueError: an option would let the processes save different steps.
    """
    spread = next((leaf for leaf, array in zip(leaves, arrays, strict=True) if spans_processes(array)), None)
    if spread is None:
        if options.layout == "local" and options.copies_into_store and find_group() is not None:
            raise ValueError(
                "each of several processes has a state of its own, and all would be copied to the same place in the "
                "store: give each an address. Received: layout='local' and local=..."
            )
        return None
    if format != _DIRECTORY:
        raise UnsupportedLeaf(
            f"{spread.name}: it is spread over several processes, and a file of Keras is written by one; save to a "
            "directory, such as 'ckpts/{step}'"
        )
    group = find_group()
    if group is None:
        raise UnsupportedLeaf(
            f"{spread.name}: it is spread over several processes, but JAX's coordination service, through which they "
            "agree on a commit, is not to be had; call jax.distributed.initialize first"
        )
    if options.on_busy != "wait":
        raise ValueError(
            "several processes have to save the same steps, so none may skip one for itself: on_busy must be 'wait'. "
            f"Received: {options.on_busy!r}"
        )
    if options.memory_every is not None:
        raise ValueError(
            "several processes would each keep a step of their own: memory_every is for a state in one process. "
            f"Received: memory_every={options.memory_every!r}"
        )
    if any(leaf.is_frozen for leaf in leaves):
        raise ValueError("skip_unchanged is for a state in one process. Received: one that spans several")
    orbax_directory.check_leaves(leaves)
    home = find_home()
    leaves = [
        replace(leaf, sharding=home) if spans_processes(array) else leaf
        for leaf, array in zip(leaves, arrays, strict=True)
    ]
    holders = [list_holders(array) for array in arrays]
    is_local = options.layout == "local"
    shares = share_out(leaves, holders, group.count, empty_nodes) if options.copies_into_store or not is_local else None
    if is_local:
        own = ((group.index,),)  # what is in reach of one process, each has for itself
        holders = [
            found if spans_processes(array) else own * len(found) for found, array in zip(holders, arrays, strict=True)
        ]
        plan = keep_all(leaves, holders, group.index, empty_nodes, None if shares is None else shares.layouts)
        return Membership(group, plan, digest_structure(plan.leaves) if shares is None else shares.digest, shares, True)
    assert shares is not None
    return Membership(group, shares.plan(group.index), shares.digest, shares, False)
