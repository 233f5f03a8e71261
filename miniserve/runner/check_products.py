"""Before kernels of `models/layers/contracts.py` are used they run at the model's own shapes, beside float32: aiter's,
whose choice may be wrong or none where these have no tuned kernel, all that read weights in 8 bits, and those that
choose experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.core import summary
from miniserve.models.decoder import CausalLM
from miniserve.models.layers.contracts import TRITON_ROUTER, ProductContract
from miniserve.models.layers.experts import Experts, GroupedMoE
from miniserve.models.layers.linear import PLAIN, Linear, LinearMethod, Packing
from miniserve.models.layers.norm import Normed, Residual, RMSNorm
from miniserve.models.layers.ops import Ops, PendingSum
from miniserve.models.layers.routing import Router, route
from miniserve.models.layers.weights import ScaledWeights
from miniserve.parallel.group import Alone
from miniserve.parallel.settle import all_values
from miniserve.runner.self_check import TOLERANCE, distance

_FLOAT32 = Packing("float32", lambda weight: weight, lambda x, weight, _: functional.linear(x, weight.float()))
# Of steps: kernels for few tokens and for many differ.
_TOKENS = (1, 16, 128, 1024)
_NEAR_TIES = 1 / 256  # most tokens that may get other experts than float64 chooses, as two are about equally good


def product_failure(model: CausalLM, most_tokens: int) -> tuple[str, str] | None:
    """The first kernel that gets layers like one of the model's wrong, on any rank: its contract's name, and what is
    wrong, a sentence; in steps of up to `most_tokens`. The weights are made up, and as large as a layer's while it
    runs. Ranks call it together and are told the same."""
    for found in all_values(model.options.group, _own_failure(model, most_tokens) or (), tuple[str, ...]):
        if found:
            return found[0], found[1]
    return None


def _own_failure(model: CausalLM, most_tokens: int) -> tuple[str, str] | None:
    tried = set()
    router = next((layer for layer in model.modules() if isinstance(layer, Router)), None)
    if router is not None and type(router.ops).choose_experts is not Ops.choose_experts:
        sentence = _wrong_choice(model, router, most_tokens)
        if sentence is not None:
            return TRITON_ROUTER, sentence
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear | Experts):
            continue
        like = tuple((key, tuple(each.shape), each.dtype) for key, each in layer.named_parameters(recurse=False))
        counts = sorted({min(count, most_tokens) for count in _TOKENS})
        cases = [(count, kernel) for count in counts if (kernel := _checked(layer, count)) is not None]
        if not cases or like in tried:
            continue
        tried.add(like)
        kernel, tolerance = cases[0][1], 0.0
        try:
            run = _both(model, name, layer)
            for count, kernel in cases:
                got, want = run(count)
                # Of rows, not of the whole: one wrong row must not be lost among many.
                error = max(map(distance, got.float(), want))
                tolerance = kernel.tolerance or TOLERANCE[model.options.dtype]
                if not error <= tolerance:  # NaN too
                    return kernel.name, f"for {count} tokens it is {error:.2%} off ({tolerance:.0%} allowed)"
        except Exception as error:  # what a kernel raises is a failure, whatever it is
            return kernel.name, summary(error)
    return None


def _wrong_choice(model: CausalLM, router: Router, most_tokens: int) -> str | None:
    """What is wrong with the kernels of routers like this one, a sentence."""
    device, dtype, (num_experts, size) = model.options.device, model.options.dtype, router.weight.shape
    tried, norm = Router(size, router.moe, router.ops), RMSNorm(size, 1e-6, dtype, router.ops, Alone())
    for layer in (tried, norm):
        layer.allocate(device)
        layer.fill_dummy("gate", 0)
    generator = torch.Generator(device=device).manual_seed(0)
    try:
        for count in sorted({min(count, most_tokens) for count in _TOKENS}):
            part, stream = torch.randn(2, count, size, device=device, generator=generator).to(dtype)
            x = Normed(norm, Residual(stream, part))
            weights, ids = tried.ops.choose_experts(tried, x)
            logits = x.read().double() @ tried.weight.double().T
            best, best_ids = route(logits, tried.moe, tried.e_score_correction_bias)
            known = ids.long().clamp(-1, num_experts) % (num_experts + 1)  # the last stands for those there are not
            got, want = (
                torch.zeros(count, num_experts + 1, dtype=best.dtype, device=device).scatter(1, which, each)
                for each, which in ((weights.to(best.dtype), known), (best, best_ids))
            )
            wrong = int((~((got - want).abs().amax(1) <= TOLERANCE[torch.float32] * want.amax(1))).sum())  # NaN too
            if wrong > _NEAR_TIES * count:
                return f"for {count} tokens it chooses wrongly for {wrong}"
    except Exception as error:  # what a kernel raises is a failure, whatever it is
        return summary(error)
    return None


def _checked(layer: Linear | Experts, num_tokens: int) -> ProductContract | None:
    """The kernel that multiplies so many tokens, if it is one to be tried."""
    route = layer.method.route
    kernel = None if route is None else route.kernel(num_tokens)
    return kernel if kernel is not None and (kernel.requires == "aiter" or "plain" not in kernel.grains) else None


def _both(model: CausalLM, name: str, layer: Linear | Experts) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A function of a number of tokens that gives what a layer like this one makes of them, and what it should."""
    device, dtype = model.options.device, model.options.dtype
    generator = torch.Generator(device=device).manual_seed(0)
    tried, exact = _linears(model, name, layer) if isinstance(layer, Linear) else _experts(model, name, layer)
    for each in (exact, tried):
        each.allocate(device)
        each.fill_dummy(name, 0)  # the same numbers, as their tensors have the same names
        each.finish()

    def run(count: int) -> tuple[Tensor, Tensor]:
        width = layer.in_features if isinstance(layer, Linear) else layer.hidden_size
        x = torch.randn(count, width, device=device, generator=generator).to(dtype)
        choice: tuple[Tensor, ...] = ()
        if isinstance(layer, Experts) and model.config.moe is not None:
            scores = torch.rand(count, layer.experts.count, device=device, generator=generator)
            choice = tuple(scores.topk(model.config.moe.top_k, dim=-1))
        got = tried(x, *choice)
        return got.total(x) if isinstance(got, PendingSum) else got, exact(x.float(), *choice)

    return run


def _linears(model: CausalLM, name: str, layer: Linear) -> tuple[Linear, Linear]:
    tried = model.options.within(name.rpartition(".")[0]).linear(layer.columns, layer.outputs, bias=False)
    form = tried.weights.form
    weights = None if form is None else ScaledWeights(form, widened=True)
    exact = LinearMethod()
    return tried, Linear(layer.columns, layer.outputs, bias=False, dtype=torch.float32, method=exact, weights=weights)


def _experts(model: CausalLM, name: str, layer: Experts) -> tuple[Experts, Experts]:
    if model.config.moe is None:
        raise ValueError("a model without experts has none to try")
    tried = model.options.within(name).experts_of(model.config.moe, layer.hidden_size)
    sizes = layer.experts, layer.hidden_size, layer.width
    if tried.weights.form is not None:
        weights = ScaledWeights(tried.weights.form, widened=True)
        return tried, Experts(*sizes, dtype=torch.float32, method=GroupedMoE(PLAIN), weights=weights)
    return tried, Experts(*sizes, dtype=layer.dtype, method=GroupedMoE(_FLOAT32))
