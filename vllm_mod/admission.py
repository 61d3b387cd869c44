"""Which cutoffs a request is decided by: the checkpoint's, its own dial's, or those of the load policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import ConfigError
from .dial import KEPT, THRESHOLD, requested_cutoffs
from .plan import Plan


@dataclass(frozen=True)
class Admission:
    cutoffs: np.ndarray  #: float64 `[R]`
    dial: dict[str, Any] | None = None  #: what was asked for, and by whom; None: nothing, the checkpoint's hold


class Admissions:
    """The scheduler's side; one per engine."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        #: None where `force` answers for every request
        self._forced = plan.knobs.force is not None
        self._default = Admission(np.array(plan.config.cutoffs if plan.config.policy.by_request else (), np.float64))
        #: kept ratio -> admission, of the load policy
        self._levels: dict[float, Admission] = {}

    def on_arrival(self, extra_args: Mapping[str, Any] | None) -> Admission:
        """By the request's own dial, if it has one; what it asked for was checked when it was accepted."""
        if self._forced or not extra_args:
            return self._default
        try:
            cutoffs = requested_cutoffs(extra_args, self._plan.config, self._plan.table)
        except ConfigError:
            return self._default
        if cutoffs is None:
            return self._default
        asked = {"threshold": extra_args[THRESHOLD]} if THRESHOLD in extra_args else {"kept": extra_args[KEPT]}
        return Admission(np.array(cutoffs, np.float64), {**asked, "by": "request"})

    def under_load(self, kv_usage: float, waiting: int) -> Admission | None:
        """Of a request without a dial, when it is admitted; None without such a policy."""
        policy, table = self._plan.knobs.under_load, self._plan.table
        if policy is None or table is None:
            return None
        kept = policy.kept_at(kv_usage, waiting)
        if kept not in self._levels:
            cutoffs = np.array(table.cutoffs_at(kept, len(self._plan.config.layers)), np.float64)
            self._levels[kept] = Admission(cutoffs, {"kept": round(kept, 4), "by": "load"})
        return self._levels[kept]
