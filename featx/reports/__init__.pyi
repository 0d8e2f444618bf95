from .advice import render_advice as render_advice
from .card import LIBRARY as LIBRARY, card_data as card_data, render_card as render_card
from .explain import render_explanations as render_explanations
from .heat import figure_png as figure_png, overlay_urls as overlay_urls, pair_jpeg as pair_jpeg
from .offline import Examples as Examples, render_offline as render_offline
from .page import hash_source as hash_source, render_template as render_template
from .sheet import (
    MAX_GROUPS as MAX_GROUPS,
    Found as Found,
    batch_sheet as batch_sheet,
    duplicate_sheet as duplicate_sheet,
    image_finder as image_finder,
    label_sheet as label_sheet,
    search_sheet as search_sheet,
)
from .sweep import (
    TABLE_WIDTH as TABLE_WIDTH,
    render as render,
    render_provisional as render_provisional,
    write_report as write_report,
)
