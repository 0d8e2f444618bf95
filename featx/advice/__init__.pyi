from .advice import Advice as Advice, named as named
from .curves import Curve as Curve
from .measure import advise as advise
from .mislabelled import MISSED as MISSED, REPEATS as REPEATS, LabelRanking as LabelRanking, rank_labels as rank_labels
