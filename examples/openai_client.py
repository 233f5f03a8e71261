"""The official OpenAI client against a running server.

miniserve run --no-chat                                        # in one terminal
pip install openai && python examples/openai_client.py         # in another
"""

from __future__ import annotations

import argparse
import math

from openai import BadRequestError, OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Completions, chat, streaming and logprobs.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="what the server was started with, if anything")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key=arguments.api_key)
    model = client.models.list().data[0].id
    print(f"model: {model}\n")

    completion = client.completions.create(model=model, prompt="Once upon a time", max_tokens=24, temperature=0)
    print(f"completion: Once upon a time{completion.choices[0].text}\n")

    question = "Tom has 17 apples and finds 25 more. How many apples does Tom have now?"
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_completion_tokens=100, temperature=0
    )
    print(f"chat: {question}\n{chat.choices[0].message.content}\n")

    print("stream: ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me a story about a fox named Ruby."}],
        max_completion_tokens=80,
        temperature=0.7,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f" … ({chunk.usage.completion_tokens} tokens)\n")

    scored = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is 6 + 7?"}],
        max_completion_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    print("logprobs:")
    logprobs = scored.choices[0].logprobs
    for token in logprobs.content or [] if logprobs else []:
        others = ", ".join(f"{other.token!r} {math.exp(other.logprob):.1%}" for other in token.top_logprobs)
        print(f"  {token.token!r:12} {others}")

    try:
        client.completions.create(model=model, prompt="", temperature=-1)
    except BadRequestError as error:
        print(f"\na refused request: {error.message}")


if __name__ == "__main__":
    main()
