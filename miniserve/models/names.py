"""Names of models people type: what they may have meant, known without asking anybody."""

from __future__ import annotations

import difflib

# Names that no repository has but that everybody understands, each with the one repository that is meant by it.
ALIASES: dict[str, str] = {
    "Qwen/Qwen3-235B": "Qwen/Qwen3-235B-A22B",
    "Qwen/Qwen3-235B-Instruct": "Qwen/Qwen3-235B-A22B-Instruct-2507",
    "Qwen/Qwen3-235B-Thinking": "Qwen/Qwen3-235B-A22B-Thinking-2507",
    "Qwen/Qwen3-30B": "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-30B-Instruct": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "Qwen/Qwen3-30B-Thinking": "Qwen/Qwen3-30B-A3B-Thinking-2507",
    "Qwen/Qwen3-4B-Instruct": "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen3-4B-Thinking": "Qwen/Qwen3-4B-Thinking-2507",
    "Qwen/Qwen3-Coder-30B": "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "Qwen/Qwen3-Coder-480B": "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    "deepseek-ai/DeepSeek-V2-Lite-Base": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek-ai/DeepSeek-V2-Base": "deepseek-ai/DeepSeek-V2",
    "meta-llama/Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Llama-3-70B": "meta-llama/Meta-Llama-3-70B",
    "meta-llama/Llama-3-70B-Instruct": "meta-llama/Meta-Llama-3-70B-Instruct",
    "meta-llama/Llama-3.3-70B": "meta-llama/Llama-3.3-70B-Instruct",
    "meta-llama/Llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "meta-llama/Llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "meta-llama/Llama-2-70b-chat": "meta-llama/Llama-2-70b-chat-hf",
}

WELL_KNOWN: tuple[str, ...] = (
    *(f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")),
    *(f"Qwen/Qwen3-{size}-Base" for size in ("0.6B", "1.7B", "4B", "8B", "14B")),
    *(f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")),
    *(f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")),
    *(f"Qwen/Qwen2-{size}" for size in ("0.5B", "1.5B", "7B", "72B")),
    *(f"Qwen/Qwen2-{size}-Instruct" for size in ("0.5B", "1.5B", "7B", "72B")),
    "Qwen/QwQ-32B",
    *(f"meta-llama/Llama-3.2-{size}{kind}" for size in ("1B", "3B") for kind in ("", "-Instruct")),
    *(f"meta-llama/Llama-3.1-{size}{kind}" for size in ("8B", "70B", "405B") for kind in ("", "-Instruct")),
    *(f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")),
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-v0.3",
    *(f"mistralai/Mistral-7B-Instruct-v0.{version}" for version in (1, 2, 3)),
    "mistralai/Mistral-Nemo-Base-2407",
    "mistralai/Mistral-Nemo-Instruct-2407",
    "mistralai/Mistral-Small-24B-Instruct-2501",
    *(f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}" for size in ("1.5B", "7B", "14B", "32B")),
    *(f"deepseek-ai/DeepSeek-R1-Distill-Llama-{size}" for size in ("8B", "70B")),
    *(f"deepseek-ai/DeepSeek-{name}" for name in ("V2-Lite-Chat", "V2-Chat", "V2.5", "V3", "V3-0324", "R1", "R1-0528")),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    *(f"HuggingFaceTB/SmolLM2-{size}{kind}" for size in ("135M", "360M", "1.7B") for kind in ("", "-Instruct")),
    *sorted(set(ALIASES.values())),
)


def resolve_alias(name: str) -> str | None:
    """The repository meant by `name`, where the table knows it (letter case does not matter); None elsewhere."""
    return next((target for alias, target in ALIASES.items() if alias.lower() == name.lower()), None)


def suggest(name: str) -> str | None:
    """The well-known repository closest to `name`, or None where nothing is close or `name` itself is well known.

    Letter case does not count, and a name without an owner is compared with the part after the owner.
    """
    if name in WELL_KNOWN:
        return None
    by_key = {(full if "/" in name else full.partition("/")[2]).lower(): full for full in reversed(WELL_KNOWN)}
    found = difflib.get_close_matches(name.lower(), by_key, n=1, cutoff=0.75)
    return by_key[found[0]] if found else None
