"""Energy of a run: hardware counters, one reader per node and counter; what was not read is named, never made up."""

from aifactory_train.energy.meter import NodeMeter
from aifactory_train.energy.readers import MeteredDevice, find_readers
from aifactory_train.energy.total import from_sacct, read_nodes, site_factors, summarise

__all__ = ["MeteredDevice", "NodeMeter", "find_readers", "from_sacct", "read_nodes", "site_factors", "summarise"]
