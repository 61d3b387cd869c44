"""What each granularity means, and that one place says it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_mod.granularity import GRANULARITIES, POLICIES

ROOT = Path(__file__).parents[2]
#: A comparison of, or a look at, a part of a granularity's name.
PARTS = re.compile(
    r"(?<!for )\b(granularity|target|level)(\[[^]]*\])? *(==|!=|in|not in) *[(\[{]*"
    r"[\"'](attn|mlp|block|expert|token|sequence|static)[\"']"
    r"|granularity\w*\.(split|startswith|endswith|removesuffix|removeprefix|partition)"
)


@pytest.mark.parametrize(
    ("granularity", "sublayers", "packs_kv", "keeps_state", "rows"),
    [
        ("attn_token", ("self_attn",), True, True, 1),
        ("attn_sequence", ("self_attn",), False, True, 1),
        ("mlp_token", ("mlp",), False, False, 1),
        ("mlp_sequence", ("mlp",), False, True, 1),
        ("block_token", ("self_attn", "mlp"), True, True, 1),
        ("block_sequence", ("self_attn", "mlp"), False, True, 1),
        ("expert_token", ("mlp",), False, False, 8),
        ("attn_static", ("self_attn",), False, False, 0),
        ("mlp_static", ("mlp",), False, False, 0),
        ("block_static", ("self_attn", "mlp"), False, False, 0),
    ],
)
def test_policy(granularity, sublayers, packs_kv, keeps_state, rows):
    policy = POLICIES[granularity]
    assert policy.sublayers == sublayers
    assert (policy.packs_kv, policy.keeps_state) == (packs_kv, keeps_state)
    assert policy.router_rows(8) == rows
    assert policy.whole_block == (len(sublayers) == 2)
    assert (policy.skips_attention, policy.skips_mlp) == ("self_attn" in sublayers, "mlp" in sublayers)


def test_every_granularity_is_decided_in_one_way():
    assert list(POLICIES) == list(GRANULARITIES)
    for policy in POLICIES.values():
        assert policy.by_token + policy.by_request + policy.is_static == 1, policy


def test_nothing_else_reads_the_parts_of_a_name():
    files = [*ROOT.glob("vllm_mod/**/*.py"), *ROOT.glob("training/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path.name != "granularity.py" and PARTS.search(line)
    ]
    assert not found, "\n".join(found)
