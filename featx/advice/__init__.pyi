from .advice import Advice as Advice, named as named
from .curves import Curve as Curve, fit_curve as fit_curve
from .labelling import PRESELECT as PRESELECT, choose_next as choose_next
from .measure import advise as advise
from .mislabelled import MISSED as MISSED, REPEATS as REPEATS, LabelRanking as LabelRanking, rank_labels as rank_labels
