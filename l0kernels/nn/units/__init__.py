"""Gates for any model: its units found by running it once, their gates, and activations of open units only."""

from .graph import Group, Member, Pinned, UnitGraph, unit_graph

__all__ = ["Group", "Member", "Pinned", "UnitGraph", "unit_graph"]
