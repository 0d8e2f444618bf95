from . import training as training
from .autoencoder import (
    held_out_rows as held_out_rows,
    read_pixels as read_pixels,
    train_autoencoder as train_autoencoder,
)
from .finetune import (
    FinetuneResult as FinetuneResult,
    finetune_episodes as finetune_episodes,
    judge_episodes as judge_episodes,
    plan_shots as plan_shots,
)
from .training import choose_device as choose_device, recipe_for as recipe_for
from .tuning import Progress as Progress, Tuning as Tuning, open_tuning as open_tuning
