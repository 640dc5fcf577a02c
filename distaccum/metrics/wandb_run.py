"""Logs to Weights & Biases without ever stopping a training or delaying it beyond time limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from distaccum.errors import in_one_line
from distaccum.metrics.plain import plain_dict

T = TypeVar("T")

# Every row has these fields under these names, so that each can be the x-axis on the web page.
AXES = ("step", "samples", "tokens")
# Seconds that `finish` may upload. Rows that are not sent by then are in the run folder, for
# `wandb sync`.
FINISH_TIMEOUT_S = 60.0


class LoggerName(Enum):
    """Names the logger that runs beside `metrics.jsonl`, which is always written."""

    none = "none"
    wandb = "wandb"


class WandbMode(Enum):
    """Selects where rows go: to files of the run folder only, or also to a server."""

    offline = "offline"
    online = "online"


@dataclass
class LoggerConfig:
    """Holds the configuration group `logger`, whose defaults are in conf/logger/.

    Attributes:
        name: the logger that runs beside `metrics.jsonl`.
        project: project in W&B.
        entity: user or team in W&B; None: the owner of the API key.
        run_name: name of the run in W&B; None: W&B makes one up.
        group: group of runs in W&B, such as the runs of a sweep.
        mode: whether W&B writes files only or also sends to a server.
        init_timeout_s: seconds that an online start waits for the server.
    """

    name: LoggerName
    project: str
    entity: str | None
    run_name: str | None
    group: str | None
    mode: WandbMode
    init_timeout_s: float


def allowed(mode: WandbMode, environment: Mapping[str, str]) -> tuple[WandbMode | None, str]:
    """Return the mode that W&B's environment variables allow, and a message if it is not `mode`.

    W&B itself reads WANDB_MODE only if the program names no mode, and some of its versions do not
    read WANDB_DISABLED.

    Args:
        mode: the configured mode, `logger.mode`.
        environment: the environment variables.

    Returns:
        The mode, or None if W&B is disabled; and one line of text, "" if nothing was changed.
    """
    wish = environment.get("WANDB_MODE", "").strip().lower()
    disabled = environment.get("WANDB_DISABLED", "").strip().lower()
    if wish == "disabled" or disabled in ("1", "true", "yes", "on"):
        name = "WANDB_MODE" if wish == "disabled" else "WANDB_DISABLED"
        return (
            None,
            f"W&B: {name}={environment[name]}, so W&B is off in this run and writes no files",
        )
    if wish in ("offline", "dryrun") and mode is WandbMode.online:
        return (
            WandbMode.offline,
            (
                f"W&B: WANDB_MODE={environment['WANDB_MODE']} overrides logger.mode=online, so "
                "this run is offline"
            ),
        )
    return mode, ""


class WandbRun:
    """Logs to one run of W&B, on rank 0 only; does nothing if W&B is not wanted.

    Making this object starts the run. That takes about one second, and at most about
    `init_timeout_s` seconds more. If the server cannot be reached or the API key is missing,
    `online` becomes `offline`, with a warning of one line. W&B never asks for a key at the
    terminal, because the other ranks would wait for the answer.

    An exception from W&B, here or later, is reported in one line and turns the logging off. It
    never reaches the caller.

    Args:
        run_dir: an existing folder. All files go to `run_dir/wandb`.
        logger: the configuration group `logger`.
        config: the composed configuration, plan and forecast, with values of any type, which are
            converted to plain JSON.
        warn: called with one line of text, possibly from another thread.

    Attributes:
        active: False once logging is off.
        mode: the mode in use, which is `offline` after `online` failed.
        where: the web address of the run, or the folder for `wandb sync`; "" if there is neither.
    """

    def __init__(
        self,
        run_dir: Path,
        logger: LoggerConfig,
        config: Mapping[str, object],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._run: Any = None  # wandb.Run, half of whose methods carry no types
        self.mode, self.active, self.where = logger.mode, False, ""
        if logger.name is LoggerName.none:
            return
        mode, message = allowed(logger.mode, os.environ)
        if message:
            warn(message)
        if mode is None:
            return
        self.mode, self.active = mode, True
        earlier = len(list((run_dir / "wandb").glob("*run-*")))
        if earlier:
            warn(
                f"W&B: {run_dir / 'wandb'} already holds {earlier} run(s); this start is recorded "
                "as a separate run. metrics.jsonl holds all starts in one file"
            )
        start = partial(_start, run_dir, logger, config, self._stop_pressed)
        if mode is WandbMode.online:
            self._run = self._guarded("init", partial(start, mode), "falling back to offline")
        if self._run is None:
            self.mode, self.active = WandbMode.offline, True
            self._run = self._guarded(
                "init offline", partial(start, self.mode), "no W&B in this run"
            )
        self._guarded("define_metric", self._define_axes)

    def log(self, kind: str, fields: Mapping[str, float | int | str | None]) -> None:
        """Add one row to the run, which takes about 0.1 ms.

        W&B numbers the rows itself, so that it keeps rows with an earlier step, which a resumed run
        has. If the step were passed as `step=`, W&B would drop them silently.

        Args:
            kind: "train" or "validation".
            fields: `step`, `samples` and `tokens` are logged under these names, other fields as
                `kind/name`. Fields that are None are left out.
        """
        row = {
            n if n in AXES else f"{kind}/{n}": value
            for n, value in fields.items()
            if value is not None
        }
        self._guarded("log", lambda: self._run.log(row))

    def update_config(self, fields: Mapping[str, object]) -> None:
        """Add values to the run's config that were not known when the run started."""
        self._guarded(
            "config", lambda: self._run.config.update(plain_dict(fields), allow_val_change=True)
        )

    def update_summary(self, fields: Mapping[str, object]) -> None:
        """Set final values, which W&B shows in its table of runs."""
        self._guarded("summary", lambda: self._run.summary.update(plain_dict(fields)))

    def finish(self, exit_code: int) -> None:
        """Upload the remaining rows for at most FINISH_TIMEOUT_S seconds and close the run.

        Later calls do nothing.

        Args:
            exit_code: exit code of the process, which W&B shows as finished (0) or failed.
        """
        # Also if logging is off, to keep the rows before the failure.
        run, self._run = self._run, None
        if run is not None:
            self._call(
                "finish",
                lambda: run.finish(exit_code=exit_code),
                f"rows that were not sent are in {self.where}",
            )
        self.active = False

    def _define_axes(self) -> None:
        for axis in AXES:
            self._run.define_metric(axis)
        for group in ("train", "validation"):
            self._run.define_metric(f"{group}/*", step_metric="step")
        self.where = self._run.url or str(Path(self._run.dir).parent)

    def _guarded(
        self,
        what: str,
        call: Callable[[], T],
        consequence: str = "W&B is off from here on, metrics.jsonl continues",
    ) -> T | None:
        """Call W&B unless logging is off, and return the result."""
        return self._call(what, call, consequence) if self.active else None

    def _call(self, what: str, call: Callable[[], T], consequence: str) -> T | None:
        """Call W&B and return the result; after an exception, turn logging off and return None."""
        try:
            return call()
        except Exception as error:
            if self.active:  # warn only once
                self._warn(f"W&B: {what} failed ({in_one_line(error)}): {consequence}")
            self.active = False
            return None

    def _stop_pressed(self) -> None:
        self._warn(
            "W&B: somebody pressed the stop button on the web page. The run continues, because a "
            "rank that stopped alone would leave the others waiting. Send SIGTERM to the job to "
            "stop it"
        )


def _start(
    run_dir: Path,
    logger: LoggerConfig,
    config: Mapping[str, object],
    stop_fn: Callable[[], None],
    mode: WandbMode,
) -> Any:
    import wandb

    # Silent for the whole process, not only for the run. Otherwise an online start asks for a key
    # at the terminal and checks the key for ten seconds. Important messages go through `warn`.
    wandb.setup(settings=wandb.Settings(silent=True))
    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",  # do not capture the trainer's output
        "init_timeout": logger.init_timeout_s,
        "finish_timeout": FINISH_TIMEOUT_S,
        "finish_timeout_raises": True,
        # By default, the stop button on the web page sends SIGINT to this rank alone.
        "stop_fn": stop_fn,
    }
    known = wandb.Settings.model_fields  # the oldest supported wandb lacks the last three
    return wandb.init(
        dir=run_dir,
        project=logger.project,
        entity=logger.entity,
        name=logger.run_name,
        group=logger.group,
        mode=mode.value,
        config=plain_dict(config),
        reinit="create_new",  # leaves alone any run that the user's own code has open
        save_code=False,
        settings=wandb.Settings(**{key: value for key, value in wanted.items() if key in known}),
    )
