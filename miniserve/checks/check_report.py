"""The findings of `miniserve check`: as text, and as a file to send to others."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from miniserve.attention.routes import ASM_WRONG_LENGTHS
from miniserve.bench.report import header, write_json
from miniserve.checks.check_paths import AttentionPath, Machine, PathResults
from miniserve.checks.check_tokens import Comparison
from miniserve.core import UserError
from miniserve.runner.self_check import CheckResult


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """attention: self-check results by path; tokens: the engine's answers compared with transformers, None if they were
    not compared."""

    model: str
    machine: Machine
    attention: dict[AttentionPath, PathResults]
    tokens: list[Comparison] | None

    @property
    def ok(self) -> bool:
        return all(each.ok for each in (*self.attention.values(), *(self.tokens or ())))

    def lines(self) -> list[str]:
        """The findings, a line for each path and each answer, failures spelled out."""
        lines = []
        for path, results in self.attention.items():
            worst = max((result.error for result in results.checks), default=0.0)
            lines.append(f"{_mark(results.ok)} {path}: {len(results.checks)} checks, largest error {worst:.2%}")
            lines += [f"     {result.sentence()}" for result in results.checks if not result.ok]
            if results.asm_lengths is not None:
                low, high = ASM_WRONG_LENGTHS
                found = "correct, and is used for them" if results.asm_lengths else "wrong, and is not used for them"
                lines.append(f"     for lengths {low}…{high} the ASM kernel is {found}")
        for each in self.tokens or ():
            lines.append(f"{_mark(each.ok)} {each.sentence()}")
        return lines

    def write(self, path: Path) -> None:
        """Write Markdown if the name ends in .md, else JSON. Raises `UserError` if the file cannot be written."""
        if path.suffix != ".md":
            write_json(path, self.to_json())
            return
        try:
            path.write_text(self._markdown(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror}; name another file with --report.") from error

    def to_json(self) -> dict[str, Any]:
        return header("check") | {
            "model": self.model,
            "ok": self.ok,
            "device": self._device(),
            "attention": [
                asdict(path)
                | {"checks": [_plain(result) for result in results.checks], "asm_lengths_right": results.asm_lengths}
                for path, results in self.attention.items()
            ],
            "tokens": None if self.tokens is None else [each.to_json() for each in self.tokens],
        }

    def _device(self) -> dict[str, Any]:
        platform = dataclasses.asdict(self.machine.platform)
        runtime = {"cuda": torch.version.cuda, "hip": torch.version.hip}
        name = torch.cuda.get_device_name(self.machine.device) if self.machine.device.type == "cuda" else "CPU"
        return {"name": name, **platform, **runtime}

    def _markdown(self) -> str:
        about = header("check")
        device = {key: value for key, value in self._device().items() if value not in (None, False)}
        rows = [
            f"# miniserve check: {'passed' if self.ok else 'FAILED'}",
            f"- model: {self.model}",
            f"- date: {about['date']}",
            f"- command: `{about['command']}`",
            *(f"- {key}: {value}" for key, value in device.items()),
            *(f"- {key}: {value}" for key, value in about["machine"]["versions"].items()),
            "",
            "```",
            *self.lines(),
            "```",
        ]
        return "\n".join(rows) + "\n"


def _mark(ok: bool) -> str:
    return "ok  " if ok else "FAIL"


def _plain(result: CheckResult) -> dict[str, Any]:
    """JSON has no infinity and no NaN."""
    found = asdict(result) | {"ok": result.ok}
    return found | {"error": result.error if math.isfinite(result.error) else None}
