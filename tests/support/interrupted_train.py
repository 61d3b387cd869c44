"""`python -m tests.support.interrupted_train RANK STEP train …`: Ctrl-C in one process, in that step."""

from __future__ import annotations

import os
import signal
import sys

from router_tuning.cli import main
from router_tuning.trainer import RouterTrainer

if __name__ == "__main__":
    rank, step = map(int, sys.argv[1:3])
    before_step = RouterTrainer.before_step

    def interrupted(self: RouterTrainer) -> None:
        before_step(self)
        if self.args.process_index == rank and self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)

    RouterTrainer.before_step = interrupted  # type: ignore[method-assign]
    sys.exit(main(sys.argv[3:]))
