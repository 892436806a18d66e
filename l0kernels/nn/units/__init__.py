"""Gates for any model: its units found by running it once, their gates, activations of open units alone."""

from . import narrow_rules  # noqa: F401, fills the table of narrow.py
from .graph import Group, Member, Pinned, UnitGraph, unit_graph
from .place import GateGroups, gate_, ungate_

__all__ = ["GateGroups", "Group", "Member", "Pinned", "UnitGraph", "gate_", "ungate_", "unit_graph"]
