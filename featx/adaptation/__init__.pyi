from . import training as training
from .autoencoder import (
    held_out_rows as held_out_rows,
    read_pixels as read_pixels,
    train_autoencoder as train_autoencoder,
)
from .finetune import (
    FinetuneResult as FinetuneResult,
    Progress as Progress,
    Tuning as Tuning,
    finetune_episodes as finetune_episodes,
    judge_episodes as judge_episodes,
    open_tuning as open_tuning,
    plan_shots as plan_shots,
)
from .training import choose_device as choose_device, recipe_for as recipe_for
