"""Reports a run on the console, in `metrics.jsonl`, in W&B and as plots.

Only rank 0 reports. Importing this package imports neither wandb nor matplotlib.
"""

from distaccum.metrics.console import Console
from distaccum.metrics.format import count, duration, rate, size
from distaccum.metrics.report import Report, make_report
from distaccum.metrics.run_log import MetricsFile, read_metrics, standing
from distaccum.metrics.wandb_run import LoggerConfig, LoggerName, WandbMode

__all__ = [
    "Console",
    "LoggerConfig",
    "LoggerName",
    "MetricsFile",
    "Report",
    "WandbMode",
    "count",
    "duration",
    "make_report",
    "rate",
    "read_metrics",
    "size",
    "standing",
]
