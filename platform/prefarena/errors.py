"""Errors by who is concerned: the user's (one sentence, exit status 2), or those of one entry and not the others."""


class UserError(Exception):
    """Input that cannot be used. The message names the file, row or key, and the remedy.

    The command line prints the message alone and ends with status 2; every other exception is a bug in
    Prefarena (or in the cluster) and keeps its traceback.
    """


class StorageFullError(UserError):
    """A disk or a quota is full. What was being written is removed; the last checkpoint is whole."""


class StorageError(RuntimeError):
    """Storage failed for longer than `resources.storage_retry_s`."""


class WaitTimeoutError(TimeoutError):
    """A wait on another process (placement, actor start, weight sync, rollout) outlasted its limit."""


class ClusterLostError(Exception):
    """A cluster that took a job no longer answers, or a job does not end. The message says what to do."""


class EntryError(RuntimeError):
    """An entry of a comparison cannot go on, for a reason that lies in its settings or in what it was given to use.

    The message is the reason that the report shows, with the remedy. Other entries can go on: the entry becomes a
    failed row, the comparison does not end.
    """


class JudgeError(EntryError):
    """A judge that cannot be asked, that raises, or that gives too few usable answers."""
