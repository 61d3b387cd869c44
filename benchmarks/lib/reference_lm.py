"""lm-eval's Hugging Face backend on the float32 reference: what the engine's scores must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from router_tuning.model import load_reference, reference_logits
from router_tuning.tokenizer import load_tokenizer


class ReferenceLM(HFLM):
    """One sequence at a time, no KV cache, no padding.

    Decisions are those of a server: what is submitted is the prompt. To score an answer lm-eval submits it with the
    question, to vLLM as a whole; the stock Hugging Face backend leaves out its last token, so scoring is done here.
    """

    def __init__(self, checkpoint: Path, max_length: int) -> None:
        model = load_reference(checkpoint)
        super().__init__(pretrained=model, tokenizer=load_tokenizer(checkpoint), batch_size=1, max_length=max_length)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        results = []
        for _, context, continuation in tqdm(requests, desc="reference", disable=disable_tqdm):
            ids = (context + continuation)[-(self.max_length - 1) :]  # vLLM has to generate one token more
            logits = reference_logits(self.model, ids, len(ids))[-len(continuation) - 1 : -1].log_softmax(-1)
            target = torch.tensor(ids[-len(continuation) :])
            likelihood = float(logits.gather(1, target[:, None]).sum())
            results.append((likelihood, bool((logits.argmax(-1) == target).all())))
        return results

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Greedy, like the tasks that generate; context `[1, T]`."""
        ids, prompt = context[0].tolist(), context.shape[1]
        while len(ids) < max_length:
            ids.append(int(reference_logits(self.model, ids, prompt)[-1].argmax()))
            text = self.tokenizer.decode(ids[prompt:])
            if any(word in text for word in stop):
                break
        return torch.tensor([ids])
