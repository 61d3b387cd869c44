from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from router_tuning.predictions import divergences, log_probabilities, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 50])
def test_a_few_tokens_at_a_time_give_what_all_of_them_would(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logits, other = (torch.randn(tokens, 300, generator=generator).mul(4).to(dtype) for _ in range(2))
    labels = torch.randint(300, (tokens,), generator=generator)
    logs, dense = (each.float().log_softmax(-1) for each in (logits, other))
    assert torch.equal(log_probabilities(logits), logs)
    assert torch.equal(divergences(logits, dense), (dense.exp() * (dense - logs)).sum(-1))
    assert torch.equal(losses(logits, labels), -logs.gather(1, labels[:, None])[:, 0])


def test_gradients_are_those_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 30, generator=generator).requires_grad_()
    dense = torch.randn(40, 30, generator=generator).log_softmax(-1)
    (found,) = torch.autograd.grad(divergences(logits, dense).mean(), logits)
    whole = kl_div(logits.log_softmax(-1), dense, reduction="none", log_target=True).sum(-1).mean()
    torch.testing.assert_close(found, torch.autograd.grad(whole, logits)[0])
