"""Answers without a server, and how many decisions kept their layer: python examples/generate.py ckpt/example"""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file
    llm = LLM(sys.argv[1], max_model_len=1024, enforce_eager=True, disable_log_stats=False)
    for answer in llm.generate(["Once upon a time", "The sum of 2 and 3 is"], SamplingParams(max_tokens=20)):
        print(repr(answer.prompt), "->", repr(answer.outputs[0].text))
    for metric in llm.get_metrics():
        if metric.name in ("vllm:mod_kept", "vllm:mod_routed"):
            print(metric.name, "layer", metric.labels["layer"], metric.value)
