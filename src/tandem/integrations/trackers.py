"""The trackers that runs can be followed in, each a line of a table; accelerate's own do the work.

Nothing of a tracker is imported before it is started.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Callable
from configparser import Error as BadConfig
from configparser import RawConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tandem.errors import UserError, require


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers are told of it."""

    project: str
    name: str
    folder: Path  # for files of this stage alone
    shared: Path  # for files of all stages of a run
    known_as: str | None  # the tracker's id of the run, where it goes on with one


@dataclass(frozen=True)
class TrackerSpec:
    """One tracker."""

    package: str  # what must be installed
    start: Callable[[TrackedRun], Any]  # makes accelerate's tracker and starts it
    id_of: Callable[[Any], str]  # the tracker's id of the run that was started
    check: Callable[[], None] = lambda: None  # raises UserError where it cannot work here
    # a metric's name as the tracker allows it
    named: Callable[[str], str] = str
    finish: Callable[[Any], None] = lambda tracker: tracker.finish()
    forgets: bool = False  # whether it loses the settings of a run that it goes on with


def check_tracker(name: str) -> None:
    """Raise UserError for a tracker whose package or login is not here."""
    spec = TRACKERS[name]
    require(spec.package, name, f"trackers: {name}")
    spec.check()


def _start_tensorboard(run: TrackedRun) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return _started(TensorBoardTracker(run.name, str(run.folder / "tensorboard")))


def _start_wandb(run: TrackedRun) -> Any:
    from accelerate.tracking import WandBTracker

    run.folder.mkdir(parents=True, exist_ok=True)
    go_on = {} if run.known_as is None else {"id": run.known_as, "resume": "allow"}
    project, name = (
        os.environ.get(f"WANDB_{key}") or value
        for key, value in (("PROJECT", run.project), ("NAME", run.name))
    )
    where = os.environ.get("WANDB_DIR") or str(run.folder)
    return _started(WandBTracker(project, name=name, dir=where, **go_on))


def _check_wandb() -> None:
    """wandb would ask for a key on the console, or fail after the model is loaded."""
    settings = _wandb_settings()
    mode = os.environ.get("WANDB_MODE") or settings.get("mode", "online")
    if mode in ("offline", "dryrun", "disabled"):
        return
    if any(os.environ.get(key) for key in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return
    host = os.environ.get("WANDB_BASE_URL") or settings.get("base_url", "https://api.wandb.ai")
    if settings.get("api_key") or _in_netrc(urlsplit(host).hostname or host):
        return
    raise UserError(
        f"trackers: wandb is not logged in to {host}. Run wandb login, or set WANDB_API_KEY, or "
        "set WANDB_MODE=offline: then its files stay here, and wandb sync uploads them later"
    )


def _wandb_settings() -> dict[str, str]:
    """What wandb's settings files say, that of the working folder last."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    parser = RawConfigParser()
    try:
        parser.read([home / "settings", Path("wandb", "settings")])
        return dict(parser["default"]) if parser.has_section("default") else {}
    except (BadConfig, UnicodeDecodeError):
        return {}


def _in_netrc(host: str) -> bool:
    """Whether the user's netrc has a key for a host."""
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if host in netrc.netrc(str(file)).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _start_mlflow(run: TrackedRun) -> Any:
    import mlflow
    from accelerate.tracking import MLflowTracker

    asked = os.environ.get("MLFLOW_TRACKING_URI")
    # mlflow-skinny has no other store that needs no server.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(asked or (run.shared / "mlflow").absolute().as_uri())
    # By default mlflow would try a server that is gone for minutes, and training would wait.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    return _started(MLflowTracker(run.project, run_id=run.known_as, run_name=run.name))


def _start_trackio(run: TrackedRun) -> Any:
    from accelerate.tracking import TrackioTracker

    # By its name alone an earlier run would be gone on with that this one has nothing to do with.
    name, resume = (run.name, "never") if run.known_as is None else (run.known_as, "must")
    return _started(TrackioTracker(run.project, name=name, resume=resume, embed=False))


def _finish_trackio(_: Any) -> None:
    import trackio

    trackio.finish()  # by itself, a run would be ended once more when the process ends


def _started(tracker: Any) -> Any:
    tracker.start()
    return tracker


# What mlflow allows in the name of a metric; everything else becomes an underscore.
_NOT_MLFLOWS = re.compile(r"[^\w\-. :/]", re.ASCII)

TRACKERS: dict[str, TrackerSpec] = {
    "tensorboard": TrackerSpec("tensorboard", _start_tensorboard, lambda one: one.run_name),
    "wandb": TrackerSpec("wandb", _start_wandb, lambda one: one.run.id, _check_wandb),
    "mlflow": TrackerSpec(
        "mlflow-skinny", _start_mlflow, lambda one: one.active_run.info.run_id,
        named=lambda name: _NOT_MLFLOWS.sub("_", name),
    ),
    "trackio": TrackerSpec(
        "trackio", _start_trackio, lambda one: one.run.name,
        finish=_finish_trackio, forgets=True,
    ),
}  # fmt: skip
