"""Generate without a server: `python examples/offline.py [MODEL]`; MODEL is a directory or a hub id."""

import sys

from miniserve import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)

prompts = ["Once upon a time", "One day a little girl named Lily", "The dog and the cat"]
for generation in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=48)):
    print(f"{generation.prompt!r} -> {generation.outputs[0].text!r}")

question = "Tom has 3 apples and buys 4 more. How many apples does he have?"
(answer,) = llm.chat([{"role": "user", "content": question}], SamplingParams(temperature=0.0, max_tokens=200))
print(f"\n{question}\n{answer.outputs[0].text}")
