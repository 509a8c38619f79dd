"""What int4q does not build in, on one model: what each would gain over it.

    python variants.py build/model build/text --variants bias head mixed rounding

- bias: a bias of the mean output error, ``(w - v) E[x]``, for every layer.
- tokens: GPTQ on four times the text. descent: its values improved one at a time, then a refit.
- head: the output head in 4 bits too. (Embeddings that are tied to it stay as they are.)
- mixed: groups of 32 for the tenth of the weights whose quantisation alone costs the most KL, paid
  for by groups of 256 where it costs the least: no more bytes.
- rounding: signed gradient descent on the rounding of all values of a block, for its outputs
  (Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", 2023), on 32,768 tokens.
"""

import copy
import functools

import torch
import torch.nn.functional as F
from bench import TOKENS, Bench, arguments, each, finish, quantized
from rounding import round_by_gradient
from torch import Tensor, nn

import int4q
from int4q import gptq, qparams
from int4q.packing import unpack_nibbles


def fitting(group: int, K: int) -> int:
    return next(g for g in (group, 128, 64, 32) if g <= group and K % g == 0)


def full(q: Tensor, s: Tensor, z: Tensor) -> Tensor:
    q = q.float().unflatten(-1, (s.shape[-1], -1))
    return (q * s.float()[..., None] + z.float()[..., None]).flatten(-2)


def by_search(bench: Bench, group: int):
    def quantize(name: str, w: Tensor) -> Tensor:
        importance = bench.text[name].mean_square
        q, s, z = qparams.quantize(w, fitting(group, w.shape[1]), "search", importance)
        return full(unpack_nibbles(q), s, z)

    return quantize


def by_gptq(
    bench: Bench, group: int, calibration: int4q.Calibration | None = None, sweeps: int = 0
):
    @functools.cache  # (several variants stand on it)
    def values(name: str) -> Tensor:
        w = bench.model.get_parameter(name).data
        K, moments = w.shape[1], (calibration or bench.text)[name]
        q, s, z, _ = gptq.quantize(w, fitting(group, K), moments.hessian, moments.tokens)
        q = unpack_nibbles(q).float()
        H = gptq.conditioned(moments.hessian, max(0.05, K / (K + int(moments.tokens))))
        for _ in range(sweeps):
            q = descended(w, H, q, s, z)
            s, z = gptq._refit(w, H, q, s, z)
        return full(q, s, z)

    return lambda name, w: values(name)


def descended(w: Tensor, H: Tensor, q: Tensor, s: Tensor, z: Tensor, block: int = 64) -> Tensor:
    """Every value in turn moved to where the error of the row is least."""
    group = w.shape[1] // s.shape[1]
    pull = (w - full(q, s, z)) @ H
    q = q.clone()
    for start in range(0, w.shape[1], block):
        columns = slice(start, start + block)
        p, moved = pull[:, columns].T.contiguous(), torch.empty_like(q[:, columns]).T.contiguous()
        for i, k in enumerate(range(start, min(start + block, w.shape[1]))):
            scale = s[:, k // group]
            new = (q[:, k] + p[i] / (H[k, k] * scale)).round().clamp(-8, 7)
            moved[i] = (new - q[:, k]) * scale
            q[:, k] = new
            p.addr_(H[k, columns], moved[i], alpha=-1)
        pull.addmm_(moved.T, H[columns], alpha=-1)
    return q


def means(bench: Bench) -> dict[str, Tensor]:
    """E[x] of every input."""
    sums, handles = {}, []
    rows = bench.calibration_ids[: TOKENS // bench.calibration_ids.shape[1]]
    for name in bench.weights():

        def add(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).sum(0)

        handles.append(bench.model.get_submodule(name).register_forward_pre_hook(add))
    with torch.no_grad():
        for row in rows:
            bench.model(row[None].to(bench.device))
    for handle in handles:
        handle.remove()
    return {name: total / rows.numel() for name, total in sums.items()}


def with_bias(bench: Bench, quantize):
    mean = means(bench)

    def change(model: nn.Module) -> None:
        for name in bench.weights():
            layer = model.get_submodule(name)
            v = quantize(f"{name}.weight", layer.weight.data)
            error = (layer.weight.data - v) @ mean[name]
            layer.bias = nn.Parameter(error if layer.bias is None else layer.bias + error)
            layer.weight.data = v

    return change


def with_head(bench: Bench, change, quantize):
    def both(model: nn.Module) -> None:
        change(model)
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(quantize("lm_head.weight", head.weight.data))

    return both


@torch.no_grad()
def sensitivity(bench: Bench, group: int) -> dict[str, float]:
    """KL per weight of the whole model, on other calibration text, when one layer is quantised."""
    rows, quantize, costs = bench.calibration_ids[-1:].to(bench.device), by_search(bench, group), {}
    model = copy.deepcopy(bench.model)
    exact = model(rows).logits.log_softmax(-1)
    for name in bench.weights():
        layer = model.get_submodule(name)
        kept = layer.weight.data
        layer.weight.data = quantize(f"{name}.weight", kept)
        found = model(rows).logits.log_softmax(-1)
        costs[name] = F.kl_div(found, exact, log_target=True, reduction="sum").item() / kept.numel()
        layer.weight.data = kept
    return costs


def mixed_groups(shapes: dict[str, tuple[int, int]], costs: dict[str, float]) -> dict[str, int]:
    """Names -> group sizes: together no more scales than with 128 (or what fits) everywhere.

    The costliest layers take 32, up to a tenth of all weights, for as long as the least costly can
    pay for them by taking 256.
    """
    groups = {n: fitting(128, K) for n, (_, K) in shapes.items()}
    size = {n: N * K for n, (N, K) in shapes.items()}
    worst = sorted(costs, key=costs.get, reverse=True)
    payers = [n for n in reversed(worst) if shapes[n][1] % 256 == 0]
    budget, credit = 0.1 * sum(size.values()), 0.0
    for name in worst:
        owed, payed = size[name] * (1 / 32 - 1 / groups[name]), []
        budget -= size[name]
        payers = [n for n in payers if n != name]
        while credit < owed and payers:
            payed.append(payers.pop(0))
            credit += size[payed[-1]] * (1 / groups[payed[-1]] - 1 / 256)
        if credit < owed or budget < 0:
            break
        groups |= {name: 32, **dict.fromkeys(payed, 256)}
        credit -= owed
    return groups


def run(bench: Bench, group: int, variants: list[str]) -> None:
    names, quantize, swept = bench.weights(), by_search(bench, group), by_gptq(bench, group)
    bench.measure("min-max", group, quantized("tinygemm", group, None))
    bench.measure("search, text", group, each(names, quantize))
    bench.measure("gptq, text", group, each(names, swept))
    if "bias" in variants:
        bench.measure("search + bias", group, with_bias(bench, quantize))
        bench.measure("gptq + bias", group, with_bias(bench, swept))
    if "tokens" in variants:
        rows = 4 * TOKENS // bench.calibration_ids.shape[1]
        more = int4q.calibrate(bench.model, bench.calibration_ids[:rows], statistics="hessian")
        bench.measure("gptq, four times the text", group, each(names, by_gptq(bench, group, more)))
    if "descent" in variants:
        bench.measure("gptq + 2 descents", group, each(names, by_gptq(bench, group, sweeps=2)))
    if "head" in variants:
        head = with_head(bench, lambda model: None, by_search(bench, group))
        bench.measure("head alone, search", group, head)
        both = with_head(bench, each(names, swept), by_search(bench, group))
        bench.measure("gptq, head by search", group, both)
    if "mixed" in variants and group == 128:
        shapes = {n: tuple(bench.model.get_submodule(n).weight.shape) for n in names}
        groups = mixed_groups(shapes, sensitivity(bench, group))
        for label, method in (("search", by_search), ("gptq", by_gptq)):
            of = {g: method(bench, g) for g in set(groups.values())}
            picked = each(names, lambda n, w, of=of: of[groups[n.removesuffix(".weight")]](n, w))
            bench.measure(f"{label}, mixed groups", group, picked)
    if "rounding" in variants:
        for start, rate in (("search", 5e-3), ("gptq", 2e-3)):
            change = round_by_gradient(bench, group, start, rate)
            bench.measure(f"{start} + rounding by gradient", group, change)


if __name__ == "__main__":
    parser = arguments(__doc__)
    kinds = ["bias", "tokens", "descent", "head", "mixed", "rounding"]
    parser.add_argument("--variants", nargs="+", default=kinds, choices=kinds)
    given = parser.parse_args()
    bench = Bench(given.model, given.texts, given.device, given.rows)
    for group in given.groups:
        run(bench, group, given.variants)
    finish(bench, given.json)
