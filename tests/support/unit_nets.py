"""All small nets for tests of gated units by name, whose forwards call functions, views and branches."""

import unit_nets_attention
import unit_nets_forwards
import unit_nets_graphs
import unit_nets_images
import unit_nets_rows
from unit_examples import Nets

NETS: Nets = {}
for part in (unit_nets_images, unit_nets_rows, unit_nets_attention, unit_nets_forwards, unit_nets_graphs):
    assert not NETS.keys() & part.NETS.keys()
    NETS |= part.NETS
