"""Where the time of a step goes: spans in the code, a trace of some steps, and its parts in a table."""

from toolkit.profiler.spans import span as span
from toolkit.profiler.tracer import Profiler as Profiler
from toolkit.profiler.tracer import refuse_in_vain as refuse_in_vain
