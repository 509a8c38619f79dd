"""The one form in which every kernel takes a weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weight(NamedTuple):
    """A 4-bit weight ``[N, K]`` or a stack of them ``[E, N, K]``, as its parts.

        value[.., n, k] = q[.., n, k] * scale[.., g, n] + zero_point[.., g, n],  g = k // group_size

    Attributes:
        qdata: int8 ``[.., N, K/2]``, two nibbles a byte, even k in the low one; any strides.
        scale: float32, float16 or bfloat16 ``[.., n_groups, N]``. Its strides say how it lies in
            memory: a coalesced ``[.., N, n_groups]`` tensor comes as its ``.mT``.
        zero_point: as ``scale``; ``None`` where all are 0.
        group_size: weights along K that share a scale.
        signed: nibbles are ``q`` in two's complement, else offset binary ``u = q + 8``.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int
    signed: bool = True

    @property
    def N(self) -> int:
        """Out features."""
        return self.qdata.shape[-2]

    @property
    def K(self) -> int:
        """In features."""
        return 2 * self.qdata.shape[-1]

    def rows(self, which: slice) -> Weight:
        """Rows of a matrix, as views."""
        zero_point = None if self.zero_point is None else self.zero_point[:, which]
        return self._replace(
            qdata=self.qdata[which], scale=self.scale[:, which], zero_point=zero_point
        )

    def columns(self, which: slice) -> Weight:
        """Columns of a matrix, in whole groups, as views."""
        groups = slice(which.start // self.group_size, -(-which.stop // self.group_size))
        zero_point = None if self.zero_point is None else self.zero_point[groups]
        return self._replace(
            qdata=self.qdata[:, which.start // 2 : which.stop // 2],
            scale=self.scale[groups],
            zero_point=zero_point,
        )

    def expert(self, index: int) -> Weight:
        """One matrix of a stack, as views."""
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return self._replace(
            qdata=self.qdata[index], scale=self.scale[index], zero_point=zero_point
        )
