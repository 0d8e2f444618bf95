from .catalogue import HEADS as HEADS, Head as Head, Logistic as Logistic, make_head as make_head
from .folds import (
    alone as alone,
    distinct_counts as distinct_counts,
    fold_numbers as fold_numbers,
    of_one_class as of_one_class,
    site_folds as site_folds,
    site_pairs as site_pairs,
)
from .instant import InstantRidge as InstantRidge
from .layers import Layers as Layers, left_out as left_out, open_layers as open_layers, read_layers as read_layers
from .scorer import (
    Array as Array,
    Kind as Kind,
    NotLinear as NotLinear,
    Scorer as Scorer,
    blocks_of as blocks_of,
    is_kind as is_kind,
    margins as margins,
    softmax as softmax,
    unit_rows as unit_rows,
)
from .selection import N_FOLDS as N_FOLDS, Views as Views, fit_chosen as fit_chosen
from .solvers.blocks import is_large as is_large, row_blocks as row_blocks, taken as taken
from .solvers.device import check_device as check_device
from .unlabelled import (
    Centre as Centre,
    heads_for as heads_for,
    unlabelled_centre as unlabelled_centre,
    unlabelled_rows as unlabelled_rows,
)
