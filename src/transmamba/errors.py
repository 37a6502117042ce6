"""Everything a user of transmamba can mend raises one of these. All are ValueErrors.

TransMambaError
├── InputError        a tensor or argument handed to an op or a model: shape, dtype, device, range, NaN
├── ScheduleError     a TransPoint schedule: length, entries, name
├── CacheError        an operation that a cache cannot do, such as rewinding past a switch
├── CheckpointError   a model folder: missing, truncated, of another kind
├── CorpusError       a source of text or images: missing, empty, unreadable, malformed
└── RecipeError       a run: unknown recipe, unknown field, value out of range

Messages name the value, the bound and the way out. Mistakes of our own are AssertionErrors.
"""


class TransMambaError(ValueError):
    """What went wrong, with which value, and the way out, in one line."""


class InputError(TransMambaError):
    """A tensor or argument has the wrong shape, dtype, device or range."""


class ScheduleError(TransMambaError):
    """A TransPoint schedule does not fit or cannot be understood."""


class CacheError(TransMambaError):
    """A cache is asked for something it no longer, or never, can do."""


class CheckpointError(TransMambaError):
    """A checkpoint is missing, incomplete or of another kind."""


class CorpusError(TransMambaError):
    """A source of text or images is missing, empty or unreadable."""


class RecipeError(TransMambaError):
    """A run is described wrongly."""
