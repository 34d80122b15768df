"""What the trainer has handed to its writer, which a new writer in its place is told again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from offstep.attachments import Attachment
from offstep.buffers import Slot
from offstep.ownership import Lock
from offstep.records import NO_SLOT, Job
from offstep.wire import Channel, Message, spool

Outcome = Message  # of a job: `durable_at`, or `error` and `errno`; `withdrawn` for one that it never began


@dataclass
class Submitted:
    """A job whose outcome is not known yet."""

    job: Job
    message: Message
    on_outcome: Callable[[Outcome], None]
    attachments: Mapping[str, Attachment]
    attempts: int = 1


@dataclass(frozen=True)
class Kept:
    """The newest snapshot of a plan that is only kept in memory."""

    number: int
    message: Message
    attachments: Mapping[str, Attachment]


@dataclass
class Handover:
    """Everything a new writer needs to be told, in this order. Its owner guards it with a lock.

    What is told to a channel that is `None`, or whose writer has died, comes to nothing: `tell_all` makes up for it.
    """

    locks: dict[int, Lock] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    plans: dict[int, bytes] = field(default_factory=dict)
    jobs: dict[int, Submitted] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)  # by plan

    def offer(self, job: Job) -> None:
        """Lets the writer claim a job that is written from a slot."""
        if job.slot != NO_SLOT:
            self.slots[job.slot].claim.offer(job.number)

    def claim_back(self, number: int) -> Submitted | None:
        """Takes a job back that the writer has not claimed; returns `None` where it has, or needs no slot."""
        submitted = self.jobs.get(number)
        if submitted is None or submitted.job.slot == NO_SLOT:
            return None
        if not self.slots[submitted.job.slot].claim.take(number):
            return None
        return self.jobs.pop(number)

    def tell_all(self, channel: Channel, *, with_memory: bool) -> None:
        """Tells a new writer everything; `with_memory` as for `tell_slot`."""
        for number in self.locks:
            self.tell_lock(channel, number)
        for slot in self.slots.values():
            tell_slot(channel, slot, with_memory=with_memory)
        for number in self.plans:
            self.tell_plan(channel, number)
        for submitted in self.jobs.values():
            self.offer(submitted.job)  # the writer that died may have claimed it
            tell_job(channel, submitted)
        for kept in self.kept.values():
            tell_kept(channel, kept)

    def tell_lock(self, channel: Channel | None, number: int) -> None:
        """Sends a lock, with its descriptor."""
        lock = self.locks[number]
        tell(channel, {"do": "add_lock", "lock": number, "path": str(lock.path)}, lock.descriptor)

    def tell_plan(self, channel: Channel, number: int) -> None:
        """Sends a plan, however long, in a file."""
        descriptor = spool(self.plans[number])
        try:
            tell(channel, {"do": "add_plan", "plan": number}, descriptor)
        finally:
            os.close(descriptor)


def tell(channel: Channel | None, message: Message, descriptor: int | None = None) -> bool:
    """Sends to a running writer; returns whether there was one."""
    if channel is None:
        return False
    try:
        channel.send(message, descriptor)
    except OSError:
        return False
    return True


def tell_slot(channel: Channel | None, slot: Slot, *, with_memory: bool) -> None:
    """Sends a slot; `with_memory` to another process, which has to map it."""
    message = {"do": "add_slot", "slot": slot.number, "bytes": slot.size_bytes}
    tell(channel, message, slot.fd if with_memory else None)


def tell_job(channel: Channel | None, submitted: Submitted) -> bool:
    """Sends a job after its attachments; returns whether it has gone."""
    _tell_attachments(channel, submitted.job.number, submitted.attachments)
    return tell(channel, submitted.message)


def tell_kept(channel: Channel | None, kept: Kept) -> bool:
    """Sends what shall only be kept, after its attachments; returns whether it has gone."""
    _tell_attachments(channel, kept.number, kept.attachments)
    return tell(channel, kept.message)


def _tell_attachments(channel: Channel | None, number: int, attachments: Mapping[str, Attachment]) -> None:
    for name, attachment in attachments.items():
        tell(channel, {"do": "attach", "job": number, "name": name, "bytes": attachment.size_bytes}, attachment.fd)
