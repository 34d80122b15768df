"""The pipe between trainer and writer, over real sockets."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from offstep.wire import Channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = map(Channel, socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def memfd(content: bytes) -> int:
    descriptor = os.memfd_create("offstep-test", os.MFD_CLOEXEC)
    os.write(descriptor, content)
    return descriptor


def test_messages_arrive_in_their_order(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    for number in range(100):
        ours.send({"number": number, "text": "line\nbreak \u00e9 \U0001f600"})
    received = [theirs.receive() for _ in range(100)]
    assert received == [{"number": number, "text": "line\nbreak \u00e9 \U0001f600"} for number in range(100)]


def test_a_descriptor_arrives_with_its_message(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    for number in range(40):
        descriptor = memfd(b"content %d" % number)
        ours.send({"number": number}, descriptor if number % 3 else None)
        os.close(descriptor)
    for number in range(40):
        message = theirs.receive()
        assert message is not None
        assert message["number"] == number
        assert ("fd" in message) == bool(number % 3)
        if "fd" in message:
            assert os.pread(message["fd"], 100, 0) == b"content %d" % number
            os.close(message["fd"])


def test_a_message_larger_than_the_pipe_arrives_whole(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    text = "x" * 3_000_000
    descriptor = memfd(b"beside")
    sender = threading.Thread(target=ours.send, args=({"text": text}, descriptor))
    sender.start()
    message = theirs.receive()
    sender.join()
    os.close(descriptor)
    assert message is not None
    assert message["text"] == text
    assert os.pread(message["fd"], 100, 0) == b"beside"
    os.close(message["fd"])


def test_no_message_within_the_timeout_is_none(ends: tuple[Channel, Channel]) -> None:
    _, theirs = ends
    assert theirs.receive(0.0) is None
    assert theirs.receive(0.01) is None


def test_what_was_sent_before_the_end_is_received_first(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send({"last": 1})
    ours.send({"last": 2})
    ours.close()
    assert theirs.receive() == {"last": 1}
    assert theirs.receive() == {"last": 2}
    with pytest.raises(EOFError, match="the other end of the pipe is closed"):
        theirs.receive()


def test_what_the_other_end_did_not_read_does_not_hide_what_it_sent(ends: tuple[Channel, Channel]) -> None:
    """A socket that is closed with unread data resets the connection."""
    ours, theirs = ends
    theirs.send({"unread": 1})
    ours.send({"sent": 1})
    ours.close()
    assert theirs.receive() == {"sent": 1}
    with pytest.raises(EOFError):
        theirs.receive()


def test_sending_to_an_end_that_is_gone_is_an_error(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(OSError, match="Broken pipe"):
        ours.send({"to": "nobody"})


def test_descriptors_that_nobody_fetched_are_closed(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    descriptor = memfd(b"")
    ours.send({"a": 1})
    ours.send({"a": 2}, descriptor)
    os.close(descriptor)
    assert theirs.receive() == {"a": 1}
    theirs.close()  # that no memfd is left is checked after each test


def test_descriptors_above_those_that_select_knows_are_waited_for() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    filler = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        ours, theirs = map(Channel, socket.socketpair())
        ours.send({"a": 1})
        assert theirs.socket.fileno() > 1023
        assert theirs.receive(10.0) == {"a": 1}
        ours.close()
        theirs.close()
    finally:
        for descriptor in filler:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
