"""What a checkpoint looks like on disk: one module for each format."""

from __future__ import annotations

from offstep.formats import orbax_directory

FORMATS = {"orbax_directory": orbax_directory}
