"""Requests come, chunk by chunk, hit, decide, are preempted, aborted and end in any order: no page is ever wrong."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .simulation import Simulation

#: (page columns, page column of each routed layer)
LAYOUTS = [(3, (1,)), (4, (1, 2)), (3, (0, 1, 2)), (1, (-1, -1)), (2, (0,))]


class Engine(RuleBasedStateMachine):
    @initialize(
        layout=st.sampled_from(LAYOUTS), window=st.sampled_from([0, 1, 3, 4, 6, 8, 99]), delay=st.integers(0, 1),
        blocks=st.integers(12, 20),
    )  # fmt: skip
    def start(self, layout: tuple[int, tuple[int, ...]], window: int, delay: int, blocks: int) -> None:
        columns, routed = layout
        self.simulation = Simulation(columns, routed, columns * blocks, window, delay)
        self.prompts: list[list[int]] = []

    @rule(data=st.data(), more=st.lists(st.integers(0, 2), min_size=1, max_size=9), answer=st.integers(1, 12),
          cutoff=st.sampled_from([0.0, 0.0, -2.0, 3.0]))  # fmt: skip
    def submit(self, data: st.DataObject, more: list[int], answer: int, cutoff: float) -> None:
        """Often a prompt that begins as another did."""
        before = data.draw(st.sampled_from([[], *self.prompts[-3:]]))[:20] if self.prompts else []
        self.prompts.append([*before, *more])
        self.simulation.add(self.prompts[-1], answer, cutoff)

    @rule(budget=st.integers(1, 24), longest=st.sampled_from([1, 3, 99]))
    def step(self, budget: int, longest: int) -> None:
        # Without whole prompts there is nothing to decide from, so chunks need a window.
        self.simulation.step(budget if self.simulation.window else 99, longest if self.simulation.window else 99)

    @precondition(lambda self: self.simulation.running or self.simulation.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        everybody = self.simulation.running + self.simulation.waiting
        self.simulation.end(data.draw(st.sampled_from(everybody)))

    @rule()
    def reset_cache(self) -> None:
        self.simulation.kv.reset_prefix_cache()

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        """Everybody gets an answer, and nothing is left over."""
        if not hasattr(self, "simulation"):
            return
        simulation, idle = self.simulation, 0
        while simulation.running or simulation.waiting:
            idle = 0 if simulation.step(99) else idle + 1
            simulation.check()
            assert idle < 3, "requests wait for something that never comes"
        while simulation.under_way:
            simulation._hear(*simulation.under_way.pop(0))
        assert simulation.manager.block_pool.get_num_free_blocks() == simulation.manager.block_pool.num_gpu_blocks - 1
        assert not simulation.manager._live and not simulation.manager._by_serial
        assert not simulation.manager.prefix._undecided
        assert simulation.manager.token_slots == 0


Engine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestEngine = Engine.TestCase
