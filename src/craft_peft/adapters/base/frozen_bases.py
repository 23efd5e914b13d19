"""Adapters that differ in what they trained alone: what a store of many of them asks for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from .adapter import FactoredStackAdapter


class FrozenBasesAdapter(FactoredStackAdapter):
    r"""A factored adapter whose bases are frozen, so that many of them on the same bases can be held and used together.

    What is its own is only what it trained. That can be handed in: a store of many adapters needs one adapter, for the
    bases, and the trained tensors of the others.
    """

    @property
    @abstractmethod
    def bases(self) -> dict[str, Tensor]:
        """The frozen tensors that give the trained ones their meaning, by name."""

    @abstractmethod
    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by name, zeros for one that this adapter may have and has not."""

    @abstractmethod
    def middles_of(self, trained: Mapping[str, Tensor]) -> Float[Tensor, "layers r_out r_in"]:
        """The matrices :math:`K_l` of all layers, without the scaling, in one computation from `trained` tensors."""

    @abstractmethod
    def turn_rows(
        self, layer: int, hidden: Float[Tensor, "rows tokens r_in"], trained: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows tokens r_out"] | None:
        """``hidden[i] @ K_l.T`` of another adapter for each row, without forming its K: for few tokens; or None.

        Args:
            layer: the index in the stack.
            hidden: the rows of a batch, each times `in_factor`.
            trained: for each row the `trained` tensors of its adapter.
        """

    @abstractmethod
    def with_middles(self, middles: Float[Tensor, "layers r_out r_in"]) -> FrozenBasesAdapter:
        """An adapter on these very bases (not copies) with the given, frozen matrices :math:`K_l`, of scaling 1."""

    @abstractmethod
    def check_same_bases(self, saved: Tensor) -> None:
        """Refuse a saved fingerprint of other bases than these.

        Raises:
            CraftError: they differ; says in what.
        """
