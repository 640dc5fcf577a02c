"""What a run tells people and machines: console, `metrics.jsonl`, W&B, pictures. On rank 0 only.

Importing it imports neither wandb nor matplotlib.
"""

from distaccum.report.console import Console as Console
from distaccum.report.curve import draw_curve as draw_curve
from distaccum.report.human import count as count
from distaccum.report.human import duration as duration
from distaccum.report.human import rate as rate
from distaccum.report.human import size as size
from distaccum.report.metrics import MetricsFile as MetricsFile
from distaccum.report.metrics import read_metrics as read_metrics
from distaccum.report.metrics import standing as standing
from distaccum.report.report import LoggerConfig as LoggerConfig
from distaccum.report.report import LoggerName as LoggerName
from distaccum.report.report import Report as Report
from distaccum.report.report import make_report as make_report
from distaccum.report.wandb_run import WandbMode as WandbMode
from distaccum.report.wandb_run import WandbRun as WandbRun
