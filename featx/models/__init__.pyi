from .agreement import Voted as Voted, agreements as agreements, export_csv as export_csv, vote as vote
from .bundle import Answer as Answer, Bundle as Bundle, read_bundle as read_bundle, write_bundle as write_bundle
from .calibrate import clopper_pearson as clopper_pearson
from .corrections import (
    MAX_NAME as MAX_NAME,
    Corrections as Corrections,
    Said as Said,
    checked_name as checked_name,
)
from .count import (
    LEAST_CHECKED as LEAST_CHECKED,
    ClassCount as ClassCount,
    Pile as Pile,
    check_rows as check_rows,
    count_adjusted as count_adjusted,
    count_checked as count_checked,
    draw_to_check as draw_to_check,
)
from .drift import (
    BET_HOURS as BET_HOURS,
    N_BINS as N_BINS,
    bins_of as bins_of,
    find_drift as find_drift,
    median_of as median_of,
    share_over_units as share_over_units,
)
from .examples import Labelled as Labelled, labelled_images as labelled_images
from .explain import MIDDLE as MIDDLE, Explainer as Explainer, Explanation as Explanation, in_middle as in_middle
from .export import Pickled as Pickled, export_bundle as export_bundle
from .finetuned import finetune_bundle as finetune_bundle
from .fit import (
    by_recall as by_recall,
    check_promises as check_promises,
    fit_bundle as fit_bundle,
    summary as summary,
)
from .instant import InstantModels as InstantModels
from .novelty import (
    is_unknown as is_unknown,
    nearest_mean as nearest_mean,
    shares_among as shares_among,
)
from .onnx.model import Exported as Exported, Photo as Photo, model_onnx as model_onnx
from .onnx.web import WebRuntime as WebRuntime, web_runtime as web_runtime
from .predictor import (
    layer_number as layer_number,
    named_files as named_files,
    open_embedder as open_embedder,
    predict_files as predict_files,
)
from .prior import prior_shares as prior_shares, read_prior as read_prior
from .refit import Refit as Refit, batch_sizes as batch_sizes, refit as refit
from .versions import (
    Versions as Versions,
    held_words as held_words,
    read_current as read_current,
    version_of as version_of,
)
