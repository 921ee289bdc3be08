"""Where a comparison's trainings are shown while they run, and afterwards: TensorBoard, W&B, MLflow, Trackio."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from prefarena.settings.section import Section

_KEY_LIKE = re.compile(r"key|token|password|passwd|secret|credential", re.IGNORECASE)
_WITH_KEY = re.compile(r"[a-z][a-z0-9+.-]*://[^/]*@", re.IGNORECASE)


class TrackerSettings(Section):
    """What every tracker has. Keys are never settings: each package finds its own in the environment."""

    #: The environment variables in which the tracker's package looks for a key; none: it needs none.
    key_variables: ClassVar[str] = ""

    timeout_s: float = Field(
        60, gt=0, description="Longest wait for a tracker that does not answer when a comparison is about to end."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_keys(cls, given: Any) -> Any:
        """Refuse keys, before anything could show them in an error."""
        for name, value in given.items() if isinstance(given, dict) else ():
            if _KEY_LIKE.search(str(name)):
                raise ValueError(f"{name} does not belong in a config, which is stored with every run: {cls._remedy()}")
            if isinstance(value, str) and _WITH_KEY.match(value):
                raise ValueError(
                    f"{name}: a name or password in a URI does not belong in a config, which is stored with every run: "
                    f"{cls._remedy()}"
                )
        return given

    @classmethod
    def _remedy(cls) -> str:
        return f"set {cls.key_variables} in the environment" if cls.key_variables else "this tracker needs none"


class TensorBoard(TrackerSettings):
    """Event files, which `tensorboard --logdir FOLDER` shows."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: str | None = Field(None, description="Folder of its files; by default OUTPUT/tracking/tensorboard.")


class WandB(TrackerSettings):
    """Weights & Biases, on its server or in files that `wandb sync` sends later."""

    key_variables: ClassVar[str] = "WANDB_API_KEY"

    kind: Literal["wandb"] = "wandb"
    project: str = Field("prefarena", min_length=1)
    entity: str | None = Field(None, description="User or team; by default the one that the key belongs to.")
    mode: Literal["online", "offline"] = "online"
    folder: str | None = Field(None, description="Folder of its files; by default OUTPUT/tracking/wandb.")


class MLflow(TrackerSettings):
    """MLflow, on a server or in a local store."""

    key_variables: ClassVar[str] = "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = Field(
        None, description="URI of a server, or a folder; by default the folder OUTPUT/tracking/mlflow."
    )
    experiment: str = Field("prefarena", min_length=1)


class Trackio(TrackerSettings):
    """Trackio, in its local database, which `trackio show` shows: where Trackio has it, TRACKIO_DIR says otherwise."""

    kind: Literal["trackio"] = "trackio"
    project: str = Field("prefarena", min_length=1)


Tracking = Annotated[TensorBoard | WandB | MLflow | Trackio, Field(discriminator="kind")]
