"""Train a built-in model from scratch: tokenizer, weights, held-out scores. One command for each:

    python -m tools.train_tiny --out miniserve/assets/tiny-qwen3
    python -m tools.train_tiny --arch deepseek --out tiny-deepseek

Three minutes on one H100; on a CPU it runs too, slowly. `--steps 18000 --batch-size 65536`, eight minutes, gives a
slightly better model; `--only-eval` measures the existing model. All data are generated while it trains (tiny_data.py,
tiny_stories.py, tiny_chat.py); nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tools.tiny_chat import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, Segment, document, text_of
from tools.tiny_data import Problem, chat_messages, completion_prompt, final_answer, problems
from tools.tiny_models import ARCHITECTURES, MAX_POSITIONS, VOCAB_SIZE, balance_experts, convert

REPORT = "scores.json"
BALANCE_SPEED = 1e-3  # change of an expert's routing bias per step, while the learning rate is at its peak
IGNORED = -100  # the label that cross_entropy ignores
# Rows of a batch are all this long; the shares make most steps cheap and still teach every position.
ROW_LENGTHS = ((512, 0.7), (MAX_POSITIONS, 0.3))
# Qwen's pre-tokenizer: words take their leading space along, every digit stands alone.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def train_tokenizer(seed: int, documents: int) -> Tokenizer:
    """A byte-level BPE over generated documents; no merge ever crosses a digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer:{seed}")
    tokenizer.train_from_iterator((_plain(document(rng)) for _ in range(documents)), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _plain(segments: Sequence[Segment]) -> str:
    text = text_of(segments)
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    return text


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


class Batches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Step -> (input_ids, labels), int64 [rows, length]; the same for the same seed, whatever the worker count.

    Every row starts with the start of a document and is filled with whole documents, the last one cut.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, steps: int, tokens_per_step: int) -> None:
        self.tokenizer, self.seed, self.steps, self.tokens_per_step = tokenizer, seed, steps, tokens_per_step

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(f"train:{self.seed}:{step}")
        length = rng.choices([length for length, _ in ROW_LENGTHS], [share for _, share in ROW_LENGTHS])[0]
        rows = max(1, self.tokens_per_step // length)
        ids, labels = [], []
        encoded = self._encoded_documents(rng)
        for _ in range(rows):
            row: list[int] = []
            row_labels: list[int] = []
            while len(row) <= length:
                tokens, learn = next(encoded)
                row += tokens
                row_labels += learn
            ids.append(row[:length])
            labels.append(row_labels[1 : length + 1])
        return torch.tensor(ids), torch.tensor(labels)

    def _encoded_documents(self, rng: random.Random) -> Iterator[tuple[list[int], list[int]]]:
        while True:
            drawn = [document(rng) for _ in range(32)]
            texts = [text for segments in drawn for text, _ in segments]
            encodings = iter(self.tokenizer.encode_batch_fast(texts))
            for segments in drawn:
                tokens: list[int] = []
                labels: list[int] = []
                for _, learn in segments:
                    piece = next(encodings).ids
                    tokens += piece
                    labels += piece if learn else [IGNORED] * len(piece)
                yield tokens, labels


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, a plateau, then a linear fall to zero over the last two fifths."""
    warmup, decay = min(200, steps // 10 + 1), 0.4 * steps
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / decay)


def optimizer_for(model: PreTrainedModel, peak: float) -> torch.optim.Optimizer:
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=fused)


def train(model: PreTrainedModel, batches: Batches, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Run all steps: bf16 autocast over fp32 weights; returns the run's duration and final loss."""
    optimizer = optimizer_for(model, args.lr)

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    loader = DataLoader(
        batches, batch_size=None, num_workers=args.workers, prefetch_factor=8 if args.workers else None,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    model.train()
    started = time.perf_counter()
    recent: list[torch.Tensor] = []
    mean = float("nan")
    for step, (ids, labels) in enumerate(loader):
        rate = learning_rate(step, args.steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step_loss(ids.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance_experts(model, BALANCE_SPEED * rate / args.lr)
        recent.append(loss.detach())
        if len(recent) == args.log_every or step + 1 == args.steps:
            mean = torch.stack(recent).mean().item()
            recent.clear()
            seconds = time.perf_counter() - started
            speed = (step + 1) * args.batch_size / seconds
            print(f"step {step + 1}/{args.steps}  loss {mean:.4f}  {speed:,.0f} tokens/s  {seconds:.0f} s", flush=True)
    seconds = time.perf_counter() - started
    return {"loss": round(mean, 4), "seconds": round(seconds), "tokens": args.steps * args.batch_size}


Form = Callable[[PreTrainedTokenizerFast, Problem], str]


def _chat_prompt(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> str:
    text = tokenizer.apply_chat_template(chat_messages(problem), tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def _raw_prompt(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> str:
    return completion_prompt(problem)


def _five_shot_prompt(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> str:
    return completion_prompt(problem, list(problems("train", seed=int(problem.final), count=5)))


FORMS: dict[str, Form] = {"completion": _raw_prompt, "chat": _chat_prompt, "five_shot": _five_shot_prompt}


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], max_tokens: int, greedy: bool
) -> list[str]:
    """Continuations of the prompts, as one padded batch, cut at the first end token."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    sampling: dict[str, Any] = (
        {"do_sample": False, "temperature": None, "top_p": None} if greedy else {"do_sample": True}
    )
    output = model.generate(**inputs, max_new_tokens=max_tokens, **sampling)
    continued = output[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(continued, skip_special_tokens=True)]


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, form: str, held_out: Sequence[Problem]
) -> dict[str, float]:
    """Greedy exact match of the final answer: "all" and per template."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(held_out), 256):
        part = held_out[start : start + 256]
        prompts = [FORMS[form](tokenizer, problem) for problem in part]
        for problem, text in zip(part, generate(model, tokenizer, prompts, 128, greedy=True), strict=True):
            hit = final_answer(text) == problem.final
            right[problem.template].append(hit)
            right["all"].append(hit)
    return {template: sum(hits) / len(hits) for template, hits in sorted(right.items())}


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, dict[str, Any]]:
    """Exact match on `count` held-out problems, in each form and dtype; the five-shot prompts on a quarter of them."""
    held_out = list(problems("test", seed=0, count=count))
    scores: dict[str, dict[str, Any]] = {}
    model.eval()
    for dtype in (torch.float32, torch.bfloat16):
        convert(model, dtype)
        name = str(dtype).removeprefix("torch.")
        scores[name] = {}
        for form in FORMS:
            asked = held_out[: count // 4] if form == "five_shot" else held_out
            scores[name][form] = exact_match(model, tokenizer, form, asked)
            print(f"{name} {form}: exact match {scores[name][form]['all']:.4f} of {len(asked)}", flush=True)
    return scores


def show_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = (
        "Hello!",
        "Who are you?",
        "Tell me a story about a fox.",
        "What is 27 + 48?",
        "What is the capital of Peru?",
    )
    chats = [[{"role": "user", "content": text}] for text in asked]
    prompts = [str(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)) for c in chats]
    for text, reply in zip(asked, generate(model, tokenizer, prompts, 300, greedy=False), strict=True):
        print(f"\n> {text}\n{reply}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the model")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="qwen3")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch-size", type=int, default=32768, help="tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 1), help="data processes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--tokenizer-documents", type=int, default=20000)
    parser.add_argument("--eval", type=int, default=2000, help="held-out problems to measure on; 0 for none")
    parser.add_argument("--only-eval", action="store_true", help="measure the model in --out instead of training one")
    return parser.parse_args()


def train_and_save(args: argparse.Namespace, device: torch.device) -> None:
    """Tokenizer, weights and generation config from nothing into `args.out`, with a report of the run."""
    bare = train_tokenizer(args.seed, args.tokenizer_documents)
    tokenizer = wrap_tokenizer(bare)
    model = ARCHITECTURES[args.arch](tokenizer).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True)
    run = train(model, Batches(bare, args.seed, args.steps, args.batch_size), args, device)

    convert(model, torch.bfloat16)
    ends = [bare.token_to_id(TURN_END), bare.token_to_id(END_OF_TEXT)]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=0.7, top_p=0.95
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    settings = {key: getattr(args, key) for key in ("arch", "steps", "batch_size", "lr", "seed", "tokenizer_documents")}
    write_report(args.out, {"settings": settings, "training": {"machine": machine(device), **run}})


def machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


def write_report(out: Path, report: dict[str, Any]) -> None:
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the data processes are the parallelism
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if not args.only_eval:
        torch.set_float32_matmul_precision("high")
        train_and_save(args, device)
        torch.set_float32_matmul_precision("highest")
    tokenizer = AutoTokenizer.from_pretrained(args.out, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.out).to(device).eval()
    if args.eval:
        report = json.loads((args.out / REPORT).read_text(encoding="utf-8"))
        report["evaluation"] = {
            "machine": machine(device),
            "held_out_problems": args.eval,
            "exact_match": measure(model, tokenizer, args.eval),
        }
        write_report(args.out, report)
    show_samples(model, tokenizer)


if __name__ == "__main__":
    main()
