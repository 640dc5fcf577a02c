"""A run of Weights & Biases that never ends, stops or delays a training beyond its time limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from distaccum.metrics.plain import to_plain

T = TypeVar("T")

# Any of these can be chosen as the x-axis in the web page; they are logged beside every row, under these very names.
AXES = ("step", "samples", "tokens")
# How long `finish` may upload. What is not sent by then is in the run folder, for `wandb sync`.
FINISH_TIMEOUT_S = 60.0


class WandbMode(Enum):
    """Where the rows go: into files of the run folder only, or to a server as well."""

    offline = "offline"
    online = "online"


def allowed(mode: WandbMode, environment: Mapping[str, str]) -> tuple[WandbMode | None, str]:
    """Return what W&B's own variables leave of a mode, None for no W&B at all, and a line where that is another one.

    W&B itself reads WANDB_MODE only where the program names no mode, and some versions of it no WANDB_DISABLED.
    """
    wish = environment.get("WANDB_MODE", "").strip().lower()
    disabled = environment.get("WANDB_DISABLED", "").strip().lower()
    if wish == "disabled" or disabled in ("1", "true", "yes", "on"):
        name = "WANDB_MODE" if wish == "disabled" else "WANDB_DISABLED"
        return None, f"W&B: {name}={environment[name]}, so this run has no W&B and writes no files for it"
    if wish in ("offline", "dryrun") and mode is WandbMode.online:
        return WandbMode.offline, f"W&B: WANDB_MODE={environment['WANDB_MODE']}, so logger.mode=online is offline"
    return mode, ""


class WandbRun:
    """One W&B run, on rank 0 only.

    Making it starts the run, which takes about a second, and at most about `init_timeout_s` more. A server that cannot
    be reached, or a missing key, turns `online` into `offline` with one line. Nobody is asked for a key at the
    terminal: the other ranks would wait for the answer.

    Whatever W&B raises, here or later, is told in one line and turns the logging off; it never reaches the caller.

    Args:
        run_dir: all files go to `run_dir/wandb`. Must exist.
        project, entity, name, group: as in `wandb.init`; None lets W&B choose.
        mode: offline needs neither network nor key.
        config: the composed configuration, plan and forecast; any values, turned into plain JSON.
        init_timeout_s: how long to wait for the server.
        warn: takes one line of text. May be called from another thread.

    Attributes:
        mode: as it came to be: offline after a fall-back.
        active: False once logging is off.
        where: the address of the run in the web, or the folder to give to `wandb sync`; "" when there is neither.
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
                f"W&B: {run_dir / 'wandb'} already holds {earlier} run(s); this start is recorded as a run of its own "
                "beside them. metrics.jsonl holds all starts in one file"
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
        """Add one row: step, samples and tokens under their own names, the others as `kind/name`; None is left out.

        About 0.1 ms. `kind` is "train" or "heldout". W&B counts the rows itself: those of an earlier step, as a resumed
        run has them, are kept (with `step=` they would be dropped without a word).
        """
        row = {n if n in AXES else f"{kind}/{n}": value for n, value in fields.items() if value is not None}
        self._guarded("log", lambda: self._run.log(row))

    def update_config(self, fields: Mapping[str, object]) -> None:
        """Add to the run's config what was not known when it started."""
        self._guarded("config", lambda: self._run.config.update(_plain_dict(fields), allow_val_change=True))

    def update_summary(self, fields: Mapping[str, object]) -> None:
        """Set final values: what a table of runs shows."""
        self._guarded("summary", lambda: self._run.summary.update(_plain_dict(fields)))

    def finish(self, exit_code: int) -> None:
        """Send what is left, at most FINISH_TIMEOUT_S, and close the run with the exit code. Later calls do nothing."""
        if self._run is not None:  # also when logging is off: the rows before the failure are worth closing
            run, self._run = self._run, None
            self._guard("finish", f"what was not sent is in {self.where}", lambda: run.finish(exit_code=exit_code))
        self.active = False

    def _define_axes(self) -> None:
        for axis in AXES:
            self._run.define_metric(axis)
        for group in ("train", "heldout"):
            self._run.define_metric(f"{group}/*", step_metric="step")
        self.where = self._run.url or str(Path(self._run.dir).parent)

    def _guarded(self, what: str, call: Callable[[], object]) -> None:
        if self.active:
            self._guard(what, "W&B is off from here on, metrics.jsonl goes on", call)

    def _guard(self, what: str, consequence: str, call: Callable[[], T]) -> T | None:
        """The one place where W&B's exceptions end: off, and one line said. None after a failure."""
        try:
            return call()
        except Exception as error:
            if self.active:  # said once
                cause = (str(error).strip().splitlines() or [""])[0]
                self._warn(f"W&B: {what} failed ({type(error).__name__}: {cause}): {consequence}")
            self.active = False
            return None

    def _stop_pressed(self) -> None:
        self._warn(
            "W&B: somebody asked for this run to stop on the web page. It goes on: a rank that stopped alone would "
            "leave the others waiting. Send SIGTERM to the job instead"
        )


def _plain_dict(fields: Mapping[str, object]) -> dict[str, Any]:
    return {str(name): to_plain(value) for name, value in fields.items()}


def _start(
    identity: Mapping[str, Any],  # where and under which names
    mode: WandbMode,
    config: dict[str, Any],
    init_timeout_s: float,
    stop_fn: Callable[[], None],
) -> Any:
    import wandb

    # Silent for the whole process, not for the run: only so are the prompt for a key and a ten-second check of the key
    # left out of an online start. What matters is said through `warn`.
    wandb.setup(settings=wandb.Settings(silent=True))
    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",  # the trainer's output belongs to the trainer
        "init_timeout": init_timeout_s,
        "finish_timeout": FINISH_TIMEOUT_S,
        "finish_timeout_raises": True,
        "stop_fn": stop_fn,  # by default the web page's stop button sends SIGINT to this rank alone
    }
    known = wandb.Settings.model_fields  # the last three are younger than the oldest wandb we accept
    return wandb.init(
        **identity,
        mode=mode.value,
        config=config,
        reinit="create_new",  # neither ends nor hands back a run that the user's own code has open
        save_code=False,
        settings=wandb.Settings(**{key: value for key, value in wanted.items() if key in known}),
    )
