"""Reports a run on the console, in `metrics.jsonl`, in W&B and as plots.

Only rank 0 reports. Importing this package imports neither wandb nor matplotlib.
"""

from distaccum.metrics.console import Console as Console
from distaccum.metrics.curve import draw_curve as draw_curve
from distaccum.metrics.format import count as count
from distaccum.metrics.format import duration as duration
from distaccum.metrics.format import rate as rate
from distaccum.metrics.format import size as size
from distaccum.metrics.report import LoggerConfig as LoggerConfig
from distaccum.metrics.report import LoggerName as LoggerName
from distaccum.metrics.report import Report as Report
from distaccum.metrics.report import make_report as make_report
from distaccum.metrics.run_log import MetricsFile as MetricsFile
from distaccum.metrics.run_log import read_metrics as read_metrics
from distaccum.metrics.run_log import standing as standing
from distaccum.metrics.wandb_run import WandbMode as WandbMode
from distaccum.metrics.wandb_run import WandbRun as WandbRun
