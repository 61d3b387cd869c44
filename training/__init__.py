"""Only in a source tree: `training.X` is the file of `router_tuning.X`, for commands written before it was named so.

Not installed: a wheel must not bring a top-level package `training`, which others ship, too.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parent / "router_tuning")]
