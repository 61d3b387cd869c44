"""The capacity loss: the paper's, and the controller that reaches what is asked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from router_tuning.average import TailAverage
from router_tuning.loss import CapacityLoss


def test_the_papers_loss_is_a_fixed_weight_on_the_excess():
    loss = CapacityLoss("paper", 0.5, 0.1)
    kept = {1: torch.tensor(0.9, requires_grad=True), 2: torch.tensor(0.3, requires_grad=True)}
    value = loss(kept)
    value.backward()
    assert value.item() == pytest.approx(0.04)
    assert (kept[1].grad, kept[2].grad) == (pytest.approx(0.1), 0.0)
    loss.step(0.9, 1.0, 1.0)
    assert loss.weight == 0.1


@pytest.mark.parametrize(("kept", "sign"), [(0.9, 1), (0.1, -1)])
def test_the_controller_pushes_from_both_sides(kept, sign):
    loss = CapacityLoss("controller", 0.5)
    assert loss({1: torch.tensor(kept)}) == 0  # what a sublayer is worth is not known yet
    loss.step(kept, 0.2, 0.1)
    assert loss.weight * sign > 0
    ratio = torch.tensor(kept, requires_grad=True)
    loss({1: ratio}).backward()
    assert ratio.grad.sign() == sign
    other = CapacityLoss("controller", 0.5)
    other.load_state_dict(loss.state_dict())
    assert other.state_dict() == loss.state_dict()


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_the_controller_reaches_the_target_whatever_a_sublayer_is_worth(target, scale):
    """A toy: 4 layers, 8 features with a large common part (as hidden states have), benefits of either sign."""
    torch.manual_seed(0)
    steps, truth = 300, torch.randn(4, 8)
    inputs = torch.randn(4, 2000, 8) + 3.0
    benefit = scale * (((inputs - 3.0) * truth[:, None]).sum(-1) + 0.5)  # loss saved by keeping
    weights = torch.zeros(4, 8, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=0.03, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss, average, routers = CapacityLoss("controller", target), TailAverage(), {0: SimpleNamespace(weight=weights)}
    for step in range(1, steps + 1):
        rows = torch.randint(0, 2000, (32,))
        soft = torch.sigmoid((inputs[:, rows] * weights[:, None]).sum(-1))
        gate = (soft >= 0.5).float() + soft - soft.detach()
        kept = dict(enumerate(gate.mean(1)))
        total = -(gate * benefit[:, rows]).mean(1).sum() + loss(kept)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        loss.step(
            float(gate.detach().mean()),
            float(benefit[:, rows].square().mean().sqrt()),
            schedule.get_last_lr()[0] / 0.03 / steps,
        )
        schedule.step()
        average.update(routers, step / steps)
    average.apply(routers)
    keep = (inputs * weights[:, None]).sum(-1) >= 0
    assert float(keep.float().mean()) == pytest.approx(target, abs=0.02)
    assert benefit[keep].mean() > benefit[~keep].mean()  # and it keeps what helps
