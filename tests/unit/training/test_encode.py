"""Tokens and their mask, whatever the tokenizer: its special tokens, its white space, what it puts before a text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_tuning.encode import Encoder
from router_tuning.values import Unusable
from tests.support.models import byte_tokenizer
from tests.support.templates import CHATML, QWEN3, template_tokenizer
from tests.unit.training.helpers import make_tokenizer

CORPUS = [
    "Say yes or no:\n\n    yes  no\tyes ...\n",
    "def f():\n    return  1\n\n\n",
    "Hello world! Hello there, world.",
]


def merging_tokenizer(template: str | None = None, **pre_tokenizer: Any) -> Any:
    """Byte-level BPE whose tokens are words with the white space before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trim = pre_tokenizer.pop("trim_offsets", False)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | pre_tokenizer)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_tokenizer(template: str | None, scheme: str) -> Any:
    """Like Llama 2's: `▁` for spaces and before a text, bytes for what has no token, BOS by its post-processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    words = ["▁yes", "▁no", "yes", "no", "▁", *map(chr, range(33, 127))]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"<0x{b:02X}>" for b in range(256)), *words])}
    merges = [("▁yes"[:n], "▁yes"[n]) for n in (1, 2, 3)] + [("y", "e"), ("ye", "s"), ("n", "o"), ("▁", "no")]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(["▁y", "▁ye", "ye"])}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def bos_tokenizer(behind: str = "") -> Any:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    special = [("<|bos|>", tokenizer.bos_token_id), ("<|eos|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|bos|> $A {behind}".strip(), special_tokens=special
    )
    return tokenizer


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "byte-level": merging_tokenizer(),
    "byte-level, trimmed offsets": merging_tokenizer(trim_offsets=True),
    "byte-level, a space before": merging_tokenizer(add_prefix_space=True, trim_offsets=True),
    "SentencePiece": sentencepiece_tokenizer(None, "first"),
    "SentencePiece, always": sentencepiece_tokenizer(None, "always"),
}
CHAT_TOKENIZERS = {
    "byte-level": merging_tokenizer(CHATML),
    "byte-level, trimmed offsets": merging_tokenizer(CHATML, trim_offsets=True),
    "byte-level, a space before": merging_tokenizer(CHATML, add_prefix_space=True, trim_offsets=True),
    "SentencePiece": sentencepiece_tokenizer(CHATML, "first"),
    "SentencePiece, always": sentencepiece_tokenizer(CHATML, "always"),
}
WORDS = st.text(st.sampled_from("yesno \n\t.é"), min_size=1, max_size=12)


def supervised_text(row: dict[str, Any], tokenizer: Any) -> str:
    ids, supervised, *_ = Encoder(tokenizer)(row)
    return tokenizer.decode([token for token, s in zip(ids, supervised, strict=True) if s])


@pytest.mark.parametrize("name", CHAT_TOKENIZERS)
@given(asked=WORDS, answer=WORDS.filter(str.strip))
def test_all_of_an_answer_is_supervised_white_space_included(name, asked, answer):
    tokenizer = CHAT_TOKENIZERS[name]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
    expected = f"{answer}<|im_end|>"
    assert supervised_text(row, tokenizer) in (expected, expected.removeprefix(" "))
    ids, _, prompt_len, _ = Encoder(tokenizer)(row)
    served = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert ids[:prompt_len] == tokenizer(served, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=WORDS, answer=WORDS.filter(str.strip))
def test_a_completion_goes_on_behind_the_tokens_that_serving_would_submit(name, prompt, answer):
    tokenizer = TOKENIZERS[name]
    tokenizer.chat_template = None
    ids, supervised, prompt_len, _ = Encoder(tokenizer)({"prompt": prompt, "completion": answer})
    assert ids[:prompt_len] == tokenizer(prompt)["input_ids"]
    assert supervised == [t >= prompt_len for t in range(len(ids))]
    expected = answer + tokenizer.eos_token
    assert tokenizer.decode(ids[prompt_len:]) in (expected, expected.removeprefix(" "))


@pytest.mark.parametrize("row", [{"text": "yes"}, {"completion": "yes"}, {"prompt": "", "completion": "yes"}])
@pytest.mark.parametrize("tokenizer", [make_tokenizer(), byte_tokenizer(), bos_tokenizer(), bos_tokenizer("<|eos|>"),
                                       sentencepiece_tokenizer(None, "first")])  # fmt: skip
def test_a_row_without_a_prompt_has_its_decision_from_all_of_it(row, tokenizer):
    """Not from BOS alone."""
    ids, supervised, prompt_len, _ = Encoder(tokenizer)(row)
    assert prompt_len == len(ids)
    whole = tokenizer("yes")["input_ids"]
    assert ids[: len(whole)] == whole
    if "text" in row:
        assert ids == whole
    else:
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    first = supervised.index(True)
    assert all(supervised[first:]) and (first == 1) == (ids[0] == tokenizer.bos_token_id)


def test_a_prompt_keeps_its_bos():
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = None
    ids, supervised, prompt_len, _ = Encoder(tokenizer)({"prompt": "ab", "completion": "c"})
    assert tokenizer.decode(ids) == "<|bos|>abc<|eos|>" and prompt_len == 3 and supervised == [False] * 3 + [True] * 2


@pytest.mark.parametrize("prompt", ["Say a", [{"role": "user", "content": "Say a"}]])
def test_prompt_and_completion_are_a_turn_where_there_is_a_template(prompt):
    tokenizer = make_tokenizer()
    ids, supervised, prompt_len, _ = Encoder(tokenizer)({"prompt": prompt, "completion": "a"})
    assert tokenizer.decode(ids) == "<|user|>Say a<|assistant|>a<eos>"
    assert tokenizer.decode(ids[:prompt_len]) == "<|user|>Say a<|assistant|>" and supervised.index(True) == prompt_len


def test_a_tokenizer_without_template_gets_a_plain_one():
    tokenizer = make_tokenizer(None)
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Yo"), ("assistant", "Hi")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    ids, supervised, prompt_len, _ = Encoder(tokenizer)(row)
    assert tokenizer.decode([token for token, s in zip(ids, supervised, strict=True) if s]) == "Yo<eos>Hi<eos>"
    assert tokenizer.decode(ids[:prompt_len]) == "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\n"
    prompt = Encoder(tokenizer)({"prompt": "Hi", "completion": "Yo", "system": "Be brief."})
    assert tokenizer.decode(prompt.ids).startswith("### System:\nBe brief.\n\n### User:\nHi")  # else it would be lost
    assert supervised_text({"prompt": "1+1=", "completion": "2"}, tokenizer) == "2<eos>"


def test_no_token_crosses_from_prompt_to_answer():
    """Where the thought that the prompt opens is empty: one token would be both line breaks."""
    tokenizer = merging_tokenizer(
        QWEN3.replace("assistant\\n' }}\n    {%- if enable", "assistant\\n<think>\\n' }}\n    {%- if enable")
    )
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]
    ids, supervised, prompt_len, _ = Encoder(tokenizer)({"messages": messages})
    assert tokenizer.decode(ids[:prompt_len]).endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(ids[prompt_len:-1]) == "\n</think>\n\nyes<|im_end|>"
    assert supervised.index(True) == prompt_len and not supervised[-1]  # a line break is behind the end token


def test_words_without_a_token_are_not_trained_on():
    with pytest.raises(Unusable, match="the tokens of an answer do not give its text again") as error:
        Encoder(make_tokenizer())({"prompt": "a", "completion": "é"})
    assert error.value.kind == "unverified"
    Encoder(make_tokenizer())({"prompt": "é", "completion": "a"})  # serving has no token for it, either


def test_unicode_forms_that_a_tokenizer_normalises_are_fine():
    from tokenizers import normalizers

    tokenizer = template_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert supervised_text({"prompt": "Cafe\u0301?", "completion": "Cafe\u0301"}, tokenizer) == "Café<|im_end|>"


def test_half_an_emoji_is_a_replacement_character():
    assert supervised_text({"prompt": "\ud83d", "completion": "a\ud83d"}, byte_tokenizer()) == "a\ufffd<|eos|>"
