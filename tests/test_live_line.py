"""The line of saves on their way, in a terminal with Keras's progress bar, in a notebook, and where nobody looks on."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import keras
import pytest
from interpreters import Interpreter
from screen import show_on_screen

from offstep.live_line import LiveLine, NotebookLine, open_line

SCRIPT = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import sys
import keras, numpy as np
from offstep import ModelCheckpoint

class Wait(keras.callbacks.Callback):  # a save that is on its way for some batches, and then durable
    async_safe = True
    def on_train_batch_end(self, batch, logs=None):
        if batch == 6:
            callback.wait_until_finished()

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(700), keras.layers.Dense(700), keras.layers.Dense(1)])
model.compile("adam", "mse")
x = np.ones((20, 4), "float32")
callback = ModelCheckpoint(sys.argv[1] + "/{step}", save_freq=4, verbose=2, slots=3, in_process=True)
model.fit(x, x[:, :1], 2, epochs=2, callbacks=[callback, Wait()], verbose=1)
print("the end")
"""


class Terminal(io.StringIO):
    """Text that a terminal was sent."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Moves on by a second each time."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture(autouse=True)
def a_plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def test_the_line_is_below_the_bar_and_leaves_nothing_behind() -> None:
    terminal = Terminal()
    line = LiveLine(terminal, Clock())
    terminal.write("\rthe bar, 1 of 2")
    line.show("a long text")
    assert show_on_screen(terminal.getvalue()) == ["the bar, 1 of 2", "a long text"]
    terminal.write("\b\b\b\rthe bar, 2 of 2")
    line.show("short")
    assert show_on_screen(terminal.getvalue()) == ["the bar, 2 of 2", "short"]
    line.hide()
    line.hide()
    terminal.write("\rthe bar, done\nEpoch 2\n")
    assert show_on_screen(terminal.getvalue()) == ["the bar, done 2", "Epoch 2", ""]


def test_a_text_is_cut_to_the_width_of_the_terminal() -> None:
    terminal = Terminal()
    LiveLine(terminal, Clock()).show("x" * 300)
    assert [len(line) for line in show_on_screen(terminal.getvalue())] == [0, 99]


def test_the_line_does_not_change_all_the_time() -> None:
    terminal = Terminal()
    line = LiveLine(terminal, lambda: 5.0)
    line.show("first")
    line.show("second")
    assert show_on_screen(terminal.getvalue()) == ["", "first"]


def test_keras_s_progress_bar_stays_whole(tmp_path: Any) -> None:
    parent, child = pty.openpty()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = Interpreter(["-c", SCRIPT, tmp_path], stdout=child, stderr=subprocess.STDOUT, env=environment)
    os.close(child)
    written = b""
    while True:
        try:
            piece = os.read(parent, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(parent)
    text = written.decode().replace("\r\n", "\n")
    assert process.wait() == 0, text
    assert re.search(r"\x1b\[2moffstep: steps? [\d, ]+ on the way to the disk for .*MB", text)
    screen = show_on_screen(text)
    shapes = (
        r"",
        r"the end",
        r"Epoch \d/2",
        r"Epoch \d: (finished )?saving model to \S+",
        r"offstep: step \d+ durable after .* MB/s",
        r" ?\d+/10 ━{20} \d+s [\d.]+.?s/step - loss: [\d.]+( - offstep_stall_ms: [\d.]+)?",
    )
    strange = [line for line in screen if not any(re.fullmatch(shape, line) for shape in shapes)]
    assert strange == [], screen
    assert len([line for line in screen if "durable after" in line]) == 5, screen
    assert len([line for line in screen if line.startswith("10/10") and "stall" in line]) == 2, screen


def test_a_notebook_has_an_output_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(data["text/plain"])

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(data["text/plain"])
        return Handle()

    module = ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    line = open_line()
    assert isinstance(line, NotebookLine)
    line.hide()
    line.show("step 5")
    line.hide()
    assert shown == ["", "step 5", ""]


def test_there_is_none_where_nobody_looks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_line() is None  # pytest captures
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert isinstance(open_line(), LiveLine)
    monkeypatch.setenv("TERM", "dumb")
    assert open_line() is None
    assert keras.config.is_interactive_logging_enabled()
