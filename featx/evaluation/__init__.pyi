from . import splits as splits, stats as stats
from .baseline import PixelExtractor as PixelExtractor, make_pixels_baseline as make_pixels_baseline
from .duplicates import find_duplicates as find_duplicates
from .forecast import Forecast as Forecast, forecast_site as forecast_site
from .journal import Journal as Journal, Task as Task, plan_hash as plan_hash
from .labelled import LabelledRows as LabelledRows, sites_of as sites_of
from .results import (
    Comparison as Comparison,
    HeadResult as HeadResult,
    SweepResult as SweepResult,
    Trial as Trial,
    mean_interval as mean_interval,
    paired_difference as paired_difference,
)
from .shares import adjusted_shares as adjusted_shares, checked_share as checked_share
from .splits import (
    GroupKShotSplit as GroupKShotSplit,
    KShotSplit as KShotSplit,
    Shots as Shots,
    draw as draw,
    drawable as drawable,
    joined_sites as joined_sites,
    plan_shots as plan_shots,
    reached as reached,
    shots_label as shots_label,
)
from .stats import (
    BRACKETS as BRACKETS,
    Interval as Interval,
    limits as limits,
    percent as percent,
    points as points,
    shown_gap as shown_gap,
    unseen_share as unseen_share,
)
from .sweep import DEFAULT_SHOTS as DEFAULT_SHOTS, sweep_heads as sweep_heads
from .testset import judge as judge
from .workers import worker_pool as worker_pool
