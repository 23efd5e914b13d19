"""What every method is: one interface, the life of its frozen tensors, and what a store of many adapters asks for."""

from .adapter import FactoredStackAdapter as FactoredStackAdapter
from .adapter import StackAdapter as StackAdapter
from .adapter import working_dtype as working_dtype
from .deferred import still_deferred as still_deferred
from .frozen_bases import FrozenBasesAdapter as FrozenBasesAdapter
