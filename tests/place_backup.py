"""A plugin of pytest: puts our `BackupAndRestore` in the place of Keras's before Keras's own tests are collected."""

from __future__ import annotations

from functools import partial

import keras
import pytest
from keras.src import callbacks

from offstep import BackupAndRestore

keras.callbacks.BackupAndRestore = callbacks.BackupAndRestore = BackupAndRestore


def pytest_runtest_setup(item: pytest.Item) -> None:
    # This one counts on the interrupted epoch being trained from its beginning again: 17 batches where 15 are due.
    begins_again = item.name == "test_best_case_step"
    callbacks.BackupAndRestore = partial(BackupAndRestore, mid_epoch=False) if begins_again else BackupAndRestore
