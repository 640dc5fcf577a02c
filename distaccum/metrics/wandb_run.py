"""Logs to Weights & Biases without ever stopping a training or delaying it beyond time limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from distaccum.metrics.plain import to_plain

T = TypeVar("T")

# Every row has these fields under these names, so that each can be the x-axis on the web page.
AXES = ("step", "samples", "tokens")
# Seconds that `finish` may upload. Rows that are not sent by then are in the run folder, for
# `wandb sync`.
FINISH_TIMEOUT_S = 60.0


class WandbMode(Enum):
    """Selects where rows go: to files of the run folder only, or also to a server."""

    offline = "offline"
    online = "online"


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
        return None, f"W&B: {name}={environment[name]}, so W&B is off in this run and writes no files"
    if wish in ("offline", "dryrun") and mode is WandbMode.online:
        return WandbMode.offline, (
            f"W&B: WANDB_MODE={environment['WANDB_MODE']} overrides logger.mode=online, so this run is offline"
        )
    return mode, ""


class WandbRun:
    """Logs to one run of W&B, on rank 0 only.

    Making this object starts the run. That takes about one second, and at most about
    `init_timeout_s` seconds more. If the server cannot be reached or the API key is missing,
    `online` becomes `offline`, with a warning of one line. W&B never asks for a key at the
    terminal, because the other ranks would wait for the answer.

    An exception from W&B, here or later, is reported in one line and turns the logging off. It
    never reaches the caller.

    Args:
        run_dir: an existing folder. All files go to `run_dir/wandb`.
        project, entity, name, group: as in `wandb.init`; None lets W&B choose.
        mode: `online` needs a network and an API key, `offline` needs neither.
        config: the composed configuration, plan and forecast, with values of any type, which are
            converted to plain JSON.
        init_timeout_s: seconds to wait for the server.
        warn: called with one line of text, possibly from another thread.

    Attributes:
        mode: the mode in use, which is `offline` after `online` failed.
        active: False once logging is off.
        where: the web address of the run, or the folder for `wandb sync`; "" if there is neither.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        project: str,
        entity: str | None,
        name: str | None,
        group: str | None,
        mode: WandbMode,
        config: Mapping[str, object],
        init_timeout_s: float,
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._run: Any = None  # wandb.Run, half of whose methods carry no types
        self.mode = mode
        self.active = True
        self.where = ""
        earlier = len(list((run_dir / "wandb").glob("*run-*")))
        if earlier:
            warn(
                f"W&B: {run_dir / 'wandb'} already holds {earlier} run(s); this start is recorded as a separate run. "
                "metrics.jsonl holds all starts in one file"
            )

        identity = {"dir": run_dir, "project": project, "entity": entity, "name": name, "group": group}

        def start(as_mode: WandbMode) -> Any:
            return _start(identity, as_mode, _plain_dict(config), init_timeout_s, self._stop_pressed)

        if mode is WandbMode.online:
            self._run = self._guard("init", "falling back to offline", lambda: start(WandbMode.online))
        if self._run is None:
            self.mode, self.active = WandbMode.offline, True
            self._run = self._guard("init offline", "no W&B in this run", lambda: start(WandbMode.offline))
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
        row = {n if n in AXES else f"{kind}/{n}": value for n, value in fields.items() if value is not None}
        self._guarded("log", lambda: self._run.log(row))

    def update_config(self, fields: Mapping[str, object]) -> None:
        """Add values to the run's config that were not known when the run started."""
        self._guarded("config", lambda: self._run.config.update(_plain_dict(fields), allow_val_change=True))

    def update_summary(self, fields: Mapping[str, object]) -> None:
        """Set final values, which W&B shows in its table of runs."""
        self._guarded("summary", lambda: self._run.summary.update(_plain_dict(fields)))

    def finish(self, exit_code: int) -> None:
        """Upload the remaining rows for at most FINISH_TIMEOUT_S seconds and close the run.

        Later calls do nothing.

        Args:
            exit_code: exit code of the process, which W&B shows as finished (0) or failed.
        """
        if self._run is not None:  # even if logging is off, to keep the rows before the failure
            run, self._run = self._run, None
            self._guard(
                "finish", f"rows that were not sent are in {self.where}", lambda: run.finish(exit_code=exit_code)
            )
        self.active = False

    def _define_axes(self) -> None:
        for axis in AXES:
            self._run.define_metric(axis)
        for group in ("train", "validation"):
            self._run.define_metric(f"{group}/*", step_metric="step")
        self.where = self._run.url or str(Path(self._run.dir).parent)

    def _guarded(self, what: str, call: Callable[[], object]) -> None:
        if self.active:
            self._guard(what, "W&B is off from here on, metrics.jsonl continues", call)

    def _guard(self, what: str, consequence: str, call: Callable[[], T]) -> T | None:
        """Call W&B and return the result; after an exception, turn logging off and return None."""
        try:
            return call()
        except Exception as error:
            if self.active:  # warn only once
                cause = (str(error).strip().splitlines() or [""])[0]
                self._warn(f"W&B: {what} failed ({type(error).__name__}: {cause}): {consequence}")
            self.active = False
            return None

    def _stop_pressed(self) -> None:
        self._warn(
            "W&B: somebody pressed the stop button on the web page. The run continues, because a rank that stopped "
            "alone would leave the others waiting. Send SIGTERM to the job to stop it"
        )


def _plain_dict(fields: Mapping[str, object]) -> dict[str, Any]:
    return {str(name): to_plain(value) for name, value in fields.items()}


def _start(
    identity: Mapping[str, Any],  # folder and names
    mode: WandbMode,
    config: dict[str, Any],
    init_timeout_s: float,
    stop_fn: Callable[[], None],
) -> Any:
    import wandb

    # Silent for the whole process, not only for the run. Otherwise an online start asks for a key
    # at the terminal and checks the key for ten seconds. Important messages go through `warn`.
    wandb.setup(settings=wandb.Settings(silent=True))
    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",  # do not capture the trainer's output
        "init_timeout": init_timeout_s,
        "finish_timeout": FINISH_TIMEOUT_S,
        "finish_timeout_raises": True,
        # By default, the stop button on the web page sends SIGINT to this rank alone.
        "stop_fn": stop_fn,
    }
    known = wandb.Settings.model_fields  # the oldest supported wandb lacks the last three
    return wandb.init(
        **identity,
        mode=mode.value,
        config=config,
        reinit="create_new",  # leaves alone any run that the user's own code has open
        save_code=False,
        settings=wandb.Settings(**{key: value for key, value in wanted.items() if key in known}),
    )
