"""Workers beside others in processes that a test started, without Ray; and some that die."""

from __future__ import annotations

from typing import Any, Literal

from prefarena.training.worker import Worker

Sharding = Literal["none", "fsdp"]


class OneOfMany(Worker):
    """A worker beside others, which the process has joined; alone where nothing is said of them."""

    def __init__(
        self,
        stage_dir: str,
        rank: int = 0,
        world_size: int = 1,
        sharding: Sharding = "none",
        *,
        offloads: bool = False,
    ) -> None:
        self.rank, self.world_size, self.sharding, self.offloads = rank, world_size, sharding, offloads
        super().__init__(stage_dir)


class KilledError(RuntimeError):
    pass


class DyingWorker(OneOfMany):
    """Dies when it logs the step `dies_at`, its checkpoints up to there written."""

    dies_at = 7

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        if row["step"] == self.dies_at:
            self.flush()
            raise KilledError
