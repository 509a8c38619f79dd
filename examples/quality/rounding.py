"""Rounding by signed gradient descent, block by block: for variants.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import int4q
from int4q import gptq, qparams
from int4q.packing import unpack_nibbles

STEPS, ROWS = 200, 8
REACH = 0.49  # of a step: how far a value may lie from the one it is rounded to, to begin with


class Rounded:
    """The weight of one layer as a function of what is learned.

    ``v``: where every value lies before it is rounded, less where it began; ``a``, ``b``: changes
    of scale and zero point, in scales.
    """

    def __init__(self, w: Tensor, group: int, moments: int4q.calibration.Moments, start: str):
        K = w.shape[1]
        size = next(g for g in (group, 128, 64, 32) if g <= group and K % g == 0)
        if start == "gptq":
            q, s, z, _ = gptq.quantize(w, size, moments.hessian, moments.tokens)
        else:
            q, s, z = qparams.quantize(w, size, "search", moments.mean_square)
        self.s, self.z = (t.float()[..., None] for t in (s, z))
        q = unpack_nibbles(q).float().unflatten(-1, (K // size, -1))
        # From the values there are, towards the side of the original weight.
        self.start = q + ((w.view_as(q) - self.z) / self.s - q).clamp(-REACH, REACH)
        self.v, self.a, self.b = (torch.zeros_like(t) for t in (q, self.s, self.z))

    def weight(self, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        u = self.start + v
        q = (u + (u.round() - u).detach()).clamp(-8, 7)
        return ((q + b) * self.s * (1 + a) + self.z).flatten(-2)


def learn(
    block: nn.Module, kw: dict, inputs: Tensor, targets: Tensor, of: dict[str, Rounded], rate: float
):
    """Signed gradient descent, the rate falling to 0; the best values met are kept."""
    learned = {n: [p.requires_grad_() for p in (r.v, r.a, r.b)] for n, r in of.items()}
    parameters = [p for ps in learned.values() for p in ps]
    best, kept = float("inf"), None
    for step in range(STEPS):
        rows = torch.randperm(len(inputs), device=inputs.device)[:ROWS]
        weights = {f"{n}.weight": of[n].weight(*p) for n, p in learned.items()}
        with torch.autocast(inputs.device.type, torch.bfloat16):
            out = functional_call(block, weights, (inputs[rows],), kw)
        loss = F.mse_loss((out[0] if isinstance(out, tuple) else out).float(), targets[rows])
        if step % 10 == 0:
            with torch.no_grad():
                whole = error(
                    block, kw, inputs, targets, {n: r.weight(r.v, r.a, r.b) for n, r in of.items()}
                )
            if whole < best:
                best, kept = (
                    whole,
                    {n: [p.detach().clone() for p in ps] for n, ps in learned.items()},
                )
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):  # (pairs move a tenth as far)
                p -= rate * (1 - step / STEPS) * (1 if p.shape[-1] > 1 else 0.1) * g.sign()
    return {n: of[n].weight(*ps).detach() for n, ps in kept.items()}


@torch.no_grad()
def outputs(block: nn.Module, kw: dict, x: Tensor) -> Tensor:
    got = [block(part, **kw) for part in x.split(ROWS)]
    return torch.cat([t[0] if isinstance(t, tuple) else t for t in got])


@torch.no_grad()
def error(
    block: nn.Module, kw: dict, x: Tensor, targets: Tensor, weights: dict[str, Tensor]
) -> float:
    weights = {f"{n}.weight": w for n, w in weights.items()}
    with torch.autocast(x.device.type, torch.bfloat16):
        got = [functional_call(block, weights, (part,), kw) for part in x.split(ROWS)]
    got = torch.cat([t[0] if isinstance(t, tuple) else t for t in got])
    return F.mse_loss(got.float(), targets).item()


def round_by_gradient(bench, group: int, start: str, rate: float, tokens: int = 32768):
    """A change for ``Bench.measure``: blocks in order, on the inputs that quantised ones give."""

    def change(model: nn.Module) -> None:
        torch.manual_seed(0)
        model.requires_grad_(False)
        ids = bench.calibration_ids[: tokens // bench.calibration_ids.shape[1]]
        ids = ids[: len(ids) // ROWS * ROWS].to(bench.device)
        blocks, seen = model.model.layers, []
        hook = blocks[0].register_forward_pre_hook(
            lambda m, args, kw: seen.append((args[0], kw)), with_kwargs=True
        )
        with torch.no_grad():
            for part in ids.split(ROWS):
                model(part, use_cache=False)
        hook.remove()
        kw = {**seen[0][1], "use_cache": False}
        exact = rounded = torch.cat([x for x, _ in seen])
        for i, block in enumerate(blocks):
            targets = outputs(block, kw, exact)
            of = {}
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    moments = bench.text[f"model.layers.{i}.{name}.weight"]
                    of[name] = Rounded(module.weight.data, group, moments, start)
            for name, w in learn(block, kw, rounded, targets, of, rate).items():
                block.get_submodule(name).weight.data = w
            exact, rounded = targets, outputs(block, kw, rounded)

    return change
