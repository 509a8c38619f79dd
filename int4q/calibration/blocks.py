"""Moments of one block of a model at a time, for Hessians that do not fit into memory together.

For every block the model's own ``forward`` runs: the blocks before it return what the last of them
gave at its turn, without running, and what comes behind it is not reached. So masks, positions and
what else a model gives its blocks are right, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from int4q import errors
from int4q.calibration.data import Call
from int4q.calibration.moments import Calibration, Moments
from int4q.calibration.watch import Gathering, in_eval_mode, weights


class BlockwiseCalibration(Calibration):
    """A :class:`Calibration` that gathers as it is asked, in the order of the blocks.

    When the first weight of a block is asked for, those of the block before are dropped and the
    model runs up to this one. Weights outside of blocks are known from the first block on, if they
    come before it, and after the last one otherwise.

    Args:
        model: as it is to be quantised, block after block.
        calls: of the model.
        with_hessian: gather Hessians too.
        device: where blocks run; by default where they are.

    Raises:
        ValueError: the model has no chain of blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: list[Call],
        with_hessian: bool,
        device: torch.types.Device = None,
    ):
        super().__init__({})
        self._model, self._calls, self._with_hessian = model, calls, with_hessian
        self._device = device
        self._chains = self._regular_chains()
        self._stages = [(chain, i) for chain in self._chains for i in range(len(chain.blocks))]
        in_blocks = {m: s for s, (chain, i) in enumerate(self._stages) for m in chain.within(i)}
        self._outside = [m for m in model.modules() if m not in in_blocks]
        self._stage_of = {n: in_blocks.get(module) for n, module, _ in weights(model)}
        self._stage, self._call = -1, 0
        self._before_blocks: dict[str, Moments] = {}
        self._verify()

    def __getitem__(self, name: str) -> Moments:
        stage = self._stage_of[name]
        if stage is None:
            self._advance(max(self._stage, 0))
            if name in self._before_blocks:
                return self._before_blocks[name]
            stage = len(self._stages)
        if stage < self._stage:
            rule = "moments by block must be asked for in the order of the blocks"
            raise errors.value(rule, f"{name}, whose block is past")
        self._advance(stage)
        return self._moments[name]

    def __contains__(self, name: object) -> bool:
        return name in self._stage_of  # (a weight that is never reached, too: nothing runs here)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stage_of)

    def __len__(self) -> int:
        return len(self._stage_of)

    def __repr__(self) -> str:
        kind = "with Hessians" if self._with_hessian else "without Hessians"
        done = min(max(self._stage, 0), len(self._stages))
        return f"BlockwiseCalibration(block {done} of {len(self._stages)}, {kind})"

    @property
    def has_hessians(self) -> bool:
        """Whether ``gptq`` can use it."""
        return self._with_hessian

    def save(self, path: Any) -> NoReturn:
        """Refused: what is past is gone."""
        raise errors.value(
            "a calibration by block holds one block and cannot be saved",
            self,
            "Calibrate with by_block=False to save all of it",
        )

    def _advance(self, stage: int) -> None:
        """Run the blocks up to this one, which is gathered from (one more: what is behind)."""
        while self._stage < stage:
            turn = self._stage + 1
            self._moments = {}  # (before those of the next one are summed up)
            first, behind = turn == 0, turn == len(self._stages)
            within: list[nn.Module] = []
            if first or behind:
                within += self._outside
            if turn == stage and not behind:
                chain, i = self._stages[stage]
                within += chain.within(i)
            self._moments = self._run(turn, self._calls, within)
            self._stage = turn
            if first:
                outside = {n for n, s in self._stage_of.items() if s is None}
                self._before_blocks = {n: m for n, m in self._moments.items() if n in outside}

    def _run(
        self, stage: int, calls: list[Call], within: Collection[nn.Module]
    ) -> dict[str, Moments]:
        """Run one block, keep its outputs, and gather the moments of some modules."""
        chain, i = self._stages[stage] if stage < len(self._stages) else (None, 0)
        block = None if chain is None else chain.blocks[i]
        outputs = []
        with torch.no_grad(), in_eval_mode(self._model), _moved(block, self._device):
            gathering = Gathering(self._model, self._with_hessian, set(within))
            with self._replaying(block), gathering:
                for self._call, (arguments, keywords) in enumerate(calls):
                    try:
                        self._model(*arguments, **keywords)
                    except _Reached as reached:
                        outputs.append(reached.output)
        if chain is not None:
            if len(outputs) != len(calls):
                raise _irregular("one that some batches do not call")
            chain.outputs, chain.done = outputs, i
        return gathering.result()

    @contextmanager
    def _replaying(self, wanted: nn.Module | None) -> Iterator[None]:
        """Blocks that had their turn return what is kept; the one that is wanted ends the run."""
        blocks = [(chain, i, b) for chain in self._chains for i, b in enumerate(chain.blocks)]
        before = {b: b.__dict__.get("forward") for *_, b in blocks}  # (accelerate sets its own)
        try:
            for chain, i, block in blocks:
                block.__dict__["forward"] = self._forward(chain, i, block is wanted)
            yield
        finally:
            for block, forward in before.items():
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.__dict__["forward"] = forward

    def _forward(self, chain: _Chain, i: int, wanted: bool) -> Callable[..., Any]:
        """What stands in for a block's own ``forward``."""
        block = chain.blocks[i]
        real = block.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            if i <= chain.done:
                return chain.outputs[self._call]
            with _moved(block, self._device):
                output = _run_on(self._device, real, arguments, keywords)
            if wanted:
                raise _Reached(output)
            return output

        return forward

    # --- which blocks there are -------------------------------------------------------------------

    def _regular_chains(self) -> list[_Chain]:
        """Outermost module lists whose modules run once each, on what the one before returned."""
        self._chains = [_Chain(blocks) for blocks in _outermost_lists(self._model)]
        seen: list[_Seen] = []

        def note(block: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            inputs = tree_flatten((arguments, keywords))[0]
            seen.append(_Seen(block, {id(t) for t in inputs}, _first(output)))

        every = [block for chain in self._chains for block in chain.blocks]
        handles = [b.register_forward_hook(note, with_kwargs=True) for b in every]
        try:
            with torch.no_grad(), in_eval_mode(self._model), self._replaying(None):
                arguments, keywords = self._calls[0]
                self._model(*arguments, **keywords)
        finally:
            for handle in handles:
                handle.remove()
        regular = [chain for chain in self._chains if chain.is_regular(seen)]
        if not regular:
            raise _irregular("none")
        return regular

    def _verify(self) -> None:
        """On the first batch, every block alone gives what it gave in the whole model."""
        for stage, (chain, i) in enumerate(self._stages):
            self._run(stage, self._calls[:1], ())
            error = (_fingerprint(_first(chain.outputs[0])) - chain.expected[i]).norm()
            if not error <= 1e-3 * chain.expected[i].norm():
                raise _irregular(f"one whose number {i} gives something else when it runs alone")
        for chain in self._chains:
            chain.outputs, chain.done = [], -1


class _Seen:
    """A call of a block: which objects went in, which tensor came out."""

    def __init__(self, block: nn.Module, inputs: set[int], output: Tensor | None):
        self.block, self.inputs, self.output = block, inputs, output


class _Chain:
    """Blocks that hand their outputs on: ``outputs`` are those of number ``done``, by batch."""

    def __init__(self, blocks: nn.ModuleList):
        self.blocks = list(blocks)
        self.outputs: list[Any] = []
        self.done = -1
        self.expected: list[Tensor] = []

    def within(self, i: int) -> list[nn.Module]:
        return list(self.blocks[i].modules())

    def is_regular(self, seen: list[_Seen]) -> bool:
        own = [call for call in seen if call.block in self.blocks]
        self.expected = [_fingerprint(call.output) for call in own]
        handed = all(id(a.output) in b.inputs for a, b in zip(own, own[1:], strict=False))
        return bool(own) and [call.block for call in own] == self.blocks and handed


class _Reached(Exception):
    """The block that is wanted has run."""

    def __init__(self, output: Any):
        self.output = output


def _outermost_lists(model: nn.Module) -> list[nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # (a parent comes before its children)
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found[name] = module
    return list(found.values())


def _first(values: Any) -> Tensor | None:
    return next((t for t in tree_flatten(values)[0] if isinstance(t, Tensor)), None)


def _fingerprint(x: Tensor | None) -> Tensor:
    """The mean of every channel: little enough to keep of all blocks."""
    return torch.zeros(1) if x is None else x.float().flatten(0, -2).mean(0).cpu()


def _irregular(got: str) -> ValueError:
    return errors.value(
        "by_block takes a model with an nn.ModuleList of blocks that run one after the other",
        got,
        "Calibrate with by_block=False",
    )


@contextmanager
def _moved(module: nn.Module | None, device: torch.types.Device) -> Iterator[None]:
    """On another device for a while."""
    home = None if module is None else next((p.device for p in module.parameters()), None)
    if module is None or device is None or home is None or home == torch.device(device):
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def _run_on(device: torch.types.Device, real: Callable[..., Any], *inputs: Any) -> Any:
    """Call with tensors taken there, and the results brought back to where these were."""

    def all_to(values: Any, target: torch.types.Device) -> Any:
        return tree_map(lambda t: t.to(target) if isinstance(t, Tensor) else t, values)

    home = _first(inputs)
    if device is None or home is None:
        arguments, keywords = inputs
        return real(*arguments, **keywords)
    arguments, keywords = all_to(inputs, device)
    return all_to(real(*arguments, **keywords), home.device)
