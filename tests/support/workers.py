"""What tests let the worker processes do (`LLM.collective_rpc`): these import this module by its name."""

from typing import Any


def negate_routers_of_rank_1(worker: Any) -> None:
    """Whatever was kept there is skipped, and the other way round."""
    if worker.rank == 1:
        for layer in worker.model_runner.model.model.layers:
            if hasattr(layer, "router"):
                layer.router.weight.data.neg_()
